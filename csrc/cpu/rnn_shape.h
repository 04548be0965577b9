// What forward and backward of a recurrent layer share: where a row of a sequence lies, how steps are grouped into chunks,
// what the reserve holds, and how threads share the directions.
#pragma once

#include "../fastseq.h"
#include "dots.h"
#include "pack.h"

namespace fastseq::FS_ISA {
namespace {

// Whether what a cell computes in the lanes beyond the last unit is to be cleared, because it may be Inf or NaN there, and the
// matrix unit multiplies those lanes with zeros. The cells of csrc/cells are finite where their slots and states are zero.
template <class Cell>
inline constexpr bool clears_pads = false;

// Sizes of one layer in kernel terms.
template <class T, class Cell>
struct LayerSizes {
  int64_t steps, batch, input, hidden, projection, directions, output, rows;
  int64_t hidden_padded, output_padded;  // rounded up to padded_multiple
  bool has_projection;
  static constexpr int64_t slots = Cell::slots;

  explicit LayerSizes(const fastseq_rnn_shape& shape)
      : steps(shape.steps),
        batch(shape.batch),
        input(shape.input_size),
        hidden(shape.hidden_size),
        projection(shape.projection_size),
        directions(shape.directions),
        output(shape.projection_size ? shape.projection_size : shape.hidden_size),
        hidden_padded(round_up(shape.hidden_size, padded_multiple)),
        has_projection(shape.projection_size > 0) {
    output_padded = round_up(output, padded_multiple);
    rows = 0;
    for (int64_t t = 0; t < steps; ++t) rows += shape.batch_sizes ? shape.batch_sizes[t] : batch;
  }

  // Rows that the large products work on at a time. Few, so that what a chunk leaves behind is still in cache when it is
  // read; but weights that fill the last-level cache are better passed over half as often.
  int64_t chunk_target_rows() const { return weight_bytes() <= (16 << 20) ? 128 : 256; }
  int64_t weight_bytes() const { return Cell::gates * hidden * (input + output) * (int64_t)sizeof(T); }
  // A call that is over in microseconds ends before a sleeping thread has been woken, and a step that small before two threads
  // have met at its barrier. Where each thread has a direction of its own there is no barrier. Weights that fill the second-level
  // cache of one core are worth a second core's: 9 us instead of 13 for one step of 512 KiB with vectors of 32 bytes.
  int useful_threads(int threads) const {
    constexpr int64_t single_thread_flops = 1 << 20, single_thread_step_flops = 80000;
    constexpr int64_t single_thread_bytes = reads_streams ? 512 << 10 : INT64_MAX;
    int64_t flops = 2 * rows * directions * Cell::gates * hidden * (input + output);
    bool meets_often = directions == 1 && flops < steps * single_thread_step_flops;
    bool short_call = flops < single_thread_flops && directions * weight_bytes() < single_thread_bytes;
    return short_call || meets_often ? 1 : threads;
  }
  // Elements per row of the slot array. The pad keeps the rows of a tile out of each other's cache sets when the slots make
  // up a power of two.
  int64_t slot_stride() const { return slot_row(hidden_padded); }
  static int64_t slot_row(int64_t padded) { return slots * padded + padded_multiple; }
  int64_t unit_blocks() const { return (hidden + panel_width<T> - 1) / panel_width<T>; }
  int64_t output_blocks() const { return (output + panel_width<T> - 1) / panel_width<T>; }
};

FS_INLINE void profile_sizes(const fastseq_rnn_shape& shape) {
  int64_t rows = 0;
  for (int64_t t = 0; t < shape.steps; ++t) rows += shape.batch_sizes ? shape.batch_sizes[t] : shape.batch;
  profile_size("T", shape.steps);
  profile_size("B", shape.batch);
  profile_size("I", shape.input_size);
  profile_size("H", shape.hidden_size);
  profile_size("P", shape.projection_size);
  profile_size("D", shape.directions);
  profile_size("rows", rows);
}

// The reserve, per direction: activated slots, cell states, (with a projection) the unprojected outputs, and the outputs: what the
// caller was given may have been changed in place by the time of backward.
template <class T, class Cell>
struct Reserve {
  T* slots;   // [rows][slots][hidden_padded], rows slot_stride() apart
  T* cells;   // [rows][hidden_padded], cells with a cell state
  T* hidden;  // [rows][hidden_padded], only with a projection
  T* output;  // [rows][output_padded]

  static int64_t direction_size(int64_t rows, int64_t hidden, int64_t projection) {
    int64_t padded = round_up(hidden, padded_multiple);
    return rows * (LayerSizes<T, Cell>::slot_row(padded) + ((Cell::has_cell ? 1 : 0) + (projection ? 1 : 0)) * padded +
                   round_up(projection ? projection : hidden, padded_multiple));
  }
  Reserve(T* base, const LayerSizes<T, Cell>& sizes, int64_t direction) {
    base += direction * direction_size(sizes.rows, sizes.hidden, sizes.projection);
    slots = base;
    cells = slots + sizes.rows * sizes.slot_stride();
    hidden = cells + (Cell::has_cell ? sizes.rows * sizes.hidden_padded : 0);
    output = hidden + (sizes.has_projection ? sizes.rows * sizes.hidden_padded : 0);
  }
};

// Rows alive per step and their place in the packed order of rows (step after step).
struct StepTable {
  const fastseq_rnn_shape* shape;
  int64_t* first_row;  // [T + 1]

  void fill() const {
    first_row[0] = 0;
    for (int64_t t = 0; t < shape->steps; ++t)
      first_row[t + 1] = first_row[t] + (shape->batch_sizes ? shape->batch_sizes[t] : shape->batch);
  }
  FS_INLINE int64_t alive(int64_t t) const { return t >= 0 && t < shape->steps ? first_row[t + 1] - first_row[t] : 0; }
  FS_INLINE int64_t batch_index(int64_t row) const { return shape->row_order ? shape->row_order[row] : row; }
};

// A user's sequence tensor, addressed by step and sorted row.
template <class T>
struct Sequence {
  T* data;
  int64_t step_stride, row_stride;
  const StepTable* table;

  Sequence(const fastseq_sequence& sequence, const StepTable& table)
      : data((T*)sequence.data), step_stride(sequence.step_stride), row_stride(sequence.row_stride), table(&table) {}
  FS_INLINE T* at(int64_t t, int64_t row) const {
    if (table->shape->packed) return data + (table->first_row[t] + row) * row_stride;
    return data + t * step_stride + table->batch_index(row) * row_stride;
  }
};

// The order in which a direction visits the steps, and the chunks that its large products are cut into.
struct Walkway {
  int64_t steps;
  bool reverse;
  FS_INLINE int64_t step(int64_t position) const { return reverse ? steps - 1 - position : position; }
};

// The positions [begin, end) of a walk whose rows together reach `target_rows` (or the end), and how many rows that is.
struct Chunk {
  int64_t begin, end, rows;
};
FS_INLINE Chunk next_chunk(const StepTable& table, Walkway walk, int64_t begin, int64_t target_rows) {
  Chunk chunk{begin, begin, 0};
  while (chunk.end < walk.steps && chunk.rows < target_rows) chunk.rows += table.alive(walk.step(chunk.end++));
  return chunk;
}
// An upper bound on the rows of any chunk.
FS_INLINE int64_t chunk_capacity(int64_t total_rows, int64_t batch, int64_t target_rows) {
  return minimum(total_rows, target_rows - 1 + batch);
}

// Threads of one direction: with two directions and two or more threads each direction has its own half and no barrier is
// shared between them; otherwise the whole team takes the directions one after the other.
struct DirectionTeams {
  bool side_by_side;
  Team team;
  int64_t first, last;  // directions this thread works on

  DirectionTeams(int64_t directions, int rank, int size, Barrier* barriers /* [2] */) {
    side_by_side = directions == 2 && size >= 2;
    if (side_by_side) {
      int half = size / 2;
      bool second = rank >= half;
      team = Team{second ? rank - half : rank, second ? size - half : half, &barriers[second]};
      first = second;
      last = first + 1;
    } else {
      team = Team{rank, size, &barriers[0]};
      first = 0;
      last = directions;
    }
  }
};

// Asks for columns [columns.begin, columns.end) of some rows that other cores have just written. Fetched one by one as the
// product comes to them, each line would cost a round trip between cores; asked for together they overlap.
template <class T>
FS_INLINE void fetch_columns(BlockedRows<T> matrix, int64_t first_row, int64_t rows, Range columns) {
  constexpr int64_t line = 64 / (int64_t)sizeof(T);
  for (int64_t k = columns.begin; k < columns.end; k += line)
    for (int64_t row = 0; row < rows; ++row) __builtin_prefetch(matrix.at(first_row + row, k), 0, 2);
}

// Fills the pad of the last vector so that what runs beyond the hidden size stays zero even next to Inf and NaN.
template <class T>
FS_INLINE Vec<T> keep_lanes(Vec<T> value, int64_t count) {
  if (count >= lanes<T>) return value;
  for (int64_t i = maximum(count, 0); i < lanes<T>; ++i) value[i] = 0;
  return value;
}

}  // namespace
}  // namespace fastseq::FS_ISA
