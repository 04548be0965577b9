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
