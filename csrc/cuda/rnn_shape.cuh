// What forward and backward of a recurrent layer share: places of slots, steps, products of rows in shared memory, the barrier.
#pragma once

#include "device.cuh"

namespace fastseq::cuda {
namespace {

constexpr int rnn_threads = 256, rnn_warps = rnn_threads / warp_lanes;
constexpr int rows_at_once = 4;  // of a product: so often is a weight used that was read once

// Where slot s of a cell lies in a row of slots, in multiples of H: input gates first, in the order of W_ih.
template <class Cell>
__host__ __device__ constexpr int place_of_slot(int slot) {
  int among_input = slot - Cell::input_first;
  if (among_input >= 0 && among_input < Cell::input_count) return Cell::gate_of_input(among_input);
  return slot < Cell::input_first ? Cell::input_count + slot : slot;
}
template <class Cell>
__host__ __device__ constexpr bool takes_input(int slot) {
  return slot >= Cell::input_first && slot < Cell::input_first + Cell::input_count;
}

// One step as a direction meets it. Rows below `previous_alive` come from the step before, the others begin here; rows from
// `next_alive` on end here.
struct Step {
  int64_t first_row, alive;
  int64_t previous_first, previous_alive;
  int64_t next_first, next_alive;
};

FS_INLINE int64_t first_row_of(const fastseq_cuda_rnn_shape& shape, int64_t t) {
  return shape.first_row ? shape.first_row[t] : t * shape.batch;
}

FS_INLINE Step step_at(const fastseq_cuda_rnn_shape& shape, bool reverse, int64_t position) {
  auto rows = [&](int64_t t, int64_t& first, int64_t& alive) {
    first = alive = 0;
    if (t < 0 || t >= shape.steps) return;
    first = first_row_of(shape, t);
    alive = first_row_of(shape, t + 1) - first;
  };
  int64_t t = reverse ? shape.steps - 1 - position : position, onward = reverse ? -1 : 1;
  Step step;
  rows(t, step.first_row, step.alive);
  rows(t - onward, step.previous_first, step.previous_alive);
  rows(t + onward, step.next_first, step.next_alive);
  return step;
}

// Eight bytes of a row.
template <class S>
constexpr int chunk_elements = 8 / (int)sizeof(S);
template <class S>
struct alignas(8) Chunk {
  S value[chunk_elements<S>];
};

// sums[n][r] = this lane's share of the product of weights[n] and rows[r], both in shared memory, `length` a multiple of a chunk.
template <int N, class S>
FS_INLINE void multiply_rows(const S* const (&weights)[N], const S* const (&rows)[rows_at_once], int64_t length, int lane,
                             Sum<S> (&sums)[N][rows_at_once]) {
  constexpr int C = chunk_elements<S>;
  for (int64_t k = lane * C; k < length; k += warp_lanes * C) {
    Sum<S> left[rows_at_once][C];
#pragma unroll
    for (int r = 0; r < rows_at_once; ++r) {
      Chunk<S> chunk = *(const Chunk<S>*)(rows[r] + k);
#pragma unroll
      for (int c = 0; c < C; ++c) left[r][c] = widen(chunk.value[c]);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
      Chunk<S> chunk = *(const Chunk<S>*)(weights[n] + k);
#pragma unroll
      for (int c = 0; c < C; ++c) {
        Sum<S> weight = widen(chunk.value[c]);
#pragma unroll
        for (int r = 0; r < rows_at_once; ++r) sums[n][r] = multiply_add(weight, left[r][c], sums[n][r]);
      }
    }
  }
}

// The sums over all lanes of N x 4 values, one to a lane: sums[n][r] arrives in the lanes from lane_of_sum<N>(n, r) on, as many
// as there are lanes for each. At every step a lane hands half of its values to its partner, so that 16 sums take 16 shuffles.
template <int N>
constexpr int sums_per_warp = N == 1   ? 4
                              : N == 2 ? 8
                              : N <= 4 ? 16
                                       : 32;
template <int N>
FS_INLINE int lane_of_sum(int n, int r) {
  return (rows_at_once * n + r) * (warp_lanes / sums_per_warp<N>);
}
template <int N, class A>
FS_INLINE A add_lanes(const A (&sums)[N][rows_at_once], int lane) {
  constexpr int count = sums_per_warp<N>;
  A value[count];
#pragma unroll
  for (int i = 0; i < count; ++i) value[i] = i < N * rows_at_once ? sums[i / rows_at_once][i % rows_at_once] : A(0);
  int mask = warp_lanes / 2;
#pragma unroll
  for (int half = count / 2; half; half /= 2, mask /= 2) {
    bool upper = lane & mask;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      A kept = upper ? value[half + i] : value[i], given = upper ? value[i] : value[half + i];
      value[i] = kept + __shfl_xor_sync(all_lanes, given, mask);
    }
  }
  for (; mask; mask /= 2) value[0] += __shfl_xor_sync(all_lanes, value[0], mask);
  return value[0];
}

// All blocks that share a counter have come here `round` times. What they wrote before is seen by load_fresh after.
FS_INLINE void wait_for_blocks(uint32_t* counter, uint32_t blocks, uint32_t round) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(counter, 1u);
    while (*(volatile uint32_t*)counter < blocks * round) __nanosleep(20);
    __threadfence();
  }
  __syncthreads();
}
constexpr int words_per_barrier = 32;  // a cache line each

// The part of a layer that a block works on.
struct Share {
  int direction;
  int64_t first_unit, units;
  int64_t first_row, last_row;  // of the batch

  FS_INLINE Share(const fastseq_cuda_rnn_shape& shape, const fastseq_cuda_plan& plan) {
    direction = (int)blockIdx.z;
    first_unit = (int64_t)blockIdx.x * plan.units_per_block;
    units = smaller<int64_t>(plan.units_per_block, shape.hidden_size - first_unit);
    first_row = (int64_t)blockIdx.y * plan.rows_per_block;
    last_row = smaller<int64_t>(first_row + plan.rows_per_block, shape.batch);
  }
};

FS_INLINE void finish_step(uint32_t* barriers, int64_t round) {
  if (gridDim.x > 1) {
    uint32_t* counter = barriers + (blockIdx.z * gridDim.y + blockIdx.y) * words_per_barrier;
    wait_for_blocks(counter, gridDim.x, (uint32_t)round);
  } else {
    __syncthreads();
  }
}

}  // namespace
}  // namespace fastseq::cuda
