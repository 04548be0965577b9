// Recurrent forward. A block keeps the recurrent weights of its hidden units in shared memory, for one step or for all; of a
// step it stages a few rows of h at a time, and each warp computes one unit of four rows: all gates, then the cell.
#pragma once

#include "rnn_shape.cuh"

namespace fastseq::cuda {
namespace {

template <class Cell, class S>
struct RnnForward {
  using A = Sum<S>;
  const fastseq_cuda_rnn_forward& call;
  int direction;
  int64_t H;

  FS_INLINE RnnForward(const fastseq_cuda_rnn_forward& call, int direction)
      : call(call), direction(direction), H(call.shape.hidden_size) {}

  FS_INLINE S* output_row(int64_t row) const {  // of all rows
    return (S*)call.output + (row * call.shape.directions + direction) * H;
  }
  FS_INLINE int64_t state_row(int64_t row) const { return (direction * call.shape.batch + row) * H; }

  // h before the step, [H], or NULL for zeros.
  FS_INLINE const S* hidden_before(const Step& step, int64_t row) const {
    if (row < step.previous_alive) return output_row(step.previous_first + row);
    return call.initial_hidden ? (const S*)call.initial_hidden + state_row(row) : nullptr;
  }
  FS_INLINE A* cell_of(int64_t first_row, int64_t row) const {
    return (A*)call.cells[direction] + (call.save ? first_row + row : row) * H;
  }

  struct Before {
    A slot[Cell::slots];
    A h, c;
  };

  // What the update of one unit of one row needs besides W_hh h.
  FS_INLINE Before read(const Step& step, int64_t row, int64_t unit) const {
    Before before;
    const S* slots = (const S*)call.slots[direction] + (step.first_row + row) * Cell::slots * H + unit;
#pragma unroll
    for (int s = 0; s < Cell::slots; ++s)
      before.slot[s] = takes_input<Cell>(s) ? widen(slots[place_of_slot<Cell>(s) * H]) : A(0);
    const S* h = hidden_before(step, row);
    before.h = h ? widen(load_fresh(h + unit)) : A(0);
    before.c = A(0);
    if constexpr (Cell::has_cell)
      before.c = row < step.previous_alive ? cell_of(step.previous_first, row)[unit]
                                           : zero_without<S>(call.initial_cell, state_row(row) + unit);
    return before;
  }

  // from_hidden[i]: W_hh h of the i-th slot that takes it.
  FS_INLINE void update(const Step& step, int64_t row, int64_t unit, Before& before,
                        const A (&from_hidden)[Cell::hidden_count]) const {
#pragma unroll
    for (int i = 0; i < Cell::hidden_count; ++i)
      before.slot[Cell::hidden_first + i] +=
          from_hidden[i] + zero_without<S>(call.hidden_bias[direction], Cell::gate_of_hidden(i) * H + unit);
    A h;
    Cell::template forward<Math<A>>(before.slot, before.h, before.c, h);
    if (call.save) {
      S* slots = (S*)call.slots[direction] + (step.first_row + row) * Cell::slots * H + unit;
#pragma unroll
      for (int s = 0; s < Cell::slots; ++s) slots[place_of_slot<Cell>(s) * H] = narrow<S>(before.slot[s]);
    }
    output_row(step.first_row + row)[unit] = narrow<S>(h);
    if constexpr (Cell::has_cell) cell_of(step.first_row, row)[unit] = before.c;
    if (row >= step.next_alive) {
      ((S*)call.final_hidden)[state_row(row) + unit] = narrow<S>(h);
      if constexpr (Cell::has_cell) ((S*)call.final_cell)[state_row(row) + unit] = narrow<S>(before.c);
    }
  }

  // One unit of up to four rows, by one warp. weights[i] and rows[r] lie in shared memory, or with `staged` false in global.
  FS_INLINE void run_unit(const Step& step, int64_t first_row, int64_t rows_left, int64_t unit,
                          const S* const (&weights)[Cell::hidden_count], const S* const (&rows)[rows_at_once], int64_t length,
                          bool staged, int lane) const {
    // What the cell needs is asked for before the product, so that it has come when the product is done.
    bool updates = lane < smaller<int64_t>(rows_left, rows_at_once);
    Before before{};
    if (updates) before = read(step, first_row + lane, unit);
    A sums[Cell::hidden_count][rows_at_once] = {};
    if (staged) {
      multiply_rows(weights, rows, length, lane, sums);
    } else {
      for (int64_t k = lane; k < length; k += warp_lanes)
#pragma unroll
        for (int r = 0; r < rows_at_once; ++r) {
          A h = rows[r] ? widen(load_fresh(rows[r] + k)) : A(0);
#pragma unroll
          for (int i = 0; i < Cell::hidden_count; ++i) sums[i][r] = multiply_add(widen(weights[i][k]), h, sums[i][r]);
        }
    }
    A sum = add_lanes(sums, lane), from_hidden[Cell::hidden_count];
#pragma unroll
    for (int i = 0; i < Cell::hidden_count; ++i)
      from_hidden[i] = __shfl_sync(all_lanes, sum, lane_of_sum<Cell::hidden_count>(i, lane % rows_at_once));
    if (updates) update(step, first_row + lane, unit, before, from_hidden);
  }
};

// Steps [first, last) in the order of the direction.
template <class Cell, class S>
__global__ void __launch_bounds__(rnn_threads, 1)
    rnn_forward_kernel(fastseq_cuda_rnn_forward call, fastseq_cuda_plan plan, int64_t first, int64_t last, uint32_t* barriers) {
  FS_DYNAMIC_SHARED(memory);
  Share share(call.shape, plan);
  RnnForward<Cell, S> layer(call, share.direction);
  int lane = (int)threadIdx.x % warp_lanes, warp = (int)threadIdx.x / warp_lanes;
  int64_t H = call.shape.hidden_size, padded = round_up(H, chunk_elements<S>), units = share.units;
  const S* hidden_weights = (const S*)call.hidden_weights[share.direction];
  bool staged = plan.mode != FASTSEQ_CUDA_DIRECT;
  S* weights = (S*)memory;                                                 // [hidden_count][units_per_block][padded]
  S* tile = weights + Cell::hidden_count * plan.units_per_block * padded;  // [tile_rows][padded]
  if (staged)
    for (int64_t line = warp; line < Cell::hidden_count * units; line += rnn_warps) {
      int64_t i = line / units, u = line % units;
      const S* source = hidden_weights + (Cell::gate_of_hidden((int)i) * H + share.first_unit + u) * H;
      for (int64_t k = lane; k < padded; k += warp_lanes)
        weights[(i * plan.units_per_block + u) * padded + k] = k < H ? source[k] : narrow<S>(Sum<S>(0));
    }

  for (int64_t position = first; position < last; ++position) {
    Step step = step_at(call.shape, share.direction == 1, position);
    int64_t end = smaller(share.last_row, step.alive);
    for (int64_t tile_first = share.first_row; tile_first < end; tile_first += plan.tile_rows) {
      int64_t count = smaller<int64_t>(plan.tile_rows, end - tile_first);
      if (staged)
        for (int64_t r = warp; r < count; r += rnn_warps) {
          const S* source = layer.hidden_before(step, tile_first + r);
          for (int64_t k = lane; k < padded; k += warp_lanes)
            tile[r * padded + k] = source && k < H ? load_fresh(source + k) : narrow<S>(Sum<S>(0));
        }
      __syncthreads();
      int64_t groups = divide_up(count, rows_at_once);
      for (int64_t item = warp; item < groups * units; item += rnn_warps) {
        int64_t group = item / units * rows_at_once, u = item % units;
        const S *unit_weights[Cell::hidden_count], *rows[rows_at_once];
#pragma unroll
        for (int i = 0; i < Cell::hidden_count; ++i)
          unit_weights[i] = staged ? weights + (i * plan.units_per_block + u) * padded
                                   : hidden_weights + (Cell::gate_of_hidden(i) * H + share.first_unit + u) * H;
#pragma unroll
        for (int r = 0; r < rows_at_once; ++r) {
          int64_t row = smaller<int64_t>(group + r, count - 1);  // past the end: the last one again, nobody reads the result
          rows[r] = staged ? tile + row * padded : layer.hidden_before(step, tile_first + row);
        }
        layer.run_unit(step, tile_first + group, count - group, share.first_unit + u, unit_weights, rows, staged ? padded : H,
                       staged, lane);
      }
      __syncthreads();
    }
    if (position + 1 < last) finish_step(barriers, position + 1 - first);
  }
}

}  // namespace
}  // namespace fastseq::cuda
