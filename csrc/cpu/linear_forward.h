// A linear layer forward: y = dropout(activation(x W^T + b)) + residual, the epilogue applied to a tile while it is warm.
//
// Three ways to the same product, by the number of rows alone:
//   few rows   every weight is used a few times only: dot products with W as it lies, from memory in streams
//   some rows  x is transposed into panels, rows in the lanes; W is read in place, a tile's rows at a time
//   many rows  W is packed into panels once; x is read in place, a tile's rows at a time
// The sum over K runs in the same order for every split of the work, so that bits do not depend on the threads.
#pragma once

#include "activation.h"
#include "dots.h"
#include "dropout.h"
#include "matrix.h"
#include "pack.h"

namespace fastseq::FS_ISA {
namespace {

// Below this much arithmetic a second thread costs more than it saves.
inline constexpr int64_t worth_a_thread = 1 << 17;

FS_INLINE int linear_threads(int64_t rows, int64_t inputs, int64_t outputs, int threads) {
  double products = (double)rows * (double)inputs * (double)outputs;
  return products < (double)worth_a_thread ? 1 : threads;
}

FS_INLINE void profile_sizes(const fastseq_linear_shape& shape) {
  profile_size("M", shape.rows);
  profile_size("K", shape.inputs);
  profile_size("N", shape.outputs);
  profile_size("dropout", shape.dropout > 0);
}

FS_INLINE const char* activation_name(int activation) {
  static constexpr const char* names[FASTSEQ_ACTIVATION_COUNT] = {"", "relu", "gelu", "gelu_tanh", "silu"};
  return names[activation];
}

// What happens to complete sums on their way out, one dropout_group of columns of a few rows at a time.
template <class T>
struct LinearEpilogue {
  const fastseq_linear_forward& call;
  const T* bias;  // [O] still to be added, or NULL
  ElementDropout<T> dropout;

  LinearEpilogue(const fastseq_linear_forward& call, const T* bias)
      : call(call), bias(bias), dropout(call.shape.dropout, call.shape.dropout_seed, call.shape.dropout_offset) {}

  // Nothing to do for a tile that was written in place.
  bool is_trivial() const {
    return !bias && !dropout.active() && !call.residual.data && !call.pre_activation &&
           call.shape.activation == FASTSEQ_IDENTITY;
  }

  // source [rows][columns] are the sums of (row ..., column ...), column a multiple of dropout_group; it may be the output.
  FS_INLINE void apply(const T* source, int64_t source_stride, int64_t row, int64_t rows, int64_t column,
                       int64_t columns) const {
    switch (call.shape.activation) {
      case FASTSEQ_RELU:
        return run<FASTSEQ_RELU>(source, source_stride, row, rows, column, columns);
      case FASTSEQ_GELU:
        return run<FASTSEQ_GELU>(source, source_stride, row, rows, column, columns);
      case FASTSEQ_GELU_TANH:
        return run<FASTSEQ_GELU_TANH>(source, source_stride, row, rows, column, columns);
      case FASTSEQ_SILU:
        return run<FASTSEQ_SILU>(source, source_stride, row, rows, column, columns);
      default:
        return run<FASTSEQ_IDENTITY>(source, source_stride, row, rows, column, columns);
    }
  }

  template <int activation>
  FS_NOINLINE void run(const T* source, int64_t source_stride, int64_t row, int64_t rows, int64_t column,
                       int64_t columns) const {
    constexpr int L = lanes<T>, vectors = ElementDropout<T>::vectors;
    const bool drops = dropout.active();
    for (int64_t r = 0; r < rows; ++r, source += source_stride) {
      Vec<T> factor[vectors];
      if (drops) dropout.draw(row + r, column / dropout_group, factor);
      T* output = at<T>(call.output, row + r, column);
      for (int v = 0; v * L < columns; ++v) {
        int64_t count = columns - v * L;
        Vec<T> z = load_partial(source + v * L, count);
        if (bias) z += load_partial(bias + column + v * L, count);
        if (call.pre_activation)
          store_partial((T*)call.pre_activation + (row + r) * call.shape.outputs + column + v * L, z, count);
        Vec<T> y = Activation<T, activation>::value(z);
        if (drops) y *= factor[v];
        if (call.residual.data) y += load_partial(at<T>(call.residual, row + r, column) + v * L, count);
        store_partial(output + v * L, y, count);
      }
    }
  }
};

template <class T>
struct LinearForward {
  static constexpr int64_t W = panel_width<T>, L = lanes<T>;
  // How few rows take the weights as they lie; more of them where that means four streams.
  static constexpr int64_t few_rows = 8, most_few_rows = reads_streams ? 56 : few_rows;
  // Weights that the second-level caches do not hold mostly come from memory: a model has more than one layer.
  static constexpr int64_t cached_bytes = reads_streams ? 256 << 10 : 1 << 20;
  // Sums from here on are long enough to tell their epilogue from them.
  static constexpr int64_t timed_depth = 256;
  // Many rows: as many at a time as leave their sums in L2 beside a group of panels, and panels that fit L3 (one at least).
  static constexpr int64_t chunk_rows = FS_TILE_ROWS * (126 / FS_TILE_ROWS);
  static constexpr int64_t packed_bytes = 8 << 20;
  // A thread that takes rows reads the panels from L3 for them: fewer are not worth it.
  static constexpr int64_t least_rows = 2 * FS_TILE_ROWS;
  // Some rows: outputs that are computed before they are transposed, and panels of x that stay in L2 meanwhile.
  static constexpr int64_t output_block = FS_TILE_ROWS == 14 ? 224 : 96;
  static constexpr int64_t panel_group = 8;

  const fastseq_linear_forward& call;
  const fastseq_linear_shape& shape;
  const T* weight;  // [O, K]
  int64_t depth;    // K

  explicit LinearForward(const fastseq_linear_forward& call)
      : call(call), shape(call.shape), weight((const T*)call.weight), depth(call.shape.inputs) {}

  int run() {
    if (!shape.rows || !shape.outputs) return FASTSEQ_OK;
    expect_writes<T>(call.output, shape.rows, shape.outputs);
    expect_writes<T>({call.pre_activation, shape.outputs}, shape.rows, shape.outputs);
    if (!depth) return run_empty_sum();
    if (shape.rows <= (from_memory() ? most_few_rows : few_rows)) return run_few();
    // Packing W costs a pass over O x K, the other way over M x K and M x O.
    bool many = (double)shape.rows * (double)(depth + shape.outputs) > (double)shape.outputs * (double)depth;
    return many ? run_many() : run_some();
  }

  bool from_memory() const { return shape.outputs * depth * (int64_t)sizeof(T) > cached_bytes; }

  int useful_threads() const { return linear_threads(shape.rows, depth, shape.outputs, shape.threads); }

  // The next outputs to work on, whole groups of dropout.
  Range next_outputs(RangeQueue& queue, int64_t least, int64_t most, int size) const {
    return queue.take(shape.outputs, dropout_group, least, most, size);
  }

  int run_empty_sum() {
    LinearEpilogue<T> epilogue(call, (const T*)call.bias);
    auto body = [&](int rank, int size) {
      alignas(64) static constexpr T zeros[dropout_group] = {};
      Range mine = split(shape.rows, size, rank);
      for (int64_t column = 0; column < shape.outputs; column += dropout_group)
        epilogue.apply(zeros, 0, mine.begin, mine.count(), column, minimum(dropout_group, shape.outputs - column));
    };
    run_parallel(1, body);
    return FASTSEQ_OK;
  }

  int run_few() { return from_memory() ? run_few<true>() : run_few<false>(); }

  template <bool from_memory>
  int run_few() {
    constexpr int64_t run = 4 * dropout_group;  // outputs at a time
    LinearEpilogue<T> epilogue(call, (const T*)call.bias);
    RangeQueue queue;
    auto body = [&](int, int size) {
      alignas(64) T sums[(from_memory ? most_few_rows : few_rows) * run];
      enter_phase(Phase::product);  // the epilogue of so few rows goes under it
      for (Range mine; (mine = next_outputs(queue, run, shape.outputs, size)).count();)
        for (int64_t first = mine.begin; first < mine.end; first += run) {
          int64_t count = minimum(run, mine.end - first);
          if constexpr (from_memory && reads_streams)
            RowStreams<T>::multiply(weight + first * depth, depth, count, depth, at<T>(call.x, 0, 0), call.x.row_stride,
                                    shape.rows, sums, run);
          else
            multiply_rows<from_memory>(weight + first * depth, count, sums, run);
          for (int64_t column = 0; column < count; column += dropout_group)
            epilogue.apply(sums + column, run, 0, shape.rows, first + column, minimum(dropout_group, count - column));
        }
    };
    run_parallel(useful_threads(), body);
    return FASTSEQ_OK;
  }

  template <bool from_memory>
  FS_INLINE void multiply_rows(const T* w /* [outputs, K] */, int64_t outputs, T* sums /* [M][sums_stride] */,
                               int64_t sums_stride) {
    for (int64_t v = 0; v < outputs; v += L)
      for (int64_t row = 0; row < shape.rows; ++row)
        store(sums + row * sums_stride + v, dot_rows<T, from_memory>(w + v * depth, minimum(L, outputs - v),
                                                                     plain_row<T>(at<T>(call.x, row, 0)), depth, Vec<T>{}));
  }

  // --- Some rows

  struct RowLanes {
    T* panels;  // [x panels][K][W], rows of x in the lanes
    T* sums;    // [panel_group][output_block][W]
    T* tile;    // [FS_TILE_ROWS][block_stride] of W
  };

  int run_some() {
    int64_t x_panels = (shape.rows + W - 1) / W;
    int threads = useful_threads();
    RangeQueue* queues = nullptr;
    auto lay_out = [&](Arena& arena, RowLanes* table) {
      queues = arena.take<RangeQueue>((x_panels + panel_group - 1) / panel_group);
      T* panels = arena.take<T>(x_panels * depth * W);
      for (int i = 0; i < threads; ++i) {
        T* sums = arena.take<T>(minimum(panel_group, x_panels) * output_block * W);
        T* tile = arena.take<T>(FS_TILE_ROWS * block_stride<T>);
        if (table) table[i] = {panels, sums, tile};
      }
    };
    Arena arena{nullptr};
    RowLanes* table = arena.take<RowLanes>(threads);
    lay_out(arena, nullptr);
    arena = Arena{(char*)fastseq_workspace(arena.used)};
    if (!arena.base) return FASTSEQ_OUT_OF_MEMORY;
    table = arena.take<RowLanes>(threads);
    lay_out(arena, table);
    LinearEpilogue<T> epilogue(call, (const T*)call.bias);
    Barrier barrier;
    WorkQueue packs;
    int64_t groups = (x_panels + panel_group - 1) / panel_group;
    for (int64_t i = 0; i < groups; ++i) queues[i] = RangeQueue{};
    auto body = [&](int rank, int size) {
      Team team{rank, size, &barrier};
      enter_phase(Phase::pack);
      for (int64_t panel; (panel = packs.take()) < x_panels;)
        pack_transposed(at<T>(call.x, panel * W, 0), call.x.row_stride, minimum(W, shape.rows - panel * W), depth,
                        table[0].panels + panel * depth * W);
      team.wait();
      for (int64_t first = 0; first < x_panels; first += panel_group) {
        Range panels{first, minimum(first + panel_group, x_panels)};
        RangeQueue& queue = queues[first / panel_group];
        for (Range block; (block = next_outputs(queue, 2 * dropout_group, output_block, size)).count();) {
          enter_phase(Phase::product);
          multiply_in_lanes(table[rank], block, panels);
          enter_phase(Phase::epilogue);
          for (int64_t panel = panels.begin; panel < panels.end; ++panel)
            write_transposed(epilogue, table[rank].sums + (panel - first) * output_block * W, block, panel);
        }
      }
    };
    run_parallel(threads, body);
    return FASTSEQ_OK;
  }

  // sums[panel][output][W] for a block of outputs and a group of panels of x.
  void multiply_in_lanes(RowLanes& buffers, Range block, Range panels) {
    alignas(64) static constexpr T zeros[W] = {};
    int64_t tiles = tile_count(block.count());
    EvenSplit tile_rows(block.count(), tiles);
    for (int64_t k = 0; k < depth; k += block_depth<T>) {
      int64_t step = minimum(block_depth<T>, depth - k);
      for (int64_t i = 0; i < tiles; ++i) {
        Range part = tile_rows.part(i);
        const T* source = weight + (block.begin + part.begin) * depth + k;
        const T* a = copy_tile(source, depth, part.count(), step, buffers.tile);
        RowRequests<T> next(source + part.count() * depth, depth, short_turns ? part.count() : 0, step);
        // The weights of the next tile, where they are one piece of memory: each panel asks for its share, some of it a turn.
        int64_t share = !short_turns && depth == step ? (part.count() + panels.count() - 1) / panels.count() : 0;
        const T* ahead = share ? weight + (block.begin + part.end) * depth : nullptr;
        for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
          T* c = buffers.sums + ((panel - panels.begin) * output_block + part.begin) * W;
          next.ask();
          run_tile_ahead(part.count(), a, buffers.panels + (panel * depth + k) * W, step, k ? c : zeros, k ? W : 0, c, W, ahead,
                         share);
          if (share) ahead += share * step;
        }
      }
    }
  }

  void write_transposed(const LinearEpilogue<T>& epilogue, const T* sums /* [block][W] */, Range block, int64_t panel) {
    alignas(64) T rows[L * dropout_group];
    for (int64_t first = 0; first < W; first += L) {
      int64_t row = panel * W + first, count = minimum(L, shape.rows - row);
      if (count <= 0) return;
      for (int64_t output = block.begin; output < block.end; output += dropout_group) {
        int64_t columns = minimum(dropout_group, block.end - output);
        for (int64_t v = 0; v < columns; v += L) {
          Vec<T> square[L];
          for (int64_t j = 0; j < L; ++j)
            square[j] = v + j < columns ? load(sums + (output - block.begin + v + j) * W + first) : Vec<T>{};
          transpose<T>(square);
          for (int64_t j = 0; j < L; ++j) store(rows + j * dropout_group + v, square[j]);
        }
        epilogue.apply(rows, dropout_group, row, count, output, columns);
      }
    }
  }

  // --- Many rows

  struct Packed {
    T* panels;  // [panels of a part of the outputs][K][W]
    T* bias;    // [panels of all outputs][W]
    T* tile;    // [FS_TILE_ROWS][block_stride] of x
    T* edge;    // [chunk_rows][W], sums of a panel that is not full
  };

  int run_many() {
    int64_t all_panels = (shape.outputs + W - 1) / W, unit = dropout_group / minimum(W, dropout_group);
    int64_t part_panels = maximum(unit, packed_bytes / (depth * W * (int64_t)sizeof(T)) / unit * unit);
    part_panels = minimum(part_panels, all_panels);
    int threads = useful_threads();
    int64_t parts = (all_panels + part_panels - 1) / part_panels;
    WorkQueue* packs = nullptr;
    RangeQueue* queues = nullptr;
    auto lay_out = [&](Arena& arena, Packed* table) {
      packs = arena.take<WorkQueue>(parts);
      queues = arena.take<RangeQueue>(parts);
      T* panels = arena.take<T>(part_panels * depth * W);
      T* bias = arena.take<T>(all_panels * W);
      for (int i = 0; i < threads; ++i) {
        T* tile = arena.take<T>(FS_TILE_ROWS * block_stride<T>);
        T* edge = arena.take<T>(chunk_rows * W);
        if (table) table[i] = {panels, bias, tile, edge};
      }
    };
    Arena arena{nullptr};
    Packed* table = arena.take<Packed>(threads);
    lay_out(arena, nullptr);
    arena = Arena{(char*)fastseq_workspace(arena.used)};
    if (!arena.base) return FASTSEQ_OUT_OF_MEMORY;
    table = arena.take<Packed>(threads);
    lay_out(arena, table);
    for (int64_t i = 0; i < all_panels * W; ++i)
      table[0].bias[i] = call.bias && i < shape.outputs ? ((const T*)call.bias)[i] : T(0);
    for (int64_t i = 0; i < parts; ++i) {
      packs[i] = WorkQueue{};
      queues[i] = RangeQueue{};
    }
    LinearEpilogue<T> epilogue(call, nullptr);
    Barrier barrier;
    auto body = [&](int rank, int size) {
      Team team{rank, size, &barrier};
      for (int64_t part = 0; part < parts; ++part) {
        if (part) team.wait();  // others may still read the panels
        int64_t first = part * part_panels, count = minimum(part_panels, all_panels - first);
        enter_phase(Phase::pack);
        for (int64_t i; (i = packs[part].take()) < count;)
          pack_transposed(weight + (first + i) * W * depth, depth, minimum(W, shape.outputs - (first + i) * W), depth,
                          table[0].panels + i * depth * W);
        team.wait();
        for (Range rows; (rows = queues[part].take(shape.rows, FS_TILE_ROWS, least_rows, chunk_rows, size)).count();)
          multiply_chunk(table[rank], epilogue, rows, first, count);
      }
    };
    run_parallel(threads, body);
    return FASTSEQ_OK;
  }

  // Rows of x against `count` panels from `first`.
  void multiply_chunk(Packed& buffers, const LinearEpilogue<T>& epilogue, Range rows, int64_t first, int64_t count) {
    constexpr int64_t unit = dropout_group / (W < dropout_group ? W : dropout_group);  // panels to an epilogue
    bool trivial = epilogue.is_trivial();
    RowRequests<T> next(nullptr, 0, 0, 0);
    enter_phase(Phase::product);
    multiply_blocked<T>(
        [&](int64_t row, int64_t row_count, int64_t k, int64_t step) {
          const T* source = at<T>(call.x, rows.begin + row, k);
          next = {source + row_count * call.x.row_stride, call.x.row_stride, short_turns ? row_count : 0, step};
          return copy_tile(source, call.x.row_stride, row_count, step, buffers.tile);
        },
        Range{0, rows.count()}, 0, depth, buffers.panels, Range{0, count},
        [&](int64_t row, int64_t panel) {
          next.ask();
          int64_t column = (first + panel) * W;
          const T* init = buffers.bias + column;
          if (column + W > shape.outputs) return TilePlace<T>{buffers.edge + row * W, W, init, 0};
          return TilePlace<T>{at<T>(call.output, rows.begin + row, column), call.output.row_stride, init, 0};
        },
        [&](int64_t row, int64_t row_count, int64_t panel) {
          int64_t column = (first + panel) * W, end = column + W;
          if (end > shape.outputs) {
            end = shape.outputs;
            copy_edge(buffers.edge + row * W, rows.begin + row, row_count, column, end);
          }
          if (call.residual.data && end + W <= shape.outputs) prefetch_residual(rows.begin + row, row_count, end);
          if (trivial || ((panel + 1) % unit && panel + 1 < count)) return;
          column = column / dropout_group * dropout_group;
          // With short sums the clock would take as long as what it measures.
          if (depth >= timed_depth) enter_phase(Phase::epilogue);
          epilogue.apply(at<T>(call.output, rows.begin + row, column), call.output.row_stride, rows.begin + row, row_count,
                         column, end - column);
          enter_phase(Phase::product);
        });
  }

  // The residual of a panel's rows, asked for while the panel before is finished: each row is a line or two far from the next
  // row's, where no hardware prefetcher looks.
  FS_INLINE void prefetch_residual(int64_t row, int64_t rows, int64_t column) {
    constexpr int64_t line = 64 / (int64_t)sizeof(T);
    for (int64_t r = row; r < row + rows; ++r)
      for (int64_t i = 0; i < W; i += line) __builtin_prefetch(at<T>(call.residual, r, column + i), 0, 2);
  }

  FS_NOINLINE void copy_edge(const T* edge /* [rows][W] */, int64_t row, int64_t rows, int64_t column, int64_t end) {
    for (int64_t r = 0; r < rows; ++r)
      memcpy(at<T>(call.output, row + r, column), edge + r * W, (size_t)(end - column) * sizeof(T));
  }
};

}  // namespace
}  // namespace fastseq::FS_ISA
