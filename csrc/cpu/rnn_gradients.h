// The large products at the end of a chunk of backward: the weights' gradients, from the chunk's gradients of the
// pre-activations and the inputs and states they were computed from, and the input's gradient.
#pragma once

#include "rnn_split.h"

namespace fastseq::FS_ISA {
namespace {

// Who takes what of a chunk's products. One set is in use while the other, which no thread looks at any more, is made ready
// for the next chunk.
struct ChunkQueues {
  RangeQueue weights[9];  // up to four gates of input and hidden each, and the projection
  WorkQueue inputs;
};

// One direction's scratch memory; W is panel_width.
template <class T>
struct BackwardBuffers {
  T* packed_input;             // [input panels][input_count * hidden_padded][W], for the input's gradient; or transposed
  T* packed_hidden;            // [output_blocks][hidden_count * hidden_padded][W]
  T* packed_projection;        // [unit_blocks][P][W]
  T* grad_h;                   // [B][output_padded], carried from step to step
  T* grad_cell;                // [B][hidden_padded]
  BlockedRows<T> grad_slots;   // [capacity, slots * hidden_padded]
  BlockedRows<T> grad_output;  // [capacity, P], only with a projection: dL/dh in all
  const T** x_rows;            // [capacity] where the chunk's rows lie
  const T** h_rows;            // [capacity] h_{t-1}; NULL for zeros
  T* x_panels;                 // [input panels][capacity][W], the chunk's inputs as the right factor of a weight gradient
  T* h_panels;                 // [output_blocks][capacity][W]
  T* hidden_panels;            // [unit_blocks][capacity][W], with a projection
  T* grad_x;                   // [capacity][input_padded]
  T* grad_x_rows;              // [rows][I], second direction when both run side by side
  SplitBackward<T> split;      // the factors for the matrix unit; the panels above are empty then, but for a projection's
  StealingQueue* steps;        // [threads], output blocks of a step
  ChunkQueues* chunks;         // [2]
};

// to[i] += from[i].
template <class T>
FS_INLINE void add_row(const T* from /* [count] */, T* to /* [count] */, int64_t count) {
  constexpr int L = lanes<T>;
  for (int64_t i = 0; i < count; i += L)
    store_partial(to + i, load_partial(to + i, count - i) + load_partial(from + i, count - i), count - i);
}

// So few inputs that the product for their gradient would mostly multiply the empty columns of a panel: it runs along the rows of
// W_ih transposed instead, which loses fewer digits, too.
template <class T, class Cell>
FS_INLINE bool has_few_inputs(const LayerSizes<T, Cell>& sizes, bool is_split) {
  return reads_streams && !is_split && sizes.input <= RowStreams<T>::streams;
}

// One thread's share of one direction's products.
template <class T, class Cell>
struct ChunkGradients {
  using V = Vec<T>;
  static constexpr int64_t W = panel_width<T>, L = lanes<T>;

  const LayerSizes<T, Cell>& sizes;
  const StepTable& table;
  BackwardBuffers<T>& b;
  const fastseq_rnn_weight_gradients& grads;
  Sequence<T> x, grad_x;
  T* unprojected;  // [rows][hidden_padded] of the reserve, with a projection
  Walkway walk;
  Team team;
  Range units, outputs;  // blocks of this thread
  int64_t input_panels, input_padded;
  bool adds_to_grad_x;  // another direction has written it
  bool is_split;
  int64_t chunks = 0;  // done so far

  // h_before(t, row) is where h_{t-1} of a row lies, NULL for zeros.
  template <class Before>
  void note_rows(Chunk chunk, int64_t chunk_first, Before h_before) {
    Range mine = split(chunk.end - chunk.begin, team.size, team.rank);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      int64_t t = walk.step(chunk.begin + i);
      for (int64_t row = 0; row < table.alive(t); ++row) {
        int64_t local = table.first_row[t] - chunk_first + row;
        b.x_rows[local] = x.at(t, row);
        b.h_rows[local] = h_before(t, row);
        if (sizes.has_projection && grads.projection) note_hidden(table.first_row[t] + row, local);
      }
    }
  }
  // The unprojected outputs lie in the reserve already; their panels are filled row by row.
  void note_hidden(int64_t packed_row, int64_t local) {
    const T* source = unprojected + packed_row * sizes.hidden_padded;
    for (int64_t block = 0; block < sizes.unit_blocks(); ++block)
      for (int64_t v = 0; v < 2; ++v) {
        int64_t unit = block * W + v * L;
        store(b.hidden_panels + (block * b.grad_slots.rows + local) * W + v * L,
              load_partial(source + unit, maximum(0, sizes.hidden - unit)));
      }
  }

  // Inputs and previous states of the chunk as panels; the whole team packs, everyone reads.
  void pack_right_factors(int64_t rows) {
    if constexpr (has_split_products<T>)
      if (is_split) return split_factors(rows);
    auto pack = [&](const T* const* source, int64_t width, T* panels) {
      Range mine = split((width + W - 1) / W, team.size, team.rank);
      for (int64_t panel = mine.begin; panel < mine.end; ++panel)
        pack_rows<T>([&](int64_t k) { return source[k] ? source[k] + panel * W : nullptr; }, width - panel * W, rows,
                     panels + panel * b.grad_slots.rows * W);
    };
    if (grads.input) pack(b.x_rows, sizes.input, b.x_panels);
    if (grads.hidden) pack(b.h_rows, sizes.output, b.h_panels);
  }

  // The same for the matrix unit: panels, and the gradients of the pre-activations as left factors.
  void split_factors(int64_t rows) {
    int64_t blocks = split_blocks(rows);
    auto pack = [&](const T* const* source, int64_t width, auto& panels) {
      panels.k_blocks = blocks;
      Range mine = split((width + W - 1) / W, team.size, team.rank);
      for (int64_t panel = mine.begin; panel < mine.end; ++panel)
        for (int64_t block = 0; block < blocks; ++block)
          split_panel_rows(
              [&](int64_t k) {
                const T* row = source[block * split_depth + k];
                return row ? row + panel * W : nullptr;
              },
              rows - block * split_depth, width - panel * W, panels.at(panel, block));
    };
    auto factors = b.split;
    if (grads.input) pack(b.x_rows, sizes.input, factors.x);
    if (grads.hidden) pack(b.h_rows, sizes.output, factors.h);
    factors.columns.k_blocks = blocks;
    bool wants_weights = grads.input || grads.hidden;
    Range mine = split(blocks, team.size, team.rank);
    for (int64_t block = mine.begin; block < mine.end; ++block)
      factors.split_gradients(b.grad_slots, Range{block * split_depth, minimum((block + 1) * split_depth, rows)}, rows,
                              Cell::input_first * sizes.hidden_padded, grad_x.data != nullptr,
                              wants_weights ? sizes.slots * sizes.hidden_padded : 0);
  }

  // Before the first chunk, and before a barrier.
  void reset_queues() {
    if (team.rank == 0) b.chunks[0] = b.chunks[1] = ChunkQueues{};
  }
  ChunkQueues& queues() const { return b.chunks[chunks % 2]; }
  // Between two barriers, the second of which ends the chunk.
  void prepare_next_queues() {
    if (team.rank == 0) b.chunks[(chunks + 1) % 2] = ChunkQueues{};
  }

  void weight_gradients(int64_t rows, bool first_chunk) {
    RangeQueue* queue = queues().weights;
    for (int i = 0; i < Cell::input_count; ++i, ++queue) {
      int64_t column = (Cell::input_first + i) * sizes.hidden_padded, gate = Cell::gate_of_input(i);
      for (Range mine; (mine = next_columns(*queue, sizes.hidden)).count();) {
        if (grads.input)
          weight_gradient(column, mine, rows, b.x_panels, sizes.input, (T*)grads.input + gate * sizes.hidden * sizes.input,
                          first_chunk);
        if (grads.input_bias) bias_gradient(column, mine, rows, (T*)grads.input_bias + gate * sizes.hidden, first_chunk);
      }
    }
    for (int i = 0; i < Cell::hidden_count; ++i, ++queue) {
      int64_t column = (Cell::hidden_first + i) * sizes.hidden_padded, gate = Cell::gate_of_hidden(i);
      for (Range mine; (mine = next_columns(*queue, sizes.hidden)).count();) {
        if (grads.hidden)
          weight_gradient(column, mine, rows, b.h_panels, sizes.output, (T*)grads.hidden + gate * sizes.hidden * sizes.output,
                          first_chunk);
        if (grads.hidden_bias) bias_gradient(column, mine, rows, (T*)grads.hidden_bias + gate * sizes.hidden, first_chunk);
      }
    }
    for (Range mine; grads.projection && (mine = next_columns(*queue, sizes.output)).count();)
      weight_gradient(b.grad_output, 0, mine, rows, b.hidden_panels, sizes.hidden, (T*)grads.projection, first_chunk);
  }
  Range next_columns(RangeQueue& queue, int64_t count) const { return queue.take(count, W, 2 * W, count, team.size); }

  // Of the pre-activations' gradients and the chunk's inputs or, with the panels of those, its states.
  void weight_gradient(int64_t column, Range mine, int64_t rows, const T* panels, int64_t width, T* target, bool first_chunk) {
    if constexpr (has_split_products<T>)
      if (is_split) {
        auto factors = b.split;
        factors.columns.k_blocks = factors.x.k_blocks = factors.h.k_blocks = split_blocks(rows);
        return factors.weight_gradient(factors.columns, column, mine, panels == b.x_panels ? factors.x : factors.h, width,
                                       target, first_chunk);
      }
    weight_gradient(b.grad_slots, column, mine, rows, panels, width, target, first_chunk);
  }

  // target[m][n] (+)= sum over the chunk's rows of left[row][column + m] * right[row][n], m in `mine`.
  void weight_gradient(BlockedRows<T> left, int64_t column, Range mine, int64_t rows,
                       const T* panels /* [panel][capacity][W] */, int64_t width, T* target /* [*, width] */,
                       bool first_chunk) {
    alignas(64) static constexpr T zeros[W] = {};
    constexpr int64_t depth = longest_sum<T>;
    // A copy of the tile's columns, side by side: in their own place they lie a row of all slots apart, a page for every second.
    alignas(64) T tile[depth * FS_TILE_ROWS + L];  // [depth][FS_TILE_ROWS], and what the last whole vector runs over into
    // Panels that stay in the second-level cache while every tile of columns passes them; a group of them reads `left` once.
    int64_t group = maximum(1, (448 << 10) / (sizes.chunk_target_rows() * W * (int64_t)sizeof(T)));
    int64_t panel_count = (width + W - 1) / W;
    int64_t parts = (rows + depth - 1) / depth;
    for (int64_t first = 0; first < panel_count; first += group) {
      int64_t last = minimum(first + group, panel_count);
      for (int64_t m = mine.begin; m < mine.end;) {
        // A tile's columns of `left` are neighbours in memory only within a block.
        int64_t k = column + m;
        int64_t segment = minimum(mine.end - m, block_depth<T> - k % block_depth<T>);
        int64_t tiles = tile_count(segment);
        EvenSplit tile_rows(segment, tiles);
        for (int64_t i = 0; i < tiles; ++i) {
          Range part = tile_rows.part(i);
          for (int64_t j = 0; j < parts; ++j) {
            Range terms = split(rows, parts, j);
            bool starts = first_chunk && j == 0;
            const T* a = left.at(terms.begin, k + part.begin);
            for (int64_t row = 0; row < terms.count(); ++row) {
              const T* from = a + row * block_stride<T>;
              T* to = tile + row * FS_TILE_ROWS;
              for (int64_t v = 0; v < FS_TILE_ROWS; v += L) store(to + v, load(from + v));
            }
            for (int64_t p = first; p < last; ++p) {
              T* c = target + (m + part.begin) * width + p * W;
              const T* panel = panels + (p * left.rows + terms.begin) * W;
              if (width - p * W >= W)
                run_tile<T, Walk::interleaved>(part.count(), tile, panel, terms.count(), starts ? zeros : c, starts ? 0 : width,
                                               c, width);
              else
                edge_tile(part.count(), tile, panel, terms.count(), c, width, width - p * W, starts);
            }
          }
        }
        m += segment;
      }
    }
  }

  // The last, narrower panel goes through a full tile of its own.
  FS_NOINLINE void edge_tile(int64_t tile_rows, const T* a, const T* panel, int64_t depth, T* c, int64_t c_stride,
                             int64_t columns, bool first_chunk) {
    alignas(64) T full[FS_TILE_ROWS * W] = {};  // [row][W]
    for (int64_t r = 0; r < tile_rows && !first_chunk; ++r) memcpy(full + r * W, c + r * c_stride, (size_t)columns * sizeof(T));
    run_tile<T, Walk::interleaved>(tile_rows, a, panel, depth, full, W, full, W);
    for (int64_t r = 0; r < tile_rows; ++r) memcpy(c + r * c_stride, full + r * W, (size_t)columns * sizeof(T));
  }

  void bias_gradient(int64_t column, Range mine, int64_t rows, T* target /* [H] */, bool first_chunk) {
    for (int64_t m = mine.begin; m < mine.end; m += L) {
      // Sums of sixteen rows, then the sum of those: one running sum over a chunk loses digits.
      V sum{};
      for (int64_t first = 0; first < rows; first += 16) {
        V part{};
        for (int64_t row = first; row < minimum(first + 16, rows); ++row) part += load(b.grad_slots.at(row, column + m));
        sum += part;
      }
      int64_t count = mine.end - m;
      store_partial(target + m, first_chunk ? sum : load_partial(target + m, count) + sum, count);
    }
  }

  // grad_x = grad_slots * W_ih for the rows of the chunk. Columns are shared out, so that the weights are read once; few
  // columns leave no choice but rows.
  void input_gradient(Chunk chunk, int64_t chunk_first) {
    if (input_panels < 2 * team.size) {
      Range blocks = split((chunk.rows + row_unit - 1) / row_unit, team.size, team.rank);
      input_gradient(chunk, chunk_first,
                     Range{minimum(blocks.begin * row_unit, chunk.rows), minimum(blocks.end * row_unit, chunk.rows)},
                     Range{0, input_panels});
      return;
    }
    int64_t runs = minimum(input_panels, 4 * team.size);
    for (int64_t run; (run = queues().inputs.take()) < runs;)
      input_gradient(chunk, chunk_first, Range{0, chunk.rows}, split(input_panels, runs, run));
  }

  static constexpr int64_t row_unit = has_split_products<T> ? 32 : 1;  // rows that stay with one thread

  void input_product(Range mine, Range panels) {
    alignas(64) static constexpr T zeros[W] = {};
    int64_t stride = input_padded;
    if constexpr (has_split_products<T>)
      if (is_split) return b.split.multiply_input(mine, panels, b.grad_x, stride);
    if (has_few_inputs(sizes, is_split)) {
      constexpr int64_t first = Cell::input_first, count = Cell::input_count;
      const int64_t depth = count * sizes.hidden_padded;
      for (int64_t done = 0, step; done < depth; done += step) {
        int64_t k = first * sizes.hidden_padded + done;
        step = minimum(depth - done, block_depth<T> - k % block_depth<T>);
        RowStreams<T>::template multiply<true>(b.packed_input + done, depth, sizes.input, step, b.grad_slots.at(mine.begin, k),
                                               block_stride<T>, mine.count(), b.grad_x + mine.begin * stride, stride, done > 0);
      }
      return;
    }
    multiply_blocked<T>(
        [&](int64_t row, int64_t, int64_t k, int64_t) { return b.grad_slots.at(row, k); }, mine,
        Cell::input_first * sizes.hidden_padded, Cell::input_count * sizes.hidden_padded, b.packed_input, panels,
        [&](int64_t row, int64_t panel) { return TilePlace<T>{b.grad_x + row * stride + panel * W, stride, zeros, 0}; },
        [](int64_t, int64_t, int64_t) {});
  }

  void input_gradient(Chunk chunk, int64_t chunk_first, Range mine, Range panels) {
    int64_t stride = input_padded;
    input_product(mine, panels);
    int64_t column = panels.begin * W, count = minimum(panels.end * W, sizes.input) - column;
    for (int64_t position = chunk.begin; position < chunk.end; ++position) {
      int64_t t = walk.step(position), local = table.first_row[t] - chunk_first;
      for (int64_t row = maximum(0, mine.begin - local); row < minimum(table.alive(t), mine.end - local); ++row) {
        const T* source = b.grad_x + (local + row) * stride + column;
        T* target = b.grad_x_rows ? b.grad_x_rows + (table.first_row[t] + row) * sizes.input : grad_x.at(t, row);
        if (adds_to_grad_x)
          add_row(source, target + column, count);
        else
          memcpy(target + column, source, (size_t)count * sizeof(T));
      }
    }
  }

  void zero_weight_gradients() {
    auto zero = [](void* target, int64_t count) {
      if (target) memset(target, 0, (size_t)count * sizeof(T));
    };
    int64_t input_rows = Cell::input_count * sizes.hidden, hidden_rows = Cell::hidden_count * sizes.hidden;
    zero(grads.input, input_rows * sizes.input);
    zero(grads.hidden, hidden_rows * sizes.output);
    zero(grads.input_bias, input_rows);
    zero(grads.hidden_bias, hidden_rows);
    zero(grads.projection, sizes.projection * sizes.hidden);
  }
};

}  // namespace
}  // namespace fastseq::FS_ISA
