// The products of a recurrent step with the weights as they lie, for a single row (batch 1, or a handful of rows in all): packing
// them would cost more than it saves.
#pragma once

#include "rnn_shape.h"

namespace fastseq::FS_ISA {
namespace {

// Which weights of a layer are read as they lie, and in what way.
template <class T, class Cell>
struct DirectPlan {
  // Up to so many rows in all, reading the weights as they lie costs less than packing them first. The larger number holds where they
  // are read in streams, no cache of a core holds them, and a step has more than one row.
  static constexpr int64_t few_rows = 4, most_rows = reads_streams ? 24 : few_rows;
  // Weights of a step that a second-level cache holds beside all else, and those that it never holds.
  static constexpr int64_t cached_bytes = 256 << 10, uncached_bytes = 1 << 20;

  bool input, hidden;  // W_ih, W_hh (and W_hr, which goes with it)
  bool streams;        // the weights are read in streams

  explicit DirectPlan(const LayerSizes<T, Cell>& sizes) {
    const bool may_stream = reads_streams && !sizes.has_projection;
    const bool many_rows = may_stream && sizes.batch > 1 && step_bytes(sizes, true) > uncached_bytes;
    input = sizes.rows <= (many_rows ? most_rows : few_rows);
    hidden = input || (sizes.batch == 1 && !worth_packing(sizes));
    streams = reads_streams && hidden && step_bytes(sizes, input) > cached_bytes;
  }

  // Of the weights that one step reads.
  static int64_t step_bytes(const LayerSizes<T, Cell>& sizes, bool with_input) {
    return Cell::gates * sizes.hidden * (sizes.output + (with_input ? sizes.input : 0)) * (int64_t)sizeof(T);
  }

  // Whether a single row has steps enough to win back what packing W_hh takes. Vectors of 64 bytes run down the rows of W as fast
  // as down panels; with shorter ones, preparing the rows and adding up lanes is much of the work at small sizes.
  static bool worth_packing(const LayerSizes<T, Cell>& sizes) {
    constexpr int64_t bytes_of_a_step = 160 << 10, least_steps = 12;  // 12 steps at H 64, 18 at 256, 37 at 512 (AVX2)
    int64_t bytes = Cell::hidden_count * sizes.hidden * sizes.output * (int64_t)sizeof(T);
    return FS_VECTOR_BYTES < 64 && sizes.steps >= least_steps + bytes / bytes_of_a_step;
  }
};

// Pre-activations of one step, for the units of one thread.
template <class T, class Cell>
struct DirectProducts {
  using V = Vec<T>;
  static constexpr int64_t L = lanes<T>, most_rows = DirectPlan<T, Cell>::most_rows;

  const LayerSizes<T, Cell>& sizes;
  const DirectPlan<T, Cell>& plan;
  const fastseq_rnn_weights& weights;
  const T* bias;  // [slots][hidden_padded]
  T* sums;        // [slots][most_rows][hidden_padded], where weights are read in streams
  T* plain;       // [most_rows][I or R, the larger], likewise: inputs or states one row after the other

  static int64_t sums_size(const LayerSizes<T, Cell>& sizes) { return sizes.slots * most_rows * sizes.hidden_padded; }
  static int64_t plain_size(const LayerSizes<T, Cell>& sizes) { return most_rows * maximum(sizes.input, sizes.output); }

  static constexpr bool is_input(int s) { return s >= Cell::input_first && s < Cell::input_first + Cell::input_count; }
  static constexpr bool is_hidden(int s) { return s >= Cell::hidden_first && s < Cell::hidden_first + Cell::hidden_count; }

  // First of W's rows that belong to slot s of a unit.
  FS_INLINE const T* input_weights(int s, int64_t unit) const {
    return (const T*)weights.input + (Cell::gate_of_input(s - Cell::input_first) * sizes.hidden + unit) * sizes.input;
  }
  FS_INLINE const T* hidden_weights(int s, int64_t unit) const {
    return (const T*)weights.hidden + (Cell::gate_of_hidden(s - Cell::hidden_first) * sizes.hidden + unit) * sizes.output;
  }
  // Where the sum of slot s starts: at the input product (slots, [slots][hidden_padded]) if there is one, else at the bias.
  FS_INLINE const T* start_of(int s, const T* slots) const {
    return (is_input(s) && !plan.input ? slots : bias) + s * sizes.hidden_padded;
  }

  // A vector of units of one row.
  FS_INLINE void multiply_row(V (&slot)[Cell::slots], int64_t unit, int64_t count, const T* slots, const T* x,
                              BlockedRow<T> h) const {
    for (int s = 0; s < Cell::slots; ++s) {
      slot[s] = load(start_of(s, slots) + unit);
      if (is_input(s) && plan.input)
        slot[s] = dot_rows(input_weights(s, unit), minimum(L, count), plain_row<T>(x), sizes.input, slot[s]);
      if (is_hidden(s)) slot[s] = dot_rows(hidden_weights(s, unit), minimum(L, count), h, sizes.output, slot[s]);
    }
  }

  FS_INLINE T* sums_at(int s, int64_t row, int64_t unit) const {
    return sums + (s * most_rows + row) * sizes.hidden_padded + unit;
  }

  // All units [first, first + count) of a few rows, left in `sums`. slots_of(row), input_of(row) and state_of(row) are where a row's
  // input products, its x and its h_{t-1} lie.
  template <class Slots, class Input, class State>
  void multiply_rows(int64_t unit, int64_t count, int64_t rows, Slots slots_of, Input input_of, State state_of) const {
    if (count <= 0) return;
    for (int64_t row = 0; row < rows; ++row) {
      const T* slots = slots_of(row);
      for (int s = 0; s < Cell::slots; ++s) copy_row(start_of(s, slots) + unit, round_up(count, L), sums_at(s, row, unit));
    }
    auto add_product = [&](int s, const T* w, int64_t depth) FS_LAMBDA_INLINE {
      RowStreams<T>::multiply(w, depth, count, depth, plain, depth, rows, sums_at(s, 0, unit), sizes.hidden_padded, true);
    };
    if (plan.input) {
      for (int64_t row = 0; row < rows; ++row) copy_row((const T*)input_of(row), sizes.input, plain + row * sizes.input);
      for (int s = 0; s < Cell::slots; ++s)
        if (is_input(s)) add_product(s, input_weights(s, unit), sizes.input);
    }
    for (int64_t row = 0; row < rows; ++row) copy_blocks(state_of(row), plain + row * sizes.output);
    for (int s = 0; s < Cell::slots; ++s)
      if (is_hidden(s)) add_product(s, hidden_weights(s, unit), sizes.output);
  }

  FS_INLINE void copy_blocks(BlockedRow<T> h, T* target /* [R] */) const {
    for (int64_t k = 0; k < sizes.output; k += block_depth<T>, h.data += h.block_step)
      copy_row(h.data, minimum(block_depth<T>, sizes.output - k), target + k);
  }
};

}  // namespace
}  // namespace fastseq::FS_ISA
