// Linear layers in float32 where the processor has a matrix unit (split.h): the same products as linear_forward.h and
// linear_backward.h, with both factors split first.
#pragma once

#include "linear_backward.h"
#include "split.h"

namespace fastseq::FS_ISA {
namespace {

#if FS_MATRIX_UNIT

// From here on splitting the factors costs less than it saves.
inline constexpr int64_t split_least_rows = 12, split_least_size = 32;

FS_INLINE bool linear_is_split(const fastseq_linear_shape& shape) {
  return shape.rows >= split_least_rows && shape.inputs >= split_least_size && shape.outputs >= split_least_size;
}

struct SplitLinearForward : LinearForward<float> {
  using Base = LinearForward<float>;
  using Base::Base;

  int64_t k_blocks() const { return split_blocks(depth); }

  int run() {
    expect_writes<float>(call.output, shape.rows, shape.outputs);
    expect_writes<float>({call.pre_activation, shape.outputs}, shape.rows, shape.outputs);
    // Panels of W are made once and cost a transposition; as a left factor W is split on the way, again for every thread.
    return shape.rows > most_rows_in_lanes ? run_many() : run_in_lanes();
  }

  // --- x in the lanes: a right factor of few columns, outputs are rows of the left one

  static constexpr int64_t most_rows_in_lanes = 128;
  static constexpr int64_t lane_outputs = 32;

  struct Lanes {
    SplitPanels x;  // [x panels], rows of x in the lanes
    SplitRows w;    // [lane_outputs, K], a thread's own
    float* sums;    // [x panels][output_block][W], likewise; of a block the first lane_outputs are used
  };

  int run_in_lanes() {
    int64_t x_panels = (shape.rows + W - 1) / W;
    int threads = useful_threads();
    auto lay_out = [&](Arena& arena, Lanes* table) {
      uint16_t* x = arena.take<uint16_t>(SplitPanels::size(shape.rows, depth));
      for (int i = 0; i < threads; ++i) {
        uint16_t* w = arena.take<uint16_t>(SplitRows::size(lane_outputs, depth));
        float* sums = arena.take<float>(x_panels * output_block * W);
        if (table) table[i] = {{x, k_blocks()}, {w, k_blocks()}, sums};
      }
    };
    Arena arena{nullptr};
    arena.take<Lanes>(threads);
    lay_out(arena, nullptr);
    arena = Arena{(char*)fastseq_workspace(arena.used)};
    if (!arena.base) return FASTSEQ_OUT_OF_MEMORY;
    Lanes* table = arena.take<Lanes>(threads);
    lay_out(arena, table);
    LinearEpilogue<float> epilogue(call, (const float*)call.bias);
    Barrier barrier;
    WorkQueue packs;
    RangeQueue queue;
    auto body = [&](int rank, int size) {
      TileMode mode;
      Team team{rank, size, &barrier};
      Lanes& b = table[rank];
      enter_phase(Phase::pack);
      for (int64_t panel; (panel = packs.take()) < x_panels;)
        split_panel_transposed(at<float>(call.x, panel * W, 0), call.x.row_stride, minimum(W, shape.rows - panel * W), depth,
                               b.x.at(panel, 0));
      team.wait();
      for (Range block; (block = next_outputs(queue, lane_outputs, lane_outputs, size)).count();) {
        enter_phase(Phase::product);
        int64_t tiles = row_tiles(block.count());
        for (int64_t i = 0; i < tiles * split_rows; ++i)
          if (i < block.count())
            split_row(weight + (block.begin + i) * depth, depth, b.w, i);
          else
            zero_split_row(b.w, i);
        for (int64_t panel = 0; panel < x_panels; ++panel)
          multiply_split_tiles(b.w, 0, tiles, b.x, panel, b.sums + panel * output_block * W, W);
        enter_phase(Phase::epilogue);
        for (int64_t panel = 0; panel < x_panels; ++panel)
          write_transposed(epilogue, b.sums + panel * output_block * W, block, panel);
      }
    };
    run_parallel(threads, body);
    return FASTSEQ_OK;
  }

  // --- Many rows: W in panels

  struct Many {
    SplitPanels w;  // [panels of a part of the outputs]
    SplitRows x;    // [rows of a chunk, K], a thread's own
  };

  int run_many() {
    int64_t all_panels = (shape.outputs + W - 1) / W;
    int64_t part_panels = minimum(all_panels, maximum(1, packed_bytes * 2 / (k_blocks() * right_block_elements * 2)));
    int64_t parts = (all_panels + part_panels - 1) / part_panels;
    int64_t rows_at_once = minimum(split_chunk_rows(k_blocks()), round_up(shape.rows, 2 * split_rows));
    int threads = useful_threads();
    WorkQueue* packs = nullptr;
    RangeQueue* queues = nullptr;
    auto lay_out = [&](Arena& arena, Many* table) {
      packs = arena.take<WorkQueue>(parts);
      queues = arena.take<RangeQueue>(parts);
      uint16_t* w = arena.take<uint16_t>(part_panels * k_blocks() * right_block_elements);
      for (int i = 0; i < threads; ++i) {
        uint16_t* x = arena.take<uint16_t>(SplitRows::size(rows_at_once, depth));
        if (table) table[i] = {{w, k_blocks()}, {x, k_blocks()}};
      }
    };
    Arena arena{nullptr};
    arena.take<Many>(threads);
    lay_out(arena, nullptr);
    arena = Arena{(char*)fastseq_workspace(arena.used)};
    if (!arena.base) return FASTSEQ_OUT_OF_MEMORY;
    Many* table = arena.take<Many>(threads);
    lay_out(arena, table);
    for (int64_t i = 0; i < parts; ++i) {
      packs[i] = WorkQueue{};
      queues[i] = RangeQueue{};
    }
    LinearEpilogue<float> epilogue(call, (const float*)call.bias);
    Barrier barrier;
    auto body = [&](int rank, int size) {
      TileMode mode;
      Team team{rank, size, &barrier};
      for (int64_t part = 0; part < parts; ++part) {
        if (part) team.wait();  // others may still read the panels
        int64_t first = part * part_panels, count = minimum(part_panels, all_panels - first);
        enter_phase(Phase::pack);
        for (int64_t i; (i = packs[part].take()) < count;)
          split_panel_transposed(weight + (first + i) * W * depth, depth, minimum(W, shape.outputs - (first + i) * W), depth,
                                 table[0].w.at(i, 0));
        team.wait();
        for (Range rows; (rows = queues[part].take(shape.rows, 2 * split_rows, 2 * split_rows, rows_at_once, size)).count();)
          multiply_chunk(table[rank], epilogue, rows, first, count);
      }
    };
    run_parallel(threads, body);
    return FASTSEQ_OK;
  }

  void multiply_chunk(Many& b, const LinearEpilogue<float>& epilogue, Range rows, int64_t first, int64_t count) {
    enter_phase(Phase::pack);
    for (int64_t row = rows.begin; row < rows.end; ++row) split_row(at<float>(call.x, row, 0), depth, b.x, row - rows.begin);
    int64_t tiles = row_tiles(rows.count());
    for (int64_t row = rows.count(); row < tiles * split_rows; ++row) zero_split_row(b.x, row);
    enter_phase(Phase::product);
    multiply_split(b.x, Range{0, tiles}, b.w, Range{0, count},
                   [&](int64_t tile, int64_t tile_rows, int64_t panel, const float* sums) {
                     int64_t row = tile * split_rows, column = (first + panel) * W;
                     epilogue.apply(sums, W, rows.begin + row, minimum(tile_rows, rows.count() - row), column,
                                    minimum(W, shape.outputs - column));
                   });
  }
};

// Chunks of rows as in LinearBackward. The team splits a chunk of dz twice, along its rows (for grad_x) and down its columns (for
// grad_weight), and a chunk of x once; then threads take rows of both gradients.
struct SplitLinearBackward : LinearBackward<float> {
  using Base = LinearBackward<float>;
  static constexpr int64_t chunk_rows = 512;
  // Of the layer at a time: what is split takes six bytes an element.
  static constexpr int64_t most_inputs = 2048, most_outputs = 2048;

  struct SplitBuffers {
    uint16_t* weight;      // panels of W [piece of outputs, piece of inputs]
    uint16_t* dz_rows;     // left factor [chunk rows, piece of outputs]
    uint16_t* dz_columns;  // left factor [piece of outputs, chunk rows]
    uint16_t* x;           // panels of the chunk's x [chunk rows, piece of inputs]
  } s;

  explicit SplitLinearBackward(const fastseq_linear_backward& call) : Base(call) {
    piece_inputs = minimum(shape.inputs, most_inputs);
    piece_outputs = minimum(shape.outputs, most_outputs);
    row_width = round_up(piece_outputs, dropout_group) + 2 * L;
  }

  void lay_out(Arena& arena) {
    int64_t rows = b.rows = minimum(chunk_rows, shape.rows);
    auto take = [&](bool wanted, int64_t size) { return wanted ? arena.take<uint16_t>(size) : nullptr; };
    bool grad_x = call.grad_x.data, grad_weight = call.grad_weight;
    s.weight = take(grad_x, SplitPanels::size(piece_inputs, piece_outputs));
    s.dz_rows = take(grad_x, SplitRows::size(rows, piece_outputs));
    s.dz_columns = take(grad_weight, SplitRows::size(piece_outputs, rows));
    s.x = take(grad_weight, SplitPanels::size(piece_inputs, rows));
    b.gradient = is_plain() ? nullptr : arena.take<float>(rows * row_width);
    b.column_sums = arena.take<float>(row_width);
    b.queues = arena.take<Queues>(2);
  }
  // Taken at a time.
  int64_t grad_x_rows() const { return split_chunk_rows(split_blocks(piece_outputs)); }
  int64_t grad_weight_tiles() const { return split_chunk_rows(split_blocks(b.rows)) / split_rows; }

  int run() {
    expect_writes<float>(call.grad_x, shape.rows, shape.inputs);
    expect_writes<float>({call.grad_weight, shape.inputs}, shape.outputs, shape.inputs);
    int threads = linear_threads(shape.rows, shape.inputs, shape.outputs, shape.threads);
    Arena arena{nullptr};
    lay_out(arena);
    arena = Arena{(char*)fastseq_workspace(arena.used)};
    if (!arena.base) return FASTSEQ_OUT_OF_MEMORY;
    lay_out(arena);
    b.queues[0] = Queues{};
    Barrier barrier;
    auto body = [&](int rank, int size) {
      TileMode mode;
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

  void run_piece(Team team, int64_t& chunk, Range inputs, Range outputs) {
    int64_t panels = (inputs.count() + W - 1) / W, output_blocks = split_blocks(outputs.count());
    SplitPanels weight{s.weight, output_blocks};
    team.wait();  // others may still read the last piece's panels
    enter_phase(Phase::pack);
    for (int64_t panel; call.grad_x.data && (panel = b.queues[chunk % 2].weights.take()) < panels;)
      for (int64_t block = 0; block < output_blocks; ++block) {
        int64_t column = inputs.begin + panel * W, first = outputs.begin + block * split_depth;
        split_panel_rows([&](int64_t k) { return (const float*)call.weight + (first + k) * shape.inputs + column; },
                         outputs.end - first, minimum(W, inputs.end - column), weight.at(panel, block));
      }
    for (int64_t row = 0; row < shape.rows; row += chunk_rows, ++chunk) {
      Range rows{row, minimum(row + chunk_rows, shape.rows)};
      int64_t row_blocks = split_blocks(rows.count());
      SplitRows dz_rows{s.dz_rows, output_blocks}, dz_columns{s.dz_columns, row_blocks};
      SplitPanels x{s.x, row_blocks};
      Queues& queues = b.queues[chunk % 2];
      if (row) team.wait();  // others may still read the last chunk
      enter_phase(Phase::activation_gradient);
      for (Range mine; (mine = queues.gradient.take(rows.count(), split_depth, split_depth, split_depth, team.size)).count();)
        make_gradient(mine, rows, outputs, dz_rows, dz_columns);
      enter_phase(Phase::pack);
      for (int64_t panel; call.grad_weight && (panel = queues.inputs.take()) < panels;)
        for (int64_t block = 0; block < row_blocks; ++block) {
          int64_t column = inputs.begin + panel * W, first = rows.begin + block * split_depth;
          split_panel_rows([&](int64_t k) { return at<float>(call.x, first + k, column); }, rows.end - first,
                           minimum(W, inputs.end - column), x.at(panel, block));
        }
      team.wait();
      if (team.rank == 0) b.queues[(chunk + 1) % 2] = Queues{};
      if (call.grad_x.data) {
        enter_phase(Phase::input_gradient);
        for (Range mine;
             (mine = queues.grad_x.take(rows.count(), 2 * split_rows, 2 * split_rows, grad_x_rows(), team.size)).count();)
          multiply_split(dz_rows, Range{mine.begin / split_rows, row_tiles(mine.end)}, weight, Range{0, panels},
                         [&](int64_t tile, int64_t tile_rows, int64_t panel, const float* c) {
                           int64_t first = tile * split_rows, column = inputs.begin + panel * W;
                           put(c, minimum(tile_rows, rows.count() - first), minimum(W, inputs.end - column),
                               at<float>(call.grad_x, rows.begin + first, column), call.grad_x.row_stride, outputs.begin > 0);
                         });
      }
      if (call.grad_weight) {
        enter_phase(Phase::weight_gradient);
        for (Range mine;
             (mine = queues.grad_weight.take(row_tiles(outputs.count()), 2, 2, grad_weight_tiles(), team.size)).count();)
          multiply_split(
              dz_columns, mine, x, Range{0, panels}, [&](int64_t tile, int64_t tile_rows, int64_t panel, const float* c) {
                int64_t first = tile * split_rows, column = inputs.begin + panel * W;
                put(c, minimum(tile_rows, outputs.count() - first), minimum(W, inputs.end - column),
                    (float*)call.grad_weight + (outputs.begin + first) * shape.inputs + column, shape.inputs, rows.begin > 0);
              });
      }
      enter_phase(Phase::bias_gradient);
      if (call.grad_bias && !inputs.begin) sum_columns(queues.columns, rows, outputs);
    }
  }

  // Rows [mine) of the chunk's dz, at most a k block of them: as they are where something is to be done to them, split in rows and
  // in columns.
  void make_gradient(Range mine, Range rows, Range outputs, SplitRows dz_rows, SplitRows dz_columns) {
    fastseq_matrix gradient = gradient_of(rows, outputs);
    for (int64_t row = mine.begin; row < mine.end; ++row) {
      if (!is_plain()) differentiate(rows.begin + row, outputs, at<float>(gradient, row, 0));
      if (call.grad_x.data) split_row(at<float>(gradient, row, 0), outputs.count(), dz_rows, row);
    }
    if (call.grad_x.data)
      for (int64_t row = mine.end; row % split_rows; ++row) zero_split_row(dz_rows, row);
    if (!call.grad_weight) return;
    for (int64_t tile = 0; tile < row_tiles(outputs.count()); ++tile)
      split_columns([&](int64_t k) { return at<float>(gradient, mine.begin + k, tile * split_rows); }, mine.count(),
                    minimum(split_rows, outputs.count() - tile * split_rows), dz_columns.at(tile, mine.begin / split_depth));
  }

  // target (+)= sums.
  FS_INLINE void put(const float* sums /* [rows][W] */, int64_t rows, int64_t columns, float* target, int64_t target_stride,
                     bool adds) {
    for (int64_t row = 0; row < rows; ++row, sums += W, target += target_stride)
      for (int64_t v = 0; v < columns; v += L) {
        Vec<float> value = load(sums + v);
        if (adds) value += load_partial(target + v, columns - v);
        store_partial(target + v, value, columns - v);
      }
  }
};

#endif  // FS_MATRIX_UNIT

}  // namespace
}  // namespace fastseq::FS_ISA
