// The products of a recurrent layer on the matrix unit (split.h): what rnn_forward.h, rnn_backward.h and rnn_gradients.h call in
// place of their own, where there are rows enough. Units go in the same blocks of 32, which are one k block of the next product.
#pragma once

#include "rnn_shape.h"
#include "split.h"

namespace fastseq::FS_ISA {
namespace {

// Whether a layer's products are split. It depends on sizes alone, so that a call has the same bits whatever the threads.
template <class T, class Cell>
FS_INLINE bool rnn_is_split(const LayerSizes<T, Cell>& sizes) {
  // A step with fewer rows leaves most of a tile idle; a projection, rare as it is, has no split form.
  constexpr int64_t least_batch = 12, least_rows_per_step = 8, least_hidden = 32;
  return has_split_products<T> && !sizes.has_projection && sizes.batch >= least_batch &&
         sizes.rows >= least_rows_per_step * sizes.steps && sizes.hidden >= least_hidden;
}

// Rows of a step that go through the unit together; their sums wait in L1.
inline constexpr int64_t split_step_rows = 64;

FS_INLINE SplitRows take_split_rows(Arena& arena, int64_t rows, int64_t depth) {
  return {arena.take<uint16_t>(SplitRows::size(rows, depth)), split_blocks(depth)};
}
FS_INLINE SplitPanels take_split_panels(Arena& arena, int64_t panels, int64_t depth) {
  return {arena.take<uint16_t>(SplitPanels::size(panels * split_panel_width, depth)), split_blocks(depth)};
}

// Asks for k blocks that other cores have just written.
FS_INLINE void fetch_blocks(SplitRows matrix, int64_t rows, Range blocks) {
  constexpr int64_t line = 64 / (int64_t)sizeof(uint16_t);
  for (int64_t tile = 0; tile < row_tiles(rows); ++tile)
    for (int64_t block = blocks.begin; block < blocks.end; ++block)
      for (int64_t i = 0; i < left_block_elements; i += line) __builtin_prefetch(matrix.at(tile, block) + i, 0, 2);
}

// Zeros k blocks of all rows: what is never written must not be garbage that reads as NaN.
FS_INLINE void zero_blocks(SplitRows matrix, int64_t rows, Range blocks) {
  for (int64_t tile = 0; tile < round_up(row_tiles(rows), 2); ++tile)
    memset(matrix.at(tile, blocks.begin), 0, (size_t)(blocks.count() * left_block_elements) * sizeof(uint16_t));
}

// One direction's factors; only the float version exists, and only with a matrix unit.
template <class T>
struct SplitForward {};
template <class T>
struct SplitBackward {};

#if FS_MATRIX_UNIT

template <>
struct SplitForward<float> {
  SplitPanels input;   // [unit_blocks * input_count] panels, depth I
  SplitPanels hidden;  // [unit_blocks * hidden_count] panels, depth H
  SplitRows x;         // [chunk_capacity, I]
  SplitRows h[2];      // [B, H], the state before and after a step
  float* state;        // [B][hidden_padded], h once more for cells that read it

  template <class Cell>
  void lay_out(Arena& arena, const LayerSizes<float, Cell>& sizes, int64_t capacity) {
    input = take_split_panels(arena, sizes.unit_blocks() * Cell::input_count, sizes.input);
    hidden = take_split_panels(arena, sizes.unit_blocks() * Cell::hidden_count, sizes.hidden);
    x = take_split_rows(arena, capacity, sizes.input);
    for (auto& rows : h) rows = take_split_rows(arena, sizes.batch, sizes.hidden);
    state = arena.take<float>(sizes.batch * sizes.hidden_padded);
  }

  template <class Cell>
  void pack_block(const LayerSizes<float, Cell>& sizes, const fastseq_rnn_weights& weights, int64_t block) {
    int64_t unit = block * split_panel_width, columns = minimum(split_panel_width, sizes.hidden - unit);
    for (int i = 0; i < Cell::input_count; ++i)
      split_panel_transposed((const float*)weights.input + (Cell::gate_of_input(i) * sizes.hidden + unit) * sizes.input,
                             sizes.input, columns, sizes.input, input.at(block * Cell::input_count + i, 0));
    for (int i = 0; i < Cell::hidden_count; ++i)
      split_panel_transposed((const float*)weights.hidden + (Cell::gate_of_hidden(i) * sizes.hidden + unit) * sizes.hidden,
                             sizes.hidden, columns, sizes.hidden, hidden.at(block * Cell::hidden_count + i, 0));
  }

  void zero_states(int64_t batch, Range blocks) {
    for (auto& rows : h) zero_blocks(rows, batch, blocks);
  }
  FS_INLINE void load_state(int64_t row, int64_t column, int64_t hidden_padded, Vec<float> value) {
    for (auto& rows : h) store_split_half_row((__m512)value, split_place(rows, row, column));
    store(state + row * hidden_padded + column, value);
  }
  FS_INLINE void store_hidden(uint16_t* place, Vec<float> value) { store_split_half_row((__m512)value, place); }

  void copy_input(const float* source /* [I] */, int64_t depth, int64_t row) { split_row(source, depth, x, row); }
  void end_input(int64_t rows) {
    for (int64_t row = rows; row % split_rows; ++row) zero_split_row(x, row);
  }

  // slots[row][column_of(panel) ...] = bias + input product of a unit block.
  template <class Cell, class Column>
  void multiply_input(int64_t block, int64_t rows, float* slots, int64_t stride, const float* bias, Column column_of) {
    multiply_split(x, Range{0, row_tiles(rows)}, input, Range{block * Cell::input_count, (block + 1) * Cell::input_count},
                   [&](int64_t tile, int64_t tile_rows, int64_t panel, const float* sums) {
                     int64_t column = column_of(panel), first = tile * split_rows;
                     Vec<float> low = load(bias + column), high = load(bias + column + 16);
                     float* target = slots + first * stride + column;
                     for (int64_t row = 0; row < minimum(tile_rows, rows - first); ++row, target += stride, sums += 32) {
                       store(target, load(sums) + low);
                       store(target + 16, load(sums + 16) + high);
                     }
                   });
  }

  // sums[slot][row][32] = recurrent product of a unit block for rows [begin, end), begin a multiple of split_step_rows.
  template <class Cell>
  FS_INLINE void multiply_hidden(int before, int64_t block, Range rows, float* sums, int64_t slot_step) {
    int64_t first = rows.begin / split_rows, last = row_tiles(rows.end);
    for (int i = 0; i < Cell::hidden_count; ++i)
      for (int64_t tile = first; tile < last; tile += 2)
        multiply_split_tiles(h[before], tile, minimum(2, last - tile), hidden, block * Cell::hidden_count + i,
                             sums + (Cell::hidden_first + i) * slot_step + (tile - first) * split_rows * split_panel_width,
                             split_panel_width);
  }
};

template <>
struct SplitBackward<float> {
  SplitPanels input;   // [input panels], depth input_count * hidden_padded
  SplitPanels hidden;  // [unit_blocks], depth hidden_count * hidden_padded
  SplitRows step[2];   // [B, hidden_count * hidden_padded], a step's gradients of the pre-activations; steps take turns
  SplitRows rows;      // [capacity, input_count * hidden_padded], a chunk's
  SplitRows columns;   // [slots * hidden_padded, capacity], the same down its columns
  SplitPanels x;       // [input panels], depth capacity: the chunk's inputs
  SplitPanels h;       // [unit_blocks], depth capacity: the chunk's previous states

  template <class Cell>
  void lay_out(Arena& arena, const LayerSizes<float, Cell>& sizes, int64_t capacity, bool wants_input, bool wants_weights) {
    int64_t input_panels = (sizes.input + split_panel_width - 1) / split_panel_width, padded = sizes.hidden_padded;
    input = take_split_panels(arena, wants_input ? input_panels : 0, Cell::input_count * padded);
    hidden = take_split_panels(arena, sizes.unit_blocks(), Cell::hidden_count * padded);
    for (auto& each : step) each = take_split_rows(arena, sizes.batch, Cell::hidden_count * padded);
    rows = take_split_rows(arena, wants_input ? capacity : 0, Cell::input_count * padded);
    columns = take_split_rows(arena, wants_weights ? sizes.slots * padded : 0, capacity);
    x = take_split_panels(arena, wants_weights ? input_panels : 0, capacity);
    h = take_split_panels(arena, wants_weights ? sizes.unit_blocks() : 0, capacity);
  }

  // A panel of weights [gates * H, columns], k running over gates and padded units.
  template <class Gate>
  static void pack_weight(const float* weight, int64_t columns, int64_t hidden, int64_t padded, Gate gate_of, int64_t panel,
                          SplitPanels target) {
    for (int64_t block = 0; block < target.k_blocks; ++block) {
      int64_t gate = gate_of((int)(block * split_depth / padded)), unit = block * split_depth % padded;
      split_panel_rows([&](int64_t k) { return weight + (gate * hidden + unit + k) * columns + panel * split_panel_width; },
                       hidden - unit, columns - panel * split_panel_width, target.at(panel, block));
    }
  }

  template <class Cell>
  void zero_steps(int64_t batch, int64_t padded, Range units) {
    for (auto& each : step)
      for (int i = 0; i < Cell::hidden_count; ++i)
        zero_blocks(each, batch, Range{i * padded / split_depth + units.begin, i * padded / split_depth + units.end});
  }

  FS_INLINE void store_gradient(uint16_t* place, Vec<float> value) { store_split_half_row((__m512)value, place); }

  // carried[row][32] += the step's gradients times a panel of W_hh.
  FS_INLINE void multiply_hidden(int parity, int64_t block, int64_t alive, float* carried, int64_t stride) {
    alignas(64) float sums[2 * split_rows * split_panel_width];
    for (int64_t tile = 0; tile < row_tiles(alive); tile += 2) {
      int64_t first = tile * split_rows;
      multiply_split_tiles(step[parity], tile, minimum(2, row_tiles(alive) - tile), hidden, block, sums, split_panel_width);
      float* target = carried + first * stride;
      const float* from = sums;
      for (int64_t row = 0; row < minimum(2 * split_rows, alive - first); ++row, target += stride, from += split_panel_width)
        for (int v = 0; v < 32; v += 16) store(target + v, load(target + v) + load(from + v));
    }
  }

  // A chunk's gradients from `first` on, a k block of rows at most, split both ways.
  void split_gradients(BlockedRows<float> gradients, Range mine, int64_t rows_in_all, int64_t input_first, bool wants_input,
                       int64_t all_columns) {
    if (wants_input) {
      for (int64_t row = mine.begin; row < mine.end; ++row)
        for (int64_t block = 0; block < rows.k_blocks; ++block) {
          const float* source = gradients.at(row, input_first + block * split_depth);
          store_split_row(_mm512_loadu_ps(source), _mm512_loadu_ps(source + 16), split_place(rows, row, block * split_depth));
        }
      if (mine.end == rows_in_all)
        for (int64_t row = mine.end; row % split_rows; ++row) zero_split_row(rows, row);
    }
    for (int64_t column = 0; column < all_columns; column += split_rows)
      split_columns([&](int64_t k) { return gradients.at(mine.begin + k, column); }, mine.count(), split_rows,
                    columns.at(column / split_rows, mine.begin / split_depth));
  }

  // target[m][n] (+)= sum over the chunk's rows of gradients[row][column + m] * right[row][n], m in `mine`.
  static void weight_gradient(SplitRows left, int64_t column, Range mine, SplitPanels right, int64_t width,
                              float* target /* [*, width] */, bool first_chunk) {
    int64_t begin = (column + mine.begin) / split_rows, panels = (width + split_panel_width - 1) / split_panel_width;
    multiply_split(left, Range{begin, begin + row_tiles(mine.count())}, right, Range{0, panels},
                   [&](int64_t tile, int64_t tile_rows, int64_t panel, const float* sums) {
                     int64_t m = mine.begin + (tile - begin) * split_rows, n = panel * split_panel_width;
                     for (int64_t row = 0; row < minimum(tile_rows, mine.end - m); ++row, sums += split_panel_width)
                       for (int64_t v = 0; v < minimum(split_panel_width, width - n); v += 16) {
                         float* to = target + (m + row) * width + n + v;
                         Vec<float> value = load(sums + v);
                         if (!first_chunk) value += load_partial(to, width - n - v);
                         store_partial(to, value, width - n - v);
                       }
                   });
  }

  // grad_x[row][panel * 32 ...] = the chunk's gradients times W_ih.
  void multiply_input(Range mine, Range panels, float* grad_x, int64_t stride) {
    int64_t at_once = split_chunk_rows(rows.k_blocks);
    for (int64_t first = mine.begin; first < mine.end; first += at_once) {
      int64_t last = minimum(first + at_once, mine.end);
      multiply_split(rows, Range{first / split_rows, row_tiles(last)}, input, panels,
                     [&](int64_t tile, int64_t tile_rows, int64_t panel, const float* sums) {
                       int64_t row = tile * split_rows;
                       float* target = grad_x + row * stride + panel * split_panel_width;
                       for (int64_t i = 0; i < minimum(tile_rows, last - row); ++i, target += stride, sums += 32)
                         for (int v = 0; v < 32; v += 16) store(target + v, load(sums + v));
                     });
    }
  }
};

#endif  // FS_MATRIX_UNIT

}  // namespace
}  // namespace fastseq::FS_ISA
