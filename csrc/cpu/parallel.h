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
};

}  // namespace
}  // namespace fastseq::FS_ISA
