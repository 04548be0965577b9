// A team of threads inside one parallel region and the barrier between its steps.
#pragma once

#include "profile.h"
#include "vec.h"

namespace fastseq::FS_ISA {
namespace {

// A counter that only grows; each arrival waits for the end of its own round. No std::atomic: its inline code would be
// shared with objects built for other instruction sets.
struct Barrier {
  alignas(64) int64_t arrived = 0;

  void wait(int size) {
    if (size == 1) return;
    Phase before = enter_phase(Phase::barrier_wait);
    int64_t ticket = __atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL);
    int64_t target = (ticket + size - 1) / size * size;
    for (int turn = 0; __atomic_load_n(&arrived, __ATOMIC_ACQUIRE) < target; ++turn) {
      if (turn < 4096) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      } else {
        fastseq_wait_turn(turn);
      }
    }
    enter_phase(before);
  }
};

struct Team {
  int rank, size;
  Barrier* barrier;
  void wait() const { barrier->wait(size); }
};

struct Range {
  int64_t begin, end;
  int64_t count() const { return end - begin; }
};

// [0, count) in nearly equal parts. The division is done once: it costs as much as several rows of a tile.
struct EvenSplit {
  int64_t base, extra;
  EvenSplit(int64_t count, int64_t parts) : base(parts ? count / parts : 0), extra(count - base * parts) {}
  FS_INLINE Range part(int64_t index) const {
    int64_t begin = index * base + (index < extra ? index : extra);
    return {begin, begin + base + (index < extra ? 1 : 0)};
  }
};
FS_INLINE Range split(int64_t count, int64_t parts, int64_t index) { return EvenSplit(count, parts).part(index); }

// Work handed out piece by piece; which thread does a piece does not change its bits. Cores are rarely equally fast: they share
// their execution units with neighbours, clocks differ, the system takes its time from one of them. Cut into equal parts, a
// call takes as long as the slowest core.
struct WorkQueue {
  alignas(64) int64_t next = 0;
  int64_t take() { return __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); }
};

// The same for rows or columns, in runs that grow shorter towards the end: long ones use the caches better, short ones let
// all threads finish together.
struct RangeQueue {
  alignas(64) int64_t next = 0;

  // The next run of [0, count), a multiple of `unit` from `least` to `most` unless the end cuts it off; empty when all is
  // taken. A thread on its own gets `most` every time.
  Range take(int64_t count, int64_t unit, int64_t least, int64_t most, int size) {
    int64_t begin = __atomic_load_n(&next, __ATOMIC_RELAXED);
    for (;;) {
      if (begin >= count) return {count, count};
      int64_t length = size == 1 ? most : ((count - begin) / (2 * size) + unit - 1) / unit * unit;
      length = length < least ? least : length > most ? most : length;
      int64_t end = count - begin < length ? count : begin + length;
      if (__atomic_compare_exchange_n(&next, &begin, end, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return {begin, end};
    }
  }
};

// The items of one thread of a team, which it takes in order; a thread that has none left takes the last ones of another. So
// what a thread works on is mostly its own, which its caches hold, and nobody waits long for a slower core. Used again and
// again in rounds, between which the team meets at a barrier.
struct StealingQueue {
  alignas(64) uint64_t state = 0;  // the round, items taken from the front, items taken from the back: 32, 16 and 16 bits

  // An item of this round, or -1. Rounds are numbered from 1.
  int64_t take(int64_t round, int64_t count, bool front) {
    uint64_t before = __atomic_load_n(&state, __ATOMIC_RELAXED);
    for (;;) {
      uint64_t now = before >> 32 == (uint64_t)round ? before : (uint64_t)round << 32;
      int64_t first = now >> 16 & 0xffff, last = now & 0xffff;
      if (first + last >= count) return -1;
      uint64_t after = now + (front ? 1 << 16 : 1);
      if (__atomic_compare_exchange_n(&state, &before, after, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
        return front ? first : count - 1 - last;
    }
  }
  static constexpr int64_t most_items = 0x7fff;
};

// visit(item) for every item of [0, count) once, the items being dealt out evenly beforehand; backwards if `reversed`.
template <class Visit>
FS_INLINE void share_out(const Team& team, StealingQueue* queues /* [team.size] */, int64_t round, int64_t count, bool reversed,
                         Visit visit) {
  EvenSplit shares(count, team.size);
  bool steals = team.size > 1 && shares.part(0).count() <= StealingQueue::most_items;
  for (int i = 0; i < (steals ? team.size : 1); ++i) {
    int owner = team.rank + i < team.size ? team.rank + i : team.rank + i - team.size;
    Range items = shares.part(owner);
    for (int64_t taken = 0;; ++taken) {
      int64_t item = steals ? queues[owner].take(round, items.count(), i == 0) : taken < items.count() ? taken : -1;
      if (item < 0) break;
      visit(reversed ? items.end - 1 - item : items.begin + item);
    }
  }
}

template <class Body>
void run_parallel(int threads, Body& body) {
  fastseq_run_parallel(threads, [](void* context, int rank, int size) { (*(Body*)context)(rank, size); }, &body);
}

FS_INLINE constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
FS_INLINE int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
FS_INLINE int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }

// Hands out aligned pieces of one block. Run once with base NULL to learn the size, once with the block.
struct Arena {
  char* base;
  size_t used = 0;

  template <class T>
  T* take(int64_t count) {
    size_t offset = used;
    used += ((size_t)count * sizeof(T) + 63) / 64 * 64 + 64;  // a line between pieces: no false sharing, no equal sets
    return base ? (T*)(base + offset) : nullptr;
  }

  StealingQueue* take_queues(int count) {
    StealingQueue* queues = take<StealingQueue>(count);
    for (int i = 0; queues && i < count; ++i) queues[i] = StealingQueue{};
    return queues;
  }
};

}  // namespace
}  // namespace fastseq::FS_ISA
