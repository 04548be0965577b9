// A linear layer backward. With the gradient of the pre-activation dz = dropout(dy) * activation'(z):
//   grad_x = dz W,  grad_weight = dz^T x,  grad_bias = column sums of dz.
//
// Rows go through in chunks. The team makes a chunk of dz, once in rows (for grad_x) and once in the order of a tile's columns
// (for grad_weight), and packs the chunk of x; then each thread takes rows of grad_x and rows of grad_weight. Sums over the rows
// run within a chunk and then over chunks, whose size is fixed, so that bits do not depend on the threads.
#pragma once

#include "linear_forward.h"

namespace fastseq::FS_ISA {
namespace {

template <class T>
struct LinearBackward {
  static constexpr int64_t W = panel_width<T>, L = lanes<T>, R = FS_TILE_ROWS;
  static constexpr int64_t chunk_rows = 252 / R * R * 2;
  static constexpr int64_t row_batch = 8;
  // With this few rows W is read where it lies: a copy would not be used often enough.
  static constexpr int64_t in_place_rows = 8 * R;
  // Larger layers are done in pieces, so that scratch memory stays small whatever the layer's size.
  static constexpr int64_t most_inputs = 4096, most_outputs = 4096;

  struct Queues;

  struct Buffers {
    int64_t rows;       // of a chunk
    T* packed_weight;   // [input panels][outputs of the piece][W]
    T* gradient;        // [rows][row_width] of dz, where that is not grad_output itself
    T* last_row;        // [row_width], the last row of grad_output
    T* gradient_tiles;  // [tiles][rows][R], dz once more
    T* x_panels;        // [input panels][rows][W]
    T* column_sums;     // [row_width], of a chunk
    T* tile;            // [threads][R][block_stride] of dz
    T* edge;            // [rows][W], rows of grad_x in a panel that is not full
    Queues* queues;     // [2]
  };

  // One set serves a chunk of rows while the other, which no thread looks at any more, is made ready for the next chunk.
  struct Queues {
    RangeQueue gradient, grad_x, grad_weight;
    WorkQueue weights, inputs, in_place, columns;
  };

  const fastseq_linear_backward& call;
  const fastseq_linear_shape& shape;
  ElementDropout<T> dropout;
  int64_t piece_inputs, piece_outputs, row_width;
  Buffers b;

  explicit LinearBackward(const fastseq_linear_backward& call)
      : call(call), shape(call.shape), dropout(shape.dropout, shape.dropout_seed, shape.dropout_offset) {
    piece_inputs = minimum(shape.inputs, most_inputs);
    piece_outputs = minimum(shape.outputs, most_outputs);
    row_width = round_up(piece_outputs, dropout_group) + 2 * L;
  }

  void lay_out(Arena& arena, int threads) {
    int64_t input_panels = (piece_inputs + W - 1) / W, rows = b.rows = minimum(chunk_rows, shape.rows);
    b.packed_weight = call.grad_x.data ? arena.take<T>(input_panels * piece_outputs * W) : nullptr;
    b.gradient = is_plain() ? nullptr : arena.take<T>(rows * row_width);
    b.last_row = arena.take<T>(row_width);
    b.gradient_tiles = call.grad_weight ? arena.take<T>((tile_count(piece_outputs) * rows + 2) * R) : nullptr;
    b.x_panels = call.grad_weight ? arena.take<T>(input_panels * rows * W) : nullptr;
    b.column_sums = arena.take<T>(row_width);
    b.tile = arena.take<T>(threads * R * block_stride<T>);
    b.edge = arena.take<T>(rows * W);
    b.queues = arena.take<Queues>(2);
  }

  // dz is grad_output as it is.
  bool is_plain() const {
    return !dropout.active() && shape.activation == FASTSEQ_IDENTITY && call.grad_output.row_stride >= shape.outputs;
  }

  int run() {
    if (!shape.rows || !shape.inputs || !shape.outputs) return run_empty_sum();
    expect_writes<T>(call.grad_x, shape.rows, shape.inputs);
    expect_writes<T>({call.grad_weight, shape.inputs}, shape.outputs, shape.inputs);
    int threads = linear_threads(shape.rows, shape.inputs, shape.outputs, shape.threads);
    Arena arena{nullptr};
    lay_out(arena, threads);
    arena = Arena{(char*)fastseq_workspace(arena.used)};
    if (!arena.base) return FASTSEQ_OUT_OF_MEMORY;
    lay_out(arena, threads);
    b.queues[0] = Queues{};
    Barrier barrier;
    auto body = [&](int rank, int size) {
      Team team{rank, size, &barrier};
      int64_t chunk = 0;
      for (int64_t input = 0; input < shape.inputs; input += piece_inputs)
        for (int64_t output = 0; output < shape.outputs; output += piece_outputs)
          run_piece(team, chunk, Range{input, minimum(input + piece_inputs, shape.inputs)},
                    Range{output, minimum(output + piece_outputs, shape.outputs)});
    };
    run_parallel(threads, body);
    return FASTSEQ_OK;
  }

  int run_empty_sum() {
    if (call.grad_x.data)
      for (int64_t row = 0; row < shape.rows; ++row) memset(at<T>(call.grad_x, row, 0), 0, (size_t)shape.inputs * sizeof(T));
    if (call.grad_weight) memset(call.grad_weight, 0, (size_t)(shape.outputs * shape.inputs) * sizeof(T));
    if (!call.grad_bias) return FASTSEQ_OK;
    memset(call.grad_bias, 0, (size_t)shape.outputs * sizeof(T));
    if (!shape.rows || !shape.outputs) return FASTSEQ_OK;
    // No inputs: the bias is all there is.
    Arena arena{nullptr};
    lay_out(arena, 1);
    arena = Arena{(char*)fastseq_workspace(arena.used)};
    if (!arena.base) return FASTSEQ_OUT_OF_MEMORY;
    lay_out(arena, 1);
    b.queues[0] = Queues{};
    Barrier barrier;
    auto body = [&](int rank, int size) {
      Team team{rank, size, &barrier};
      int64_t chunk = 0;
      for (int64_t output = 0; output < shape.outputs; output += piece_outputs)
        run_piece(team, chunk, Range{0, 0}, Range{output, minimum(output + piece_outputs, shape.outputs)});
    };
    run_parallel(1, body);
    return FASTSEQ_OK;
  }

  // `chunk` counts the chunks of rows over all pieces.
  void run_piece(Team team, int64_t& chunk, Range inputs, Range outputs) {
    int64_t panels = (inputs.count() + W - 1) / W;
    team.wait();  // others may still read the last piece's panels
    enter_phase(Phase::pack);
    if (call.grad_x.data) {
      const T* weight = (const T*)call.weight;  // [O, K]
      for (int64_t panel; (panel = b.queues[chunk % 2].weights.take()) < panels;) {
        int64_t column = inputs.begin + panel * W;
        if (shape.rows <= in_place_rows && column + W <= inputs.end) continue;
        pack_rows<T>([&](int64_t k) { return weight + (outputs.begin + k) * shape.inputs + column; },
                     minimum(W, inputs.end - column), outputs.count(), b.packed_weight + panel * outputs.count() * W);
      }
    }
    for (int64_t row = 0; row < shape.rows; row += chunk_rows, ++chunk) {
      Range rows{row, minimum(row + chunk_rows, shape.rows)};
      Queues& queues = b.queues[chunk % 2];
      if (row) team.wait();  // others may still read the last chunk
      enter_phase(Phase::activation_gradient);
      make_gradient(team, queues.gradient, rows, outputs);
      enter_phase(Phase::pack);
      if (call.grad_weight) pack_inputs(queues.inputs, rows, inputs, panels);
      team.wait();
      if (team.rank == 0) b.queues[(chunk + 1) % 2] = Queues{};
      if (call.grad_x.data) {
        enter_phase(Phase::input_gradient);
        if (shape.rows <= in_place_rows)
          multiply_weight_in_place(team, queues.in_place, rows, inputs, outputs, panels);
        else
          multiply_weight(team, queues.grad_x, rows, inputs, outputs, panels);
      }
      enter_phase(Phase::weight_gradient);
      if (call.grad_weight) multiply_inputs(team, queues.grad_weight, rows, inputs, outputs, panels);
      enter_phase(Phase::bias_gradient);
      if (call.grad_bias && !inputs.begin) sum_columns(queues.columns, rows, outputs);
    }
  }

  // Rows of dz of the current chunk and piece.
  fastseq_matrix gradient_of(Range rows, Range outputs) const {
    if (is_plain()) return {at<T>(call.grad_output, rows.begin, outputs.begin), call.grad_output.row_stride};
    return {b.gradient, row_width};
  }

  // dz, in rows and in tiles. A few rows at a time: one row of a tile is a fraction of a page, and a
  // row of dz touches every tile.
  void make_gradient(Team team, RangeQueue& queue, Range rows, Range outputs) {
    fastseq_matrix gradient = gradient_of(rows, outputs);
    for (Range mine; (mine = queue.take(rows.count(), row_batch, row_batch, chunk_rows, team.size)).count();)
      make_rows(mine, gradient, rows, outputs);
  }

  void make_rows(Range mine, fastseq_matrix gradient, Range rows, Range outputs) {
    for (int64_t first = mine.begin; first < mine.end; first += row_batch) {
      const T* source[row_batch];
      int64_t count = minimum(row_batch, mine.end - first);
      for (int64_t i = 0; i < count; ++i) {
        T* target = at<T>(gradient, first + i, 0);
        source[i] = target;
        if (!is_plain()) {
          differentiate(rows.begin + first + i, outputs, target);
        } else if (rows.begin + first + i + 1 == shape.rows) {
          // Whole vectors are read below: past its end the last row of a tensor has no memory to read.
          memcpy(b.last_row, target, (size_t)outputs.count() * sizeof(T));
          source[i] = b.last_row;
        }
      }
      if (call.grad_weight) interleave(source, first, count, outputs.count(), first + count == mine.end);
    }
  }

  // Whole vectors run over into a tile's next row, which this thread writes next; but for its last one.
  FS_NOINLINE void interleave(const T* const* source, int64_t first, int64_t count, int64_t outputs, bool ends) {
    int64_t whole = outputs / R;
    for (int64_t tile = 0; tile < whole; ++tile) {
      T* target = b.gradient_tiles + (tile * b.rows + first) * R;
      int64_t free = ends ? count - 1 : count;
      for (int64_t i = 0; i < free; ++i, target += R)
        for (int64_t v = 0; v < R; v += L) store(target + v, load(source[i] + tile * R + v));
      if (ends) memcpy(target, source[free] + tile * R, R * sizeof(T));
    }
    int64_t left = outputs - whole * R;
    for (int64_t i = 0; left && i < count; ++i)
      memcpy(b.gradient_tiles + (whole * b.rows + first + i) * R, source[i] + whole * R, (size_t)left * sizeof(T));
  }

  void differentiate(int64_t row, Range outputs, T* target /* [outputs] */) {
    switch (shape.activation) {
      case FASTSEQ_RELU:
        return differentiate_as<FASTSEQ_RELU>(row, outputs, target);
      case FASTSEQ_GELU:
        return differentiate_as<FASTSEQ_GELU>(row, outputs, target);
      case FASTSEQ_GELU_TANH:
        return differentiate_as<FASTSEQ_GELU_TANH>(row, outputs, target);
      case FASTSEQ_SILU:
        return differentiate_as<FASTSEQ_SILU>(row, outputs, target);
      default:
        return differentiate_as<FASTSEQ_IDENTITY>(row, outputs, target);
    }
  }

  template <int activation>
  FS_NOINLINE void differentiate_as(int64_t row, Range outputs, T* target) {
    const T* grad = at<T>(call.grad_output, row, 0);
    const T* z = (const T*)call.pre_activation + row * shape.outputs;
    for (int64_t column = outputs.begin; column < outputs.end; column += dropout_group, target += dropout_group) {
      Vec<T> factor[ElementDropout<T>::vectors];
      if (dropout.active()) dropout.draw(row, column / dropout_group, factor);
      int64_t columns = minimum(dropout_group, outputs.end - column);
      for (int v = 0; v * L < columns; ++v) {
        int64_t count = columns - v * L;
        Vec<T> value = load_partial(grad + column + v * L, count);
        if (dropout.active()) value *= factor[v];
        if constexpr (activation != FASTSEQ_IDENTITY)
          value = Activation<T, activation>::gradient(load_partial(z + column + v * L, count), value);
        store(target + v * L, value);
      }
    }
  }

  void pack_inputs(WorkQueue& queue, Range rows, Range inputs, int64_t panels) {
    for (int64_t panel; (panel = queue.take()) < panels;) {
      int64_t column = inputs.begin + panel * W;
      pack_rows<T>([&](int64_t k) { return at<T>(call.x, rows.begin + k, column); }, minimum(W, inputs.end - column),
                   rows.count(), b.x_panels + panel * b.rows * W);
    }
  }

  // grad_x (+)= dz W.
  void multiply_weight(Team team, RangeQueue& queue, Range rows, Range inputs, Range outputs, int64_t panels) {
    // As many rows at a time as leave their sums in L2.
    for (Range mine;
         (mine = queue.take(rows.count(), R, LinearForward<T>::least_rows, LinearForward<T>::chunk_rows, team.size)).count();)
      multiply_weight(team, mine, rows, inputs, outputs, panels);
  }
  void multiply_weight(Team team, Range mine, Range rows, Range inputs, Range outputs, int64_t panels) {
    alignas(64) static constexpr T zeros[W] = {};
    T* edge = b.edge;
    auto is_edge = [&](int64_t panel) { return inputs.begin + (panel + 1) * W > inputs.end; };
    auto row_at = [&](int64_t row, int64_t panel) { return at<T>(call.grad_x, rows.begin + row, inputs.begin + panel * W); };
    bool adds = outputs.begin > 0;
    int64_t last_columns = inputs.count() - (panels - 1) * W;
    if (adds && is_edge(panels - 1))
      for (int64_t row = mine.begin; row < mine.end; ++row)
        memcpy(edge + row * W, row_at(row, panels - 1), (size_t)last_columns * sizeof(T));
    fastseq_matrix gradient = gradient_of(rows, outputs);
    T* tile = b.tile + team.rank * R * block_stride<T>;
    multiply_blocked<T>([&](int64_t i, int64_t count, int64_t k,
                            int64_t step) { return copy_tile(at<T>(gradient, i, k), gradient.row_stride, count, step, tile); },
                        mine, 0, outputs.count(), b.packed_weight, Range{0, panels},
                        [&](int64_t row, int64_t panel) {
                          bool through_edge = is_edge(panel);
                          T* c = through_edge ? edge + row * W : row_at(row, panel);
                          int64_t stride = through_edge ? W : call.grad_x.row_stride;
                          return TilePlace<T>{c, stride, adds ? c : zeros, adds ? stride : 0};
                        },
                        [&](int64_t row, int64_t count, int64_t panel) {
                          if (is_edge(panel))
                            for (int64_t r = row; r < row + count; ++r)
                              memcpy(row_at(r, panel), edge + r * W, (size_t)last_columns * sizeof(T));
                        });
  }

  // The same for few rows: some columns of all of them.
  void multiply_weight_in_place(Team team, WorkQueue& queue, Range rows, Range inputs, Range outputs, int64_t panels) {
    int64_t runs = minimum(panels, 4 * team.size);
    for (int64_t run; (run = queue.take()) < runs;)
      multiply_weight_in_place(team, split(panels, runs, run), rows, inputs, outputs);
  }
  void multiply_weight_in_place(Team team, Range mine, Range rows, Range inputs, Range outputs) {
    alignas(64) static constexpr T zeros[W] = {};
    int64_t tiles = tile_count(rows.count());
    EvenSplit tile_rows(rows.count(), tiles);
    fastseq_matrix gradient = gradient_of(rows, outputs);
    for (int64_t done = 0; done < outputs.count(); done += block_depth<T>) {
      int64_t step = minimum(block_depth<T>, outputs.count() - done);
      bool adds = outputs.begin + done > 0;
      for (int64_t i = 0; i < tiles; ++i) {
        Range part = tile_rows.part(i);
        const T* a = copy_tile(at<T>(gradient, part.begin, done), gradient.row_stride, part.count(), step,
                               b.tile + team.rank * R * block_stride<T>);
        for (int64_t panel = mine.begin; panel < mine.end; ++panel) {
          int64_t column = inputs.begin + panel * W, columns = minimum(W, inputs.end - column);
          T* c = at<T>(call.grad_x, rows.begin + part.begin, column);
          if (columns == W)
            run_tile<T, Walk::strided>(part.count(), a, (const T*)call.weight + (outputs.begin + done) * shape.inputs + column,
                                       step, adds ? c : zeros, adds ? call.grad_x.row_stride : 0, c, call.grad_x.row_stride,
                                       shape.inputs);
          else
            edge_tile<Walk::rows>(part.count(), a, b.packed_weight + (panel * outputs.count() + done) * W, step, c,
                                  call.grad_x.row_stride, columns, adds);
        }
      }
    }
  }

  // grad_weight (+)= dz^T x.
  void multiply_inputs(Team team, RangeQueue& queue, Range rows, Range inputs, Range outputs, int64_t panels) {
    for (Range mine; (mine = queue.take(tile_count(outputs.count()), 1, 2, 64, team.size)).count();)
      multiply_inputs(mine, rows, inputs, outputs, panels);
  }
  void multiply_inputs(Range mine, Range rows, Range inputs, Range outputs, int64_t panels) {
    alignas(64) static constexpr T zeros[W] = {};
    constexpr int64_t group = (384 << 10) / (chunk_rows * W * (int64_t)sizeof(T)) + 1;
    bool adds = rows.begin > 0;
    for (int64_t first = 0; first < panels; first += group) {
      int64_t last = minimum(first + group, panels);
      for (int64_t tile = mine.begin; tile < mine.end; ++tile) {
        int64_t output = outputs.begin + tile * R, count = minimum(R, outputs.end - output);
        const T* a = b.gradient_tiles + tile * b.rows * R;
        for (int64_t panel = first; panel < last; ++panel) {
          int64_t column = inputs.begin + panel * W, columns = minimum(W, inputs.end - column);
          const T* x = b.x_panels + panel * b.rows * W;
          T* c = (T*)call.grad_weight + output * shape.inputs + column;
          if (columns == W)
            run_tile<T, Walk::interleaved>(count, a, x, rows.count(), adds ? c : zeros, adds ? shape.inputs : 0, c,
                                           shape.inputs);
          else
            edge_tile<Walk::interleaved>(count, a, x, rows.count(), c, shape.inputs, columns, adds);
        }
      }
    }
  }

  // The last, narrower panel goes through a full tile of its own.
  template <Walk walk>
  FS_NOINLINE void edge_tile(int64_t count, const T* a, const T* panel, int64_t depth, T* c, int64_t c_stride, int64_t columns,
                             bool adds) {
    alignas(64) T full[R * W] = {};  // [row][W]
    for (int64_t r = 0; r < count && adds; ++r) memcpy(full + r * W, c + r * c_stride, (size_t)columns * sizeof(T));
    run_tile<T, walk>(count, a, panel, depth, full, W, full, W);
    for (int64_t r = 0; r < count; ++r) memcpy(c + r * c_stride, full + r * W, (size_t)columns * sizeof(T));
  }

  // grad_bias (+)= column sums of dz.
  void sum_columns(WorkQueue& queue, Range rows, Range outputs) {
    constexpr int64_t vectors = 8;
    int64_t all = (outputs.count() + L - 1) / L;
    for (int64_t first; (first = queue.take() * vectors) < all;)
      sum_columns(Range{first, minimum(first + vectors, all)}, rows, outputs);
  }
  void sum_columns(Range mine, Range rows, Range outputs) {
    fastseq_matrix gradient = gradient_of(rows, outputs);
    // Sums of sixteen rows, of those in a chunk, of the chunks: one running sum would lose digits.
    for (int64_t first = 0; first < rows.count(); first += 16)
      for (int64_t column = mine.begin * L; column < mine.end * L; column += L) {
        Vec<T> part{};
        for (int64_t row = first; row < minimum(first + 16, rows.count()); ++row)
          part += load_partial(at<T>(gradient, row, column), outputs.count() - column);
        store(b.column_sums + column, first ? load(b.column_sums + column) + part : part);
      }
    T* target = (T*)call.grad_bias + outputs.begin;
    for (int64_t column = mine.begin * L; column < mine.end * L; column += L) {
      int64_t count = outputs.count() - column;
      Vec<T> sum = load(b.column_sums + column);
      store_partial(target + column, rows.begin ? load_partial(target + column, count) + sum : sum, count);
    }
  }
};

}  // namespace
}  // namespace fastseq::FS_ISA
