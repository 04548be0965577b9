// Recurrent backward: the gradients of all pre-activations, step by step from the last. A block owns hidden units as forward
// does, with the columns of W_hh that lead back to them; a warp computes dL/dh of four units of four rows, then lanes take one
// cell each. Gradients of weights, biases and input are products of what this leaves behind.
#pragma once

#include "rnn_shape.cuh"

namespace fastseq::cuda {
namespace {

constexpr int units_at_once = 4;

template <class Cell, class S>
struct RnnBackward {
  using A = Sum<S>;
  static constexpr int J = Cell::hidden_count;  // pieces of H that W_hh was multiplied to
  const fastseq_cuda_rnn_backward& call;
  int direction;
  int64_t H;

  FS_INLINE RnnBackward(const fastseq_cuda_rnn_backward& call, int direction)
      : call(call), direction(direction), H(call.shape.hidden_size) {}

  FS_INLINE int64_t output_row(int64_t row) const { return (row * call.shape.directions + direction) * H; }
  FS_INLINE int64_t state_row(int64_t row) const { return (direction * call.shape.batch + row) * H; }
  // Gradients of the pre-activations of a row of the next step, in multiples of H as place_of_slot says.
  FS_INLINE const S* next_gradients(const Step& step, int64_t row) const {
    return (const S*)call.slot_gradients[direction] + (step.next_first + row) * Cell::slots * H;
  }
  FS_INLINE const S* transposed_row(int64_t unit) const {
    return (const S*)call.transposed_weights[direction] + unit * Cell::gates * H;
  }

  // One unit of one row; from_next: the gradient of h that came through W_hh from the next step.
  FS_INLINE void update(const Step& step, int64_t row, int64_t unit, A from_next) const {
    bool goes_on = row < step.next_alive;
    int64_t state = state_row(row) + unit, all_rows = step.first_row + row;
    A grad_h = zero_without<S>(call.grad_output, output_row(all_rows) + unit);
    grad_h += goes_on ? from_next + ((const A*)call.direct)[state] : zero_without<S>(call.grad_final_hidden, state);
    A slot[Cell::slots], h_previous, c_previous = 0, c = 0, grad_c = 0, direct;
    const S* saved = (const S*)call.slots[direction] + all_rows * Cell::slots * H + unit;
#pragma unroll
    for (int s = 0; s < Cell::slots; ++s) slot[s] = widen(saved[place_of_slot<Cell>(s) * H]);
    bool begins = row >= step.previous_alive;
    h_previous = begins ? zero_without<S>(call.initial_hidden, state)
                        : widen(((const S*)call.output)[output_row(step.previous_first + row) + unit]);
    if constexpr (Cell::has_cell) {
      const A* cells = (const A*)call.cells[direction] + unit;
      c = cells[all_rows * H];
      c_previous = begins ? zero_without<S>(call.initial_cell, state) : cells[(step.previous_first + row) * H];
      grad_c = goes_on ? ((const A*)call.grad_cell)[state] : zero_without<S>(call.grad_final_cell, state);
    }
    Cell::template backward<Math<A>>(slot, h_previous, c_previous, c, grad_h, grad_c, direct);
    S* gradients = (S*)call.slot_gradients[direction] + all_rows * Cell::slots * H + unit;
#pragma unroll
    for (int s = 0; s < Cell::slots; ++s) gradients[place_of_slot<Cell>(s) * H] = narrow<S>(slot[s]);
    ((A*)call.direct)[state] = direct;
    if constexpr (Cell::has_cell) ((A*)call.grad_cell)[state] = grad_c;
  }
};

// Steps [first, last) counted from the end of the direction's way.
template <class Cell, class S>
__global__ void __launch_bounds__(rnn_threads, 1) rnn_backward_kernel(fastseq_cuda_rnn_backward call, fastseq_cuda_plan plan,
                                                                      int64_t first, int64_t last, uint32_t* barriers) {
  using A = Sum<S>;
  FS_DYNAMIC_SHARED(memory);
  Share share(call.shape, plan);
  RnnBackward<Cell, S> layer(call, share.direction);
  constexpr int J = RnnBackward<Cell, S>::J;
  int lane = (int)threadIdx.x % warp_lanes, warp = (int)threadIdx.x / warp_lanes;
  int64_t H = call.shape.hidden_size, padded = round_up(J * H, chunk_elements<S>), units = share.units;
  bool staged = plan.mode != FASTSEQ_CUDA_DIRECT;
  S* weights = (S*)memory;                            // [units_per_block][padded]
  S* tile = weights + plan.units_per_block * padded;  // [tile_rows][padded]
  S zero = narrow<S>(A(0));
  if (staged)
    for (int64_t u = warp; u < units; u += rnn_warps) {
      const S* source = layer.transposed_row(share.first_unit + u);
      S* target = weights + u * padded;
      for (int j = 0; j < J; ++j)
        for (int64_t k = lane; k < H; k += warp_lanes) target[j * H + k] = source[Cell::gate_of_hidden(j) * H + k];
      for (int64_t k = J * H + lane; k < padded; k += warp_lanes) target[k] = zero;
    }

  for (int64_t position = first; position < last; ++position) {
    Step step = step_at(call.shape, share.direction == 1, call.shape.steps - 1 - position);
    int64_t end = smaller(share.last_row, step.alive);
    for (int64_t tile_first = share.first_row; tile_first < end; tile_first += plan.tile_rows) {
      int64_t count = smaller<int64_t>(plan.tile_rows, end - tile_first);
      // Rows that go on to the next step come first; the others have no gradient from there.
      int64_t going_on = larger<int64_t>(0, smaller(count, step.next_alive - tile_first));
      if (staged)
        for (int64_t r = warp; r < going_on; r += rnn_warps) {
          const S* source = layer.next_gradients(step, tile_first + r);
          S* target = tile + r * padded;
          for (int j = 0; j < J; ++j)
            for (int64_t k = lane; k < H; k += warp_lanes)
              target[j * H + k] = load_fresh(source + place_of_slot<Cell>(Cell::hidden_first + j) * H + k);
          for (int64_t k = J * H + lane; k < padded; k += warp_lanes) target[k] = zero;
        }
      __syncthreads();
      int64_t row_groups = divide_up(count, rows_at_once), unit_groups = divide_up(units, units_at_once);
      for (int64_t item = warp; item < row_groups * unit_groups; item += rnn_warps) {
        int64_t row_group = item / unit_groups * rows_at_once, unit_group = item % unit_groups * units_at_once;
        A sums[units_at_once][rows_at_once] = {}, from_next = 0;
        if (row_group < going_on) {
          // Past the end: the last row or unit again, nobody reads the result.
          const S *unit_weights[units_at_once], *rows[rows_at_once];
#pragma unroll
          for (int n = 0; n < units_at_once; ++n) {
            int64_t u = smaller<int64_t>(unit_group + n, units - 1);
            unit_weights[n] = staged ? weights + u * padded : layer.transposed_row(share.first_unit + u);
          }
#pragma unroll
          for (int r = 0; r < rows_at_once; ++r) {
            int64_t row = smaller<int64_t>(row_group + r, going_on - 1);
            rows[r] = staged ? tile + row * padded : layer.next_gradients(step, tile_first + row);
          }
          if (staged) {
            multiply_rows(unit_weights, rows, padded, lane, sums);
          } else {
            for (int j = 0; j < J; ++j)
              for (int64_t k = lane; k < H; k += warp_lanes) {
                int64_t left = place_of_slot<Cell>(Cell::hidden_first + j) * H + k, right = Cell::gate_of_hidden(j) * H + k;
#pragma unroll
                for (int r = 0; r < rows_at_once; ++r) {
                  A gradient = widen(load_fresh(rows[r] + left));
#pragma unroll
                  for (int n = 0; n < units_at_once; ++n)
                    sums[n][r] = multiply_add(widen(unit_weights[n][right]), gradient, sums[n][r]);
                }
              }
          }
          from_next = add_lanes(sums, lane);
        }
        // Sums arrive in pairs of lanes: the first of each takes the cell.
        static_assert(sums_per_warp<units_at_once> == warp_lanes / 2);
        int r = lane / 2 % rows_at_once, n = lane / 2 / rows_at_once;
        if (lane % 2 == 0 && unit_group + n < units && row_group + r < count)
          layer.update(step, tile_first + row_group + r, share.first_unit + unit_group + n, from_next);
      }
      __syncthreads();
    }
    if (position + 1 < last) finish_step(barriers, position + 1 - first);
  }
}

}  // namespace
}  // namespace fastseq::cuda
