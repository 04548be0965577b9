// Forward of one recurrent layer.
//
// Per direction, every thread owns a run of unit blocks (panel_width hidden units with all their gates) and keeps their
// weights. A chunk of steps at a time it
//   1. computes the input product of its units for all rows of the chunk (one large product, biases as the start value),
//   2. walks the steps: recurrent product of its units tile by tile, the cell update behind it while the tile is in L1,
//      one barrier a step so that everyone sees the new h.
// The input product apart from the recurrence costs a pass over a chunk-sized buffer and gains rows: W_ih is read once a
// chunk instead of once a step, and at batch 1 it is no longer bound by reading weights.
// A single row (batch 1, or a handful of rows in all) takes the weights as they lie, without packing (rnn_direct.h).
#pragma once

#include "math.h"
#include "rnn_direct.h"
#include "rnn_split.h"

namespace fastseq::FS_ISA {
namespace {

template <class T, class Cell>
struct RnnForward {
  using V = Vec<T>;
  static constexpr int64_t W = panel_width<T>, L = lanes<T>;
  // Rows whose pre-activations wait in L1 between the product and the cell update.
  static constexpr int64_t block_rows = 5 * FS_TILE_ROWS;
  // Blocks of fewer rows are over in less time than two threads take to agree on them.
  static constexpr int64_t stealing_rows = 4;

  struct DirectionBuffers {
    T* packed_input;        // [unit_blocks * input_count][I][W]
    T* packed_hidden;       // [unit_blocks * hidden_count][R][W]
    T* packed_projection;   // [output_blocks][H][W]
    T* bias;                // [slots][hidden_padded]
    T* chunk_slots;         // [chunk_capacity][slot_stride], inference only
    T* direct_sums;         // of DirectProducts, all threads' units
    T* direct_rows;         // [threads] of what DirectProducts calls plain
    T* cell;                // [B][hidden_padded]
    BlockedRows<T> x;       // [chunk_capacity, I]
    BlockedRows<T> h[2];    // [B, R], the state before and after a step
    BlockedRows<T> hidden;  // [B, H], outputs before the projection
    SplitForward<T> split;  // the same for the matrix unit; packed_input, packed_hidden, x and h are empty then
    StealingQueue* chunks;  // [threads], unit blocks of a chunk's input product
    StealingQueue* steps;   // [threads], unit blocks of a step
  };

  const fastseq_rnn_forward& call;
  LayerSizes<T, Cell> sizes;
  StepTable table;
  DirectPlan<T, Cell> direct;
  bool is_split;
  int64_t capacity;
  DirectionBuffers buffers[FASTSEQ_MAX_DIRECTIONS];
  Barrier barriers[2];

  explicit RnnForward(const fastseq_rnn_forward& call)
      : call(call), sizes(call.shape), table{&call.shape, nullptr}, direct(sizes) {
    is_split = !direct.hidden && rnn_is_split(sizes);
    capacity = chunk_capacity(sizes.rows, sizes.batch, sizes.chunk_target_rows());
  }

  void lay_out(Arena& arena, bool side_by_side, int threads) {
    table.first_row = arena.take<int64_t>(sizes.steps + 1);
    for (int64_t d = 0; d < sizes.directions; ++d) {
      DirectionBuffers& b = buffers[d];
      if (d && !side_by_side) {
        b = buffers[0];
        continue;
      }
      int64_t blocks = sizes.unit_blocks();
      b.packed_input = arena.take<T>(direct.input || is_split ? 0 : blocks * Cell::input_count * sizes.input * W);
      b.packed_hidden = arena.take<T>(direct.hidden || is_split ? 0 : blocks * Cell::hidden_count * sizes.output * W);
      b.packed_projection =
          arena.take<T>(sizes.has_projection && !direct.hidden ? sizes.output_blocks() * sizes.hidden * W : 0);
      b.bias = arena.take<T>(sizes.slots * sizes.hidden_padded);
      b.chunk_slots = arena.take<T>(call.reserve || direct.input ? 0 : capacity * sizes.slot_stride());
      b.direct_sums = arena.take<T>(direct.streams ? DirectProducts<T, Cell>::sums_size(sizes) : 0);
      b.direct_rows = arena.take<T>(direct.streams ? threads * DirectProducts<T, Cell>::plain_size(sizes) : 0);
      b.cell = arena.take<T>(Cell::has_cell ? sizes.batch * sizes.hidden_padded : 0);
      b.x = take_rows(arena, direct.input || is_split ? 0 : capacity, sizes.input);
      for (auto& h : b.h) h = take_rows(arena, is_split ? 0 : sizes.batch, sizes.output);
      if constexpr (has_split_products<T>)
        if (is_split) b.split.lay_out(arena, sizes, capacity);
      b.hidden = take_rows(arena, sizes.has_projection ? sizes.batch : 0, sizes.hidden);
      b.chunks = arena.take_queues(threads);
      b.steps = arena.take_queues(threads);
    }
  }
  static BlockedRows<T> take_rows(Arena& arena, int64_t rows, int64_t depth) {
    return {arena.take<T>(BlockedRows<T>::size(rows, depth)), rows};
  }

  int run() {
    int threads = sizes.useful_threads(call.shape.threads);
    bool side_by_side = sizes.directions == 2 && threads >= 2;
    Arena arena{nullptr};
    lay_out(arena, side_by_side, threads);
    arena = Arena{(char*)fastseq_workspace(arena.used)};
    if (!arena.base) return FASTSEQ_OUT_OF_MEMORY;
    lay_out(arena, side_by_side, threads);
    table.fill();
    if (call.reserve)
      fastseq_prefer_huge_pages(call.reserve, (size_t)(sizes.directions * Reserve<T, Cell>::direction_size(
                                                                              sizes.rows, sizes.hidden, sizes.projection)) *
                                                  sizeof(T));
    auto body = [this](int rank, int size) {
      TileMode mode(is_split);
      DirectionTeams teams(sizes.directions, rank, size, barriers);
      for (int64_t d = teams.first; d < teams.last; ++d) {
        Direction(*this, d, teams.team).run();
        if (d + 1 < teams.last) teams.team.wait();  // the next direction may use the same buffers
      }
    };
    run_parallel(threads, body);
    return FASTSEQ_OK;
  }

  // One thread's share of one direction.
  struct Direction {
    RnnForward& layer;
    const LayerSizes<T, Cell>& sizes;
    const StepTable& table;
    DirectionBuffers& b;
    const fastseq_rnn_weights& weights;
    Sequence<T> x, y;
    Reserve<T, Cell> reserve;
    bool saves;
    int64_t index;
    Walkway walk;
    Team team;
    DirectProducts<T, Cell> direct;
    bool given_state = false;  // h is read where the caller has h0
    Range units;               // unit blocks of this thread
    Range outputs;             // blocks of the output of this thread (differ from units only with a projection)

    Direction(RnnForward& layer, int64_t d, Team team)
        : layer(layer),
          sizes(layer.sizes),
          table(layer.table),
          b(layer.buffers[d]),
          weights(layer.call.weights[d]),
          x(layer.call.x, layer.table),
          y(layer.call.y, layer.table),
          reserve((T*)layer.call.reserve, layer.sizes, d),
          saves(layer.call.reserve != nullptr),
          index(d),
          walk{layer.sizes.steps, d == 1},
          team(team),
          direct{sizes,
                 layer.direct,
                 weights,
                 b.bias,
                 b.direct_sums,
                 b.direct_rows + team.rank * (layer.direct.streams ? DirectProducts<T, Cell>::plain_size(sizes) : 0)},
          units(split(layer.sizes.unit_blocks(), team.size, team.rank)),
          outputs(split(layer.sizes.output_blocks(), team.size, team.rank)) {
      y.data += d * sizes.output;
    }

    void run() {
      enter_phase(Phase::pack);
      pack_weights();
      enter_phase(Phase::states);
      load_states();
      zero_dead_rows();
      for (int64_t position = 0; position < sizes.steps;) {
        Chunk chunk = next_chunk(table, walk, position, sizes.chunk_target_rows());
        int64_t first = table.first_row[minimum(walk.step(chunk.begin), walk.step(chunk.end - 1))];
        if (!layer.direct.input)
          input_product(chunk, first);
        else if (position == 0 && !(given_state = reads_given_state()))
          team.wait();  // h0 is in place
        for (; position < chunk.end; ++position) step(position, first);
      }
    }

    // Before the first step products may read h0 where it was given: then the threads need not meet for it.
    bool reads_given_state() const { return layer.direct.input && layer.call.initial_hidden && !sizes.has_projection; }

    void pack_weights() {
      int64_t hidden = sizes.hidden;
      for (int64_t block = units.begin; block < units.end; ++block) {
        int64_t unit = block * W, columns = hidden - unit;
        if constexpr (has_split_products<T>)
          if (layer.is_split) b.split.pack_block(sizes, weights, block);
        for (int i = 0; i < Cell::input_count && !layer.direct.input && !layer.is_split; ++i)
          pack_transposed((const T*)weights.input + (Cell::gate_of_input(i) * hidden + unit) * sizes.input, sizes.input,
                          columns, sizes.input, b.packed_input + (block * Cell::input_count + i) * sizes.input * W);
        for (int i = 0; i < Cell::hidden_count && !layer.direct.hidden && !layer.is_split; ++i)
          pack_transposed((const T*)weights.hidden + (Cell::gate_of_hidden(i) * hidden + unit) * sizes.output, sizes.output,
                          columns, sizes.output, b.packed_hidden + (block * Cell::hidden_count + i) * sizes.output * W);
        T* bias = b.bias + unit;
        for (int s = 0; s < Cell::slots; ++s)
          for (int64_t j = 0; j < W; ++j) bias[s * sizes.hidden_padded + j] = 0;
        add_bias(weights.input_bias, Cell::input_first, Cell::input_count, Cell::gate_of_input, unit);
        add_bias(weights.hidden_bias, Cell::hidden_first, Cell::hidden_count, Cell::gate_of_hidden, unit);
      }
      if (!sizes.has_projection || layer.direct.hidden) return;
      for (int64_t block = outputs.begin; block < outputs.end; ++block)
        pack_transposed((const T*)weights.projection + block * W * hidden, hidden, sizes.output - block * W, hidden,
                        b.packed_projection + block * hidden * W);
    }

    void add_bias(const void* source, int first_slot, int count, int (*gate_of)(int), int64_t unit) {
      if (!source) return;
      for (int i = 0; i < count; ++i) {
        const T* from = (const T*)source + gate_of(i) * sizes.hidden + unit;
        T* to = b.bias + (first_slot + i) * sizes.hidden_padded + unit;
        for (int64_t j = 0; j < minimum(W, sizes.hidden - unit); ++j) to[j] += from[j];
      }
    }

    // Row of a state tensor [D, B, width].
    FS_INLINE T* state_row(const void* base, int64_t row, int64_t width) const {
      return (T*)base + (index * sizes.batch + table.batch_index(row)) * width;
    }

    // Both h buffers start with h0: a row that joins late (reverse direction) finds it there.
    void load_states() {
      if constexpr (has_split_products<T>)
        if (layer.is_split) b.split.zero_states(sizes.batch, units);
      for (int64_t row = 0; row < sizes.batch; ++row) {
        bool never_alive = row >= table.alive(0);
        for (int64_t column = outputs.begin * W; column < minimum(outputs.end * W, sizes.output); column += L) {
          int64_t count = sizes.output - column;
          const void* h0 = layer.call.initial_hidden;
          V h = h0 ? load_partial(state_row(h0, row, sizes.output) + column, count) : V{};
          store_states(row, column, h);
          if (never_alive) store_partial(state_row(layer.call.final_hidden, row, sizes.output) + column, h, count);
        }
        if constexpr (Cell::has_cell) {
          for (int64_t column = units.begin * W; column < minimum(units.end * W, sizes.hidden); column += L) {
            int64_t count = sizes.hidden - column;
            const void* c0 = layer.call.initial_cell;
            V c = c0 ? load_partial(state_row(c0, row, sizes.hidden) + column, count) : V{};
            store(b.cell + row * sizes.hidden_padded + column, c);
            if (never_alive) store_partial(state_row(layer.call.final_cell, row, sizes.hidden) + column, c, count);
          }
        }
      }
    }

    FS_INLINE void store_states(int64_t row, int64_t column, V h) {
      if constexpr (has_split_products<T>)
        if (layer.is_split) return b.split.load_state(row, column, sizes.hidden_padded, h);
      for (auto& buffer : b.h) store(buffer.at(row, column), h);
    }

    // Outputs of a padded batch past each row's length.
    void zero_dead_rows() {
      if (table.shape->packed || !table.shape->batch_sizes) return;
      Range steps = split(sizes.steps, team.size, team.rank);
      for (int64_t t = steps.begin; t < steps.end; ++t)
        for (int64_t row = table.alive(t); row < sizes.batch; ++row) memset(y.at(t, row), 0, (size_t)sizes.output * sizeof(T));
    }

    // Where slot values of a chunk's row live: in the reserve when it is kept, else in the chunk's own buffer.
    FS_INLINE T* slots_at(int64_t packed_row, int64_t chunk_first) const {
      return saves ? reserve.slots + packed_row * sizes.slot_stride()
                   : b.chunk_slots + (packed_row - chunk_first) * sizes.slot_stride();
    }

    void input_product(Chunk chunk, int64_t first_row) {
      int64_t positions = chunk.end - chunk.begin;
      Range mine = split(positions, team.size, team.rank);
      enter_phase(Phase::pack);
      for (int64_t i = mine.begin; i < mine.end; ++i) {
        int64_t t = walk.step(chunk.begin + i);
        for (int64_t row = 0; row < table.alive(t); ++row) copy_input(x.at(t, row), table.first_row[t] - first_row + row);
      }
      if constexpr (has_split_products<T>)
        if (layer.is_split && team.rank == 0) b.split.end_input(chunk.rows);
      team.wait();
      enter_phase(Phase::input_product);
      T* slots = slots_at(first_row, first_row);
      auto column_of = [&](int64_t panel) {
        return (Cell::input_first + panel % Cell::input_count) * sizes.hidden_padded + panel / Cell::input_count * W;
      };
      share_out(team, b.chunks, round_of(chunk.begin), sizes.unit_blocks(), false, [&](int64_t block) {
        if constexpr (has_split_products<T>)
          if (layer.is_split)
            return b.split.template multiply_input<Cell>(block, chunk.rows, slots, sizes.slot_stride(), b.bias, column_of);
        multiply_blocked<T>([&](int64_t row, int64_t, int64_t k, int64_t) { return b.x.at(row, k); }, Range{0, chunk.rows}, 0,
                            sizes.input, b.packed_input, Range{block * Cell::input_count, (block + 1) * Cell::input_count},
                            [&](int64_t row, int64_t panel) {
                              int64_t stride = sizes.slot_stride(), column = column_of(panel);
                              return TilePlace<T>{slots + row * stride + column, stride, b.bias + column, 0};
                            },
                            [](int64_t, int64_t, int64_t) {});
      });
      team.wait();  // a block's step may be another thread's
    }

    FS_INLINE void copy_input(const T* source /* [I] */, int64_t row) {
      if constexpr (has_split_products<T>)
        if (layer.is_split) return b.split.copy_input(source, sizes.input, row);
      copy_to_blocked(source, sizes.input, b.x, row);
    }

    // Directions that run one after the other use the same queues.
    FS_INLINE int64_t round_of(int64_t position) const { return index * sizes.steps + position + 1; }

    void step(int64_t position, int64_t chunk_first) {
      int64_t t = walk.step(position), alive = table.alive(t);
      int64_t ending = position + 1 < sizes.steps ? table.alive(walk.step(position + 1)) : 0;
      BlockedRows<T> before = b.h[position % 2], after = b.h[(position + 1) % 2];
      int64_t row_blocks = (alive + block_rows - 1) / block_rows;
      EvenSplit blocks_of_rows(alive, row_blocks);
      enter_phase(layer.direct.hidden ? Phase::fused_step : Phase::recurrent_product);
      fetch_states(position % 2, alive);
      auto update_run = [&](BlockRun blocks) {
        if constexpr (has_split_products<T>)
          if (layer.is_split) {
            for (int64_t row = 0; row < alive; row += split_step_rows)
              update_blocks(blocks, Range{row, minimum(row + split_step_rows, alive)}, t, ending, chunk_first, before, after,
                            position % 2);
            return;
          }
        for (int64_t j = 0; j < row_blocks; ++j)
          update_blocks(blocks, blocks_of_rows.part(j), t, ending, chunk_first, before, after, position % 2);
      };
      // There and back: the blocks used last are the ones still in cache.
      bool reversed = position % 2;
      int64_t first = reversed ? units.end - 1 : units.begin, direction = reversed ? -1 : 1;
      if constexpr (reads_streams)
        if (layer.direct.streams)
          direct.multiply_rows(
              units.begin * W, minimum(units.end * W, sizes.hidden) - units.begin * W, alive,
              [&](int64_t row) { return layer.direct.input ? nullptr : slots_at(table.first_row[t] + row, chunk_first); },
              [&](int64_t row) { return x.at(t, row); }, [&](int64_t row) { return state_before(before, row); });
      // With h read where it was given the threads have not met, so that a block of another's is not ready to be taken.
      if (alive < stealing_rows || team.size == 1 || layer.direct.streams || given_state) {
        // Few rows: several blocks between one change of phase and the next, which costs a recording something.
        int64_t together = layer.is_split || layer.direct.hidden ? 1 : maximum(1, block_rows / maximum(1, alive));
        for (int64_t i = 0; i < units.count(); i += together)
          update_run({first + i * direction, direction, minimum(together, units.count() - i)});
      } else {
        share_out(team, b.steps, round_of(position), sizes.unit_blocks(), reversed,
                  [&](int64_t block) { update_run({block, 1, 1}); });
      }
      if (sizes.has_projection) {
        team.wait();
        enter_phase(Phase::projection);
        fetch_columns(b.hidden, 0, alive, Range{0, minimum(units.begin * W, sizes.hidden)});
        fetch_columns(b.hidden, 0, alive, Range{units.end * W, sizes.hidden});
        for (int64_t block = outputs.begin; block < outputs.end; ++block)
          for (int64_t j = 0; j < row_blocks; ++j) project_block(block, blocks_of_rows.part(j), t, ending, after);
      }
      given_state = false;
      if (position + 1 < sizes.steps) team.wait();
    }

    FS_INLINE BlockedRow<T> state_before(BlockedRows<T> before, int64_t row) const {
      return given_state ? plain_row<T>(state_row(layer.call.initial_hidden, row, sizes.output)) : blocked_row(before, row);
    }

    // The part of h_{t-1} that the other threads of the team wrote.
    FS_INLINE void fetch_states(int before, int64_t alive) {
      if constexpr (has_split_products<T>)
        if (layer.is_split) {
          fetch_blocks(b.split.h[before], alive, Range{0, units.begin});
          return fetch_blocks(b.split.h[before], alive, Range{units.end, sizes.unit_blocks()});
        }
      fetch_columns(b.h[before], 0, alive, Range{0, minimum(outputs.begin * W, sizes.output)});
      fetch_columns(b.h[before], 0, alive, Range{outputs.end * W, sizes.output});
    }

    // Where one row keeps what belongs to the first unit of a block.
    struct UnitPointers {
      T* slots;               // [slots][hidden_padded]; NULL when the chunk has no slot buffer
      T* cell;                // c, updated in place
      T* saved_cell;          // reserve, or NULL
      T* saved_hidden;        // reserve, with a projection, or NULL
      T* saved_output;        // reserve, without one, or NULL
      T* final_cell;          // user's, NULL before the row's last step
      T* final_hidden;        // likewise; both NULL-checked once per vector
      const T* before;        // h_{t-1}
      T* after;               // h_t, or the unprojected output
      uint16_t* after_split;  // h_t for the matrix unit, or NULL
      const T* bias;          // [slots][hidden_padded]
      T* y;                   // user's output, NULL with a projection
    };

    // Blocks of units that are done together, in the order first, first + step, ...
    struct BlockRun {
      int64_t first, step, count;
      FS_INLINE int64_t operator[](int64_t i) const { return first + i * step; }
    };

    // Products and then cell updates of a run of blocks and a few rows, count * rows <= block_rows; the pre-activations stay in
    // L1 between the two.
    FS_INLINE void update_blocks(BlockRun blocks, Range rows, int64_t t, int64_t ending, int64_t chunk_first,
                                 BlockedRows<T> before, BlockedRows<T> after, int parity) {
      alignas(64) T scratch[Cell::slots * block_rows * W];  // [slots][block][row][W]
      if (!layer.direct.hidden) {
        enter_phase(Phase::recurrent_product);
        for (int64_t i = 0; i < blocks.count; ++i)
          multiply_block(blocks[i], rows, table.first_row[t], chunk_first, before, parity, scratch + i * rows.count() * W);
        enter_phase(Phase::gate_update);
      }
      for (int64_t i = 0; i < blocks.count; ++i)
        update_units(blocks[i], rows, t, ending, chunk_first, before, after, parity, scratch + i * rows.count() * W);
    }

    FS_INLINE void multiply_block(int64_t block, Range rows, int64_t packed_row, int64_t chunk_first, BlockedRows<T> before,
                                  int parity, T* sums /* [slots][block_rows][W] */) {
      int64_t unit = block * W;
      if constexpr (has_split_products<T>)
        if (layer.is_split) return b.split.template multiply_hidden<Cell>(parity, block, rows, sums, block_rows * W);
      for (int i = 0; i < Cell::hidden_count; ++i) {
        int s = Cell::hidden_first + i;
        int64_t column = s * sizes.hidden_padded + unit;
        bool has_input = direct.is_input(s);
        const T* init = has_input ? slots_at(packed_row + rows.begin, chunk_first) + column : b.bias + column;
        const T* panel = b.packed_hidden + (block * Cell::hidden_count + i) * sizes.output * W;
        multiply_panel(before, rows.begin, rows.count(), 0, sizes.output, panel, init, has_input ? sizes.slot_stride() : 0,
                       sums + s * block_rows * W, W);
      }
    }

    FS_INLINE void update_units(int64_t block, Range rows, int64_t t, int64_t ending, int64_t chunk_first,
                                BlockedRows<T> before, BlockedRows<T> after, int parity,
                                const T* block_sums /* [slots][block_rows][W] */) {
      int64_t unit = block * W, packed_row = table.first_row[t], count = sizes.hidden - unit;
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        UnitPointers at = unit_pointers(unit, t, row, packed_row + row, chunk_first, row >= ending, before, after, parity);
        const T* sums = block_sums + (row - rows.begin) * W;
        if (!layer.direct.hidden && count >= W) {
          update_vector<true>(at, sums, 0, L);
          update_vector<true>(at, sums, L, L);
          continue;
        }
        for (int64_t v = 0; v < W && v < count; v += L) {
          if (layer.direct.hidden) {
            V slot[Cell::slots];
            if (reads_streams && layer.direct.streams)
              for (int s = 0; s < Cell::slots; ++s) slot[s] = load(direct.sums_at(s, row, unit + v));
            else
              direct.multiply_row(slot, unit + v, count - v, at.slots ? at.slots - unit : nullptr, x.at(t, row),
                                  state_before(before, row));
            finish_vector<false>(slot, at, v, count - v);
          } else {
            update_vector<false>(at, sums, v, count - v);
          }
        }
      }
    }

    FS_INLINE UnitPointers unit_pointers(int64_t unit, int64_t t, int64_t row, int64_t packed_row, int64_t chunk_first,
                                         bool ends, BlockedRows<T> before, BlockedRows<T> after, int parity) const {
      UnitPointers at{};
      bool projects = sizes.has_projection;
      if (saves || !layer.direct.input) at.slots = slots_at(packed_row, chunk_first) + unit;
      if constexpr (Cell::has_cell) {
        at.cell = b.cell + row * sizes.hidden_padded + unit;
        if (saves) at.saved_cell = reserve.cells + packed_row * sizes.hidden_padded + unit;
        if (ends) at.final_cell = state_row(layer.call.final_cell, row, sizes.hidden) + unit;
      }
      if (projects) {
        at.after = b.hidden.at(row, unit);
        if (saves) at.saved_hidden = reserve.hidden + packed_row * sizes.hidden_padded + unit;
      } else {
        if constexpr (has_split_products<T>)
          if (layer.is_split) {
            at.before = at.after = b.split.state + row * sizes.hidden_padded + unit;
            at.after_split = split_place(b.split.h[1 - parity], row, unit);
            at.bias = b.bias + unit;
          }
        if (!layer.is_split) {
          at.before = before.at(row, unit);
          at.after = after.at(row, unit);
        }
        at.y = y.at(t, row) + unit;
        if (saves) at.saved_output = reserve.output + packed_row * sizes.output_padded + unit;
        if (ends) at.final_hidden = state_row(layer.call.final_hidden, row, sizes.output) + unit;
      }
      return at;
    }

    // Cell update of one vector of units; full: all its lanes exist.
    template <bool full>
    FS_INLINE void update_vector(const UnitPointers& at, const T* sums, int64_t v, int64_t count) {
      V slot[Cell::slots];
#pragma GCC unroll 8
      for (int s = 0; s < Cell::slots; ++s)
        slot[s] = direct.is_hidden(s) ? load(sums + s * block_rows * W + v) : load(at.slots + s * sizes.hidden_padded + v);
      if constexpr (has_split_products<T>)
        if (layer.is_split) {
        // These sums started from zero.
#pragma GCC unroll 8
          for (int s = Cell::hidden_first; s < Cell::hidden_first + Cell::hidden_count; ++s)
            slot[s] += load((direct.is_input(s) ? at.slots : at.bias) + s * sizes.hidden_padded + v);
        }
      finish_vector<full>(slot, at, v, count);
    }

    template <bool full>
    FS_INLINE void finish_vector(V (&slot)[Cell::slots], const UnitPointers& at, int64_t v, int64_t count) {
      auto put = [count](T* target, V value) {
        if (full)
          store(target, value);
        else
          store_partial(target, value, count);
      };
      if (!full)
        for (int s = 0; s < Cell::slots; ++s) slot[s] = keep_lanes<T>(slot[s], count);
      V c{}, h;
      if constexpr (Cell::has_cell) c = load(at.cell + v);
      Cell::template forward<Math<T>>(slot, at.before ? load(at.before + v) : V{}, c, h);
      if constexpr (clears_pads<Cell>)
        if (!full) h = keep_lanes<T>(h, count);
      if (saves)
#pragma GCC unroll 8
        for (int s = 0; s < Cell::slots; ++s) store(at.slots + s * sizes.hidden_padded + v, slot[s]);
      if constexpr (Cell::has_cell) {
        store(at.cell + v, c);
        if (at.saved_cell) store(at.saved_cell + v, c);
        if (at.final_cell) put(at.final_cell + v, c);
      }
      store(at.after + v, h);
      if constexpr (has_split_products<T>)
        if (at.after_split) b.split.store_hidden(at.after_split + v, h);
      if (at.saved_hidden) store(at.saved_hidden + v, h);
      if (at.saved_output) store(at.saved_output + v, h);
      if (at.y) put(at.y + v, h);
      if (at.final_hidden) put(at.final_hidden + v, h);
    }

    FS_INLINE void emit(V h, int64_t column, int64_t count, int64_t t, int64_t row, bool ends, BlockedRows<T> after) {
      store(after.at(row, column), h);
      store_partial(y.at(t, row) + column, h, count);
      if (saves) store(reserve.output + (table.first_row[t] + row) * sizes.output_padded + column, h);
      if (ends) store_partial(state_row(layer.call.final_hidden, row, sizes.output) + column, h, count);
    }

    // h = W_hr (o * tanh(c)) for one block of outputs.
    FS_INLINE void project_block(int64_t block, Range rows, int64_t t, int64_t ending, BlockedRows<T> after) {
      alignas(64) static constexpr T zeros[W] = {};
      alignas(64) T scratch[block_rows * W];  // [row][W]
      int64_t column = block * W;
      if (!layer.direct.hidden)
        multiply_panel(b.hidden, rows.begin, rows.count(), 0, sizes.hidden, b.packed_projection + block * sizes.hidden * W,
                       zeros, 0, scratch, W);
      for (int64_t row = rows.begin; row < rows.end; ++row)
        for (int64_t v = 0; v < 2; ++v) {
          int64_t first = column + v * L, count = sizes.output - first;
          if (count <= 0) break;
          V h = layer.direct.hidden ? dot_rows((const T*)weights.projection + first * sizes.hidden, minimum(L, count),
                                               blocked_row(b.hidden, row), sizes.hidden, V{})
                                    : keep_lanes<T>(load(scratch + (row - rows.begin) * W + v * L), count);
          emit(h, first, count, t, row, row >= ending, after);
        }
    }
  };
};

}  // namespace
}  // namespace fastseq::FS_ISA
