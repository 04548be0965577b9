// The roof of the multiply-add units, measured with the very tile shape the kernels use but nothing to load.
#pragma once

#include <time.h>

#include "parallel.h"

namespace fastseq::FS_ISA {
namespace {

inline double now_seconds() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

// A chunk of independent multiply-adds; returns their flops.
template <class T>
FS_NOINLINE double fma_burst(T* sink /* [lanes] */) {
  constexpr int chains = 12, rounds = 20000;
  Vec<T> a[chains], b = load(sink), c = load(sink);
#pragma GCC unroll 12
  for (int i = 0; i < chains; ++i) a[i] = b + broadcast<T>((T)i);
  for (int k = 0; k < rounds; ++k) {
#pragma GCC unroll 12
    for (int i = 0; i < chains; ++i) a[i] = fused_multiply_add(a[i], b, c);
  }
  Vec<T> sum{};
#pragma GCC unroll 12
  for (int i = 0; i < chains; ++i) sum += a[i];
  store(sink, sum * broadcast<T>(0) + b);
  return 2.0 * lanes<T> * chains * rounds;
}

// GFLOP/s of all threads together over about `seconds`.
template <class T>
double fma_gflops(int threads, double seconds) {
  struct Shared {
    Barrier barrier;
    double seconds, flops[256], begin[256], end[256];
    int size = 0;
  } shared;
  shared.seconds = seconds;
  auto body = [&shared](int rank, int size) {
    alignas(64) T sink[lanes<T>];
    for (int i = 0; i < lanes<T>; ++i) sink[i] = (T)0.5;
    if (rank >= 256) return;
    shared.size = size;
    shared.barrier.wait(size);
    double begin = now_seconds(), flops = 0, now = begin;
    for (; now - begin < shared.seconds; now = now_seconds()) flops += fma_burst<T>(sink);
    shared.begin[rank] = begin;
    shared.end[rank] = now;
    shared.flops[rank] = flops;
  };
  run_parallel(threads < 256 ? threads : 256, body);
  double total = 0;
  for (int i = 0; i < shared.size; ++i) total += shared.flops[i] / (shared.end[i] - shared.begin[i]);
  return total * 1e-9;
}

}  // namespace
}  // namespace fastseq::FS_ISA
