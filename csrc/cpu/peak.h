// The roofs of this machine: the multiply-add units, measured with the very tile shape the kernels use but nothing to load,
// and the memory, caches included.
#pragma once

#include <time.h>

#include "parallel.h"
#include "split.h"

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

// What all threads together do per nanosecond over about `seconds`. prepare(rank) runs before the clock starts; burst(rank)
// does some work and says how much.
template <class Prepare, class Burst>
double rate_of_team(int threads, double seconds, Prepare prepare, Burst burst) {
  constexpr int most = 256;
  struct Shared {
    Barrier barrier;
    double work[most], begin[most], end[most];
    int size = 0;
  } shared;
  auto body = [&](int rank, int size) {
    prepare(rank);
    shared.size = size;
    shared.barrier.wait(size);
    double begin = now_seconds(), work = 0, now = begin;
    for (; now - begin < seconds; now = now_seconds()) work += burst(rank);
    shared.begin[rank] = begin;
    shared.end[rank] = now;
    shared.work[rank] = work;
  };
  run_parallel(threads < most ? threads : most, body);
  double total = 0;
  for (int i = 0; i < shared.size; ++i) total += shared.work[i] / (shared.end[i] - shared.begin[i]);
  return total * 1e-9;
}

#if FS_MATRIX_UNIT
// On this tier float32 products are the matrix unit's: its peak is that of the tile the kernels use, with factors in L1.
FS_NOINLINE double split_burst() {
  constexpr int64_t k_blocks = 2, rounds = 200;
  TileMode mode;
  alignas(64) uint16_t left[2 * k_blocks * left_block_elements] = {}, right[k_blocks * right_block_elements] = {};
  alignas(64) float sums[2 * split_rows * split_panel_width];
  for (int64_t i = 0; i < rounds; ++i)
    split_tile_pair(left, k_blocks * left_block_elements, right, k_blocks, sums, split_panel_width);
  return 2.0 * 2 * split_rows * split_panel_width * split_depth * k_blocks * rounds;
}
#endif

// GFLOP/s of all threads together over about `seconds`.
template <class T>
double fma_gflops(int threads, double seconds) {
  return rate_of_team(
      threads, seconds, [](int) {},
      [](int) {
        alignas(64) T sink[lanes<T>];
        for (int i = 0; i < lanes<T>; ++i) sink[i] = (T)0.5;
#if FS_MATRIX_UNIT
        if constexpr (has_split_products<T>) return split_burst();
#endif
        return fma_burst<T>(sink);
      });
}

// The sum of `count` floats, a multiple of eight vectors, so that every one is read. Along one stream or along several, each an equal
// part of the array: which is faster differs between processors, and between caches and memory.
template <int streams>
FS_NOINLINE float read_burst(const float* data, int64_t count) {
  constexpr int vectors = 8 / streams;
  const int64_t apart = count / streams;
  Vec<float> sum[streams][vectors] = {};
  for (int64_t i = 0; i < apart; i += vectors * lanes<float>)
#pragma GCC unroll 8
    for (int s = 0; s < streams; ++s)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[s][v] += load(data + s * apart + i + v * lanes<float>);
  Vec<float> total{};
#pragma GCC unroll 8
  for (int s = 0; s < streams; ++s)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) total += sum[s][v];
  return sum_of_lanes<float>(total);
}

FS_NOINLINE void copy_burst(const float* source, float* target, int64_t count) {
  constexpr int streams = 8;
  for (int64_t i = 0; i < count; i += streams * lanes<float>)
#pragma GCC unroll 8
    for (int s = 0; s < streams; ++s) store(target + i + s * lanes<float>, load(source + i + s * lanes<float>));
}

// GB/s of all threads together; see the kernel table.
inline double memory_gbytes(int copies, int64_t bytes_per_thread, int threads, double seconds) {
  constexpr int64_t step = 8 * lanes<float>;
  int64_t count = maximum(1, bytes_per_thread / (int64_t)sizeof(float) / (copies ? 2 : 1) / step) * step;
  int64_t stride = (copies ? 2 : 1) * count + 64 / (int64_t)sizeof(float);
  float* block = (float*)fastseq_workspace((size_t)(stride * threads) * sizeof(float));
  if (!block) return -1;
  // Short arrays are gone over several times between two looks at the clock.
  int64_t rounds = maximum(1, (int64_t(1) << 20) / (count * (int64_t)sizeof(float)));
  float sinks[16];
  auto rate = [&](double share, auto pass) {
    return rate_of_team(
        threads, share,
        [=](int rank) {
          // Each thread writes its own array first, so that it lies near the thread.
          for (int64_t i = 0; i < stride; ++i) block[rank * stride + i] = 0;
        },
        [=](int rank) {
          for (int64_t i = 0; i < rounds; ++i) pass(rank, block + rank * stride);
          return (double)rounds * (double)count * sizeof(float) * (copies ? 2 : 1);
        });
  };
  if (copies) return rate(seconds, [=](int, float* data) { copy_burst(data, data + count, count); });
  double along_one = rate(seconds / 2, [&](int rank, float* data) { sinks[rank % 16] = read_burst<1>(data, count); });
  double along_four = rate(seconds / 2, [&](int rank, float* data) { sinks[rank % 16] = read_burst<4>(data, count); });
  return along_one > along_four ? along_one : along_four;
}

}  // namespace
}  // namespace fastseq::FS_ISA
