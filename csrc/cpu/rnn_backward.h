// Backpropagation through time of one recurrent layer.
//
// Per direction the steps are walked against forward's order, a chunk at a time. Every thread owns the same unit blocks as
// in forward. A step is: gradients of the pre-activations of its units (from what forward saved), a barrier, and the product
// with W_hh that gives its columns of dL/dh of the step before. At the end of a chunk the large products follow, while the
// chunk's gradients are in cache (rnn_gradients.h): weights' gradients, each thread the rows of its units, and the input's.
// Gradients of weights are summed over rows in the order of the walk, whatever the number of threads.
#pragma once

#include "math.h"
#include "rnn_gradients.h"

namespace fastseq::FS_ISA {
namespace {

template <class T, class Cell>
struct RnnBackward {
  using V = Vec<T>;
  static constexpr int64_t W = panel_width<T>, L = lanes<T>;
  static constexpr int64_t block_rows = 5 * FS_TILE_ROWS;
  // Blocks of fewer rows are over in less time than two threads take to agree on them.
  static constexpr int64_t stealing_rows = 4;

  const fastseq_rnn_backward& call;
  LayerSizes<T, Cell> sizes;
  StepTable table;
  int64_t chunk_rows, capacity, input_panels, input_padded, output_padded;
  bool is_split;
  BackwardBuffers<T> buffers[FASTSEQ_MAX_DIRECTIONS];
  Barrier barriers[2], everyone;

  explicit RnnBackward(const fastseq_rnn_backward& call) : call(call), sizes(call.shape), table{&call.shape, nullptr} {
    is_split = rnn_is_split(sizes);
    // The matrix unit is through with a short sum before its result has been added to what was there.
    chunk_rows = is_split ? 256 : sizes.chunk_target_rows();
    capacity = chunk_capacity(sizes.rows, sizes.batch, chunk_rows);
    input_panels = (sizes.input + W - 1) / W;
    input_padded = input_panels * W;
    output_padded = round_up(sizes.output, padded_multiple) + padded_multiple;  // off the power of two
  }

  bool wants_grad_x() const { return call.grad_x.data != nullptr; }

  void lay_out(Arena& arena, bool side_by_side, int threads) {
    table.first_row = arena.take<int64_t>(sizes.steps + 1);
    for (int64_t d = 0; d < sizes.directions; ++d) {
      BackwardBuffers<T>& b = buffers[d];
      if (d && !side_by_side) {
        b = buffers[0];
        continue;
      }
      const fastseq_rnn_weight_gradients& wanted = call.grad_weights[d];
      int64_t projection = sizes.projection;
      b.packed_input = arena.take<T>(wants_grad_x() && !is_split ? input_padded * Cell::input_count * sizes.hidden_padded : 0);
      b.packed_hidden = arena.take<T>(is_split ? 0 : sizes.output_blocks() * W * Cell::hidden_count * sizes.hidden_padded);
      b.packed_projection = arena.take<T>(sizes.unit_blocks() * W * projection);
      b.grad_h = arena.take<T>(sizes.batch * output_padded);
      b.grad_cell = arena.take<T>(Cell::has_cell ? sizes.batch * sizes.hidden_padded : 0);
      b.grad_slots = take_rows(arena, capacity, sizes.slots * sizes.hidden_padded);
      b.grad_output = take_rows(arena, sizes.has_projection ? capacity : 0, projection);
      b.x_rows = arena.take<const T*>(capacity);
      b.h_rows = arena.take<const T*>(capacity);
      b.x_panels = arena.take<T>(wanted.input && !is_split ? input_padded * capacity : 0);
      b.h_panels = arena.take<T>(wanted.hidden && !is_split ? sizes.output_blocks() * W * capacity : 0);
      b.hidden_panels = arena.take<T>(wanted.projection ? sizes.unit_blocks() * W * capacity : 0);
      b.grad_x = arena.take<T>(wants_grad_x() ? capacity * input_padded : 0);
      b.grad_x_rows = d && wants_grad_x() ? arena.take<T>(sizes.rows * sizes.input) : nullptr;
      if constexpr (has_split_products<T>)
        if (is_split) b.split.lay_out(arena, sizes, capacity, wants_grad_x(), wanted.input || wanted.hidden);
      b.chunks = arena.take<ChunkQueues>(2);
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
    auto body = [this](int rank, int size) {
      TileMode mode(is_split);
      DirectionTeams teams(sizes.directions, rank, size, barriers);
      for (int64_t d = teams.first; d < teams.last; ++d) {
        Direction(*this, d, teams.team).run();
        teams.team.wait();
      }
      if (wants_grad_x()) finish_grad_x(Team{rank, size, &everyone});
    };
    run_parallel(threads, body);
    return FASTSEQ_OK;
  }

  // Adds the second direction's part where both ran side by side; zeroes rows past their length.
  void finish_grad_x(Team team) {
    team.wait();
    enter_phase(Phase::input_gradient);
    Sequence<T> grad_x(call.grad_x, table);
    Range steps = split(sizes.steps, team.size, team.rank);
    const T* other = sizes.directions == 2 ? buffers[1].grad_x_rows : nullptr;
    for (int64_t t = steps.begin; t < steps.end; ++t) {
      int64_t alive = table.alive(t);
      for (int64_t row = 0; other && row < alive; ++row)
        add_row(other + (table.first_row[t] + row) * sizes.input, grad_x.at(t, row), sizes.input);
      for (int64_t row = alive; !table.shape->packed && row < sizes.batch; ++row)
        memset(grad_x.at(t, row), 0, (size_t)sizes.input * sizeof(T));
    }
  }

  // One thread's share of one direction.
  struct Direction {
    RnnBackward& layer;
    const LayerSizes<T, Cell>& sizes;
    const StepTable& table;
    BackwardBuffers<T>& b;
    const fastseq_rnn_weights& weights;
    Sequence<T> x, grad_y, grad_x;
    Reserve<T, Cell> reserve;
    int64_t index;
    Walkway forward, walk;  // the order of forward, and against it
    Team team;
    Range units, outputs;
    ChunkGradients<T, Cell> gradients;

    Direction(RnnBackward& layer, int64_t d, Team team)
        : layer(layer),
          sizes(layer.sizes),
          table(layer.table),
          b(layer.buffers[d]),
          weights(layer.call.weights[d]),
          x(layer.call.x, layer.table),
          grad_y(layer.call.grad_y, layer.table),
          grad_x(layer.call.grad_x, layer.table),
          reserve((T*)layer.call.reserve, layer.sizes, d),
          index(d),
          forward{layer.sizes.steps, d == 1},
          walk{layer.sizes.steps, d == 0},
          team(team),
          units(split(layer.sizes.unit_blocks(), team.size, team.rank)),
          outputs(split(layer.sizes.output_blocks(), team.size, team.rank)),
          gradients{layer.sizes,
                    layer.table,
                    b,
                    layer.call.grad_weights[d],
                    x,
                    grad_x,
                    reserve.hidden,
                    walk,
                    team,
                    units,
                    outputs,
                    layer.input_panels,
                    layer.input_padded,
                    d == 1 && !b.grad_x_rows,
                    layer.is_split} {
      if (grad_y.data) grad_y.data += d * sizes.output;
    }

    void run() {
      enter_phase(Phase::pack);
      pack_weights();
      enter_phase(Phase::states);
      load_state_gradients();
      gradients.reset_queues();
      if (sizes.rows == 0 && team.rank == 0) gradients.zero_weight_gradients();
      for (int64_t position = 0; position < sizes.steps;) {
        Chunk chunk = next_chunk(table, walk, position, layer.chunk_rows);
        int64_t first = table.first_row[minimum(walk.step(chunk.begin), walk.step(chunk.end - 1))];
        bool first_chunk = position == 0;
        gate_gradients(position, first);
        for (; position < chunk.end; ++position) step(position, first, position + 1 < chunk.end);
        if (chunk.rows == 0) continue;
        enter_phase(Phase::pack);
        gradients.note_rows(chunk, first, [this](int64_t t, int64_t row) { return h_before(t, row); });
        team.wait();
        gradients.pack_right_factors(chunk.rows);
        team.wait();
        gradients.prepare_next_queues();
        enter_phase(Phase::weight_gradient);
        gradients.weight_gradients(chunk.rows, first_chunk);
        if (layer.wants_grad_x()) {
          enter_phase(Phase::input_gradient);
          gradients.input_gradient(chunk, first);
        }
        ++gradients.chunks;
        team.wait();
      }
      enter_phase(Phase::states);
      store_state_gradients();
    }

    // packed_input [I][input_count * hidden_padded], zeros where no unit is.
    void transpose_input_weights() {
      T* target = b.packed_input;
      for (int64_t input = 0; input < sizes.input; ++input)
        for (int i = 0; i < Cell::input_count; ++i, target += sizes.hidden_padded) {
          const T* source = (const T*)weights.input + Cell::gate_of_input(i) * sizes.hidden * sizes.input + input;
          for (int64_t k = 0; k < sizes.hidden_padded; ++k) target[k] = k < sizes.hidden ? source[k * sizes.input] : T(0);
        }
    }

    void pack_weights() {
      int64_t padded = sizes.hidden_padded, hidden = sizes.hidden;
      auto pack = [&](const void* source, int64_t columns, int count, auto gate_of, int64_t panel, T* target) {
        if constexpr (has_split_products<T>)
          if (layer.is_split)
            return b.split.pack_weight((const T*)source, columns, hidden, padded, gate_of, panel,
                                       target == b.packed_input ? b.split.input : b.split.hidden);
        for (int i = 0; i < count; ++i)
          pack_rows<T>(
              [&](int64_t k) {
                return k < hidden ? (const T*)source + (gate_of(i) * hidden + k) * columns + panel * W : nullptr;
              },
              columns - panel * W, padded, target + (panel * count + i) * padded * W);
      };
      for (int64_t block = outputs.begin; block < outputs.end; ++block)
        pack(weights.hidden, sizes.output, Cell::hidden_count, Cell::gate_of_hidden, block, b.packed_hidden);
      if (layer.wants_grad_x() && has_few_inputs(sizes, layer.is_split)) {
        if (team.rank == 0) transpose_input_weights();
      } else {
        Range input = split(layer.wants_grad_x() ? layer.input_panels : 0, team.size, team.rank);
        for (int64_t panel = input.begin; panel < input.end; ++panel)
          pack(weights.input, sizes.input, Cell::input_count, Cell::gate_of_input, panel, b.packed_input);
      }
      for (int64_t block = units.begin; block < units.end && sizes.has_projection; ++block)
        pack_rows<T>([&](int64_t k) { return (const T*)weights.projection + k * hidden + block * W; }, hidden - block * W,
                     sizes.projection, b.packed_projection + block * sizes.projection * W);
      if constexpr (has_split_products<T>)
        if (layer.is_split) b.split.template zero_steps<Cell>(sizes.batch, padded, units);
      // The products run over padded columns; beyond the hidden size the gradients are never written again.
      if (padded != hidden) {
        Range share = split(BlockedRows<T>::size(b.grad_slots.rows, sizes.slots * sizes.hidden_padded), team.size, team.rank);
        memset(b.grad_slots.data + share.begin, 0, (size_t)share.count() * sizeof(T));
        team.wait();
      }
    }

    FS_INLINE T* state_row(const void* base, int64_t row, int64_t width) const {
      return (T*)base + (index * sizes.batch + table.batch_index(row)) * width;
    }

    // Applies function(carried, user's row + column, count) to each vector of a thread's columns of a state.
    template <class Function>
    void each_state_vector(const void* base, T* carried, int64_t carried_stride, int64_t width, Range blocks,
                           Function function) {
      for (int64_t row = 0; row < sizes.batch; ++row)
        for (int64_t column = blocks.begin * W; column < minimum(blocks.end * W, width); column += L)
          function(carried + row * carried_stride + column, base ? state_row(base, row, width) + column : nullptr,
                   width - column);
    }
    void load_state_gradients() {
      auto load_vector = [](T* carried, const T* user, int64_t count) {
        store(carried, user ? load_partial(user, count) : V{});
      };
      each_state_vector(layer.call.grad_final_hidden, b.grad_h, layer.output_padded, sizes.output, outputs, load_vector);
      if constexpr (Cell::has_cell)
        each_state_vector(layer.call.grad_final_cell, b.grad_cell, sizes.hidden_padded, sizes.hidden, units, load_vector);
    }
    void store_state_gradients() {
      auto store_vector = [](T* carried, T* user, int64_t count) {
        if (user) store_partial(user, load(carried), count);
      };
      each_state_vector(layer.call.grad_initial_hidden, b.grad_h, layer.output_padded, sizes.output, outputs, store_vector);
      if constexpr (Cell::has_cell)
        each_state_vector(layer.call.grad_initial_cell, b.grad_cell, sizes.hidden_padded, sizes.hidden, units, store_vector);
    }

    // The step that came before t in forward, or -1 / T when t was the first.
    FS_INLINE int64_t step_before(int64_t t) const { return forward.reverse ? t + 1 : t - 1; }

    FS_INLINE const T* h_before(int64_t t, int64_t row) const {
      int64_t previous = step_before(t);
      if (row < table.alive(previous)) return reserve.output + (table.first_row[previous] + row) * sizes.output_padded;
      return layer.call.initial_hidden ? state_row(layer.call.initial_hidden, row, sizes.output) : nullptr;
    }
    FS_INLINE const T* cell_before(int64_t t, int64_t row) const {
      int64_t previous = step_before(t);
      if (row < table.alive(previous)) return reserve.cells + (table.first_row[previous] + row) * sizes.hidden_padded;
      return layer.call.initial_cell ? state_row(layer.call.initial_cell, row, sizes.hidden) : nullptr;
    }

    // Gradients of a step's pre-activations, for this thread's units.
    void gate_gradients(int64_t position, int64_t chunk_first) {
      int64_t t = walk.step(position), alive = table.alive(t);
      int64_t local = table.first_row[t] - chunk_first;  // the step's first row in the chunk's buffers
      int64_t row_blocks = (alive + block_rows - 1) / block_rows;
      enter_phase(sizes.has_projection ? Phase::projection : Phase::gate_gradient);
      if (sizes.has_projection) {
        gather_output_gradient(t, alive, local);
        team.wait();
        fetch_columns(b.grad_output, local, alive, Range{0, minimum(outputs.begin * W, sizes.output)});
        fetch_columns(b.grad_output, local, alive, Range{outputs.end * W, sizes.output});
        for (int64_t block = units.begin; block < units.end; ++block)
          for (int64_t j = 0; j < row_blocks; ++j) update_projected(block, split(alive, row_blocks, j), t, local);
      } else {
        for (int64_t block = units.begin; block < units.end; ++block)
          for (int64_t row = 0; row < alive; ++row) update_plain(block, t, row, local);
      }
    }

    // From the gradients of a step's pre-activations to dL/dh of the step before, and where `continues` on to the gradients
    // of that step's pre-activations. Without a projection a block of units goes all the way in one go.
    void step(int64_t position, int64_t chunk_first, bool continues) {
      int64_t t = walk.step(position), alive = table.alive(t), local = table.first_row[t] - chunk_first;
      team.wait();
      enter_phase(Phase::recurrent_product);
      bool last = position + 1 == sizes.steps;
      if (last && !layer.call.grad_initial_hidden) return;
      int64_t depth = Cell::hidden_count * sizes.hidden_padded;
      for (int s = Cell::hidden_first; s < Cell::hidden_first + Cell::hidden_count && outputs.count(); ++s)
        fetch_gradients(position % 2, s, local, alive);
      auto multiply = [&](int64_t block) {
        T* carried = b.grad_h + block * W;
        if constexpr (has_split_products<T>)
          if (layer.is_split) return b.split.multiply_hidden(position % 2, block, alive, carried, layer.output_padded);
        const T* panel = b.packed_hidden + block * depth * W;
        multiply_panel(b.grad_slots, local, alive, Cell::hidden_first * sizes.hidden_padded, depth, panel, carried,
                       layer.output_padded, carried, layer.output_padded);
      };
      bool reversed = position % 2;
      if (sizes.has_projection) {
        for (int64_t i = 0; i < outputs.count(); ++i) multiply(reversed ? outputs.end - 1 - i : outputs.begin + i);
        if (continues) gate_gradients(position + 1, chunk_first);
        return;
      }
      int64_t next = continues ? walk.step(position + 1) : t, next_local = table.first_row[next] - chunk_first;
      auto advance = [&](int64_t block) {
        enter_phase(Phase::recurrent_product);
        multiply(block);
        if (!continues) return;
        enter_phase(Phase::gate_gradient);
        for (int64_t row = 0; row < table.alive(next); ++row) update_plain(block, next, row, next_local);
      };
      if (alive < stealing_rows) {
        for (int64_t i = 0; i < units.count(); ++i) advance(reversed ? units.end - 1 - i : units.begin + i);
      } else {
        share_out(team, b.steps, index * sizes.steps + position + 1, sizes.unit_blocks(), reversed, advance);
      }
    }

    // The part of a slot's gradients that the other threads of the team wrote.
    FS_INLINE void fetch_gradients(int parity, int slot, int64_t local, int64_t alive) {
      int64_t column = slot * sizes.hidden_padded;
      if constexpr (has_split_products<T>)
        if (layer.is_split) {
          int64_t first = (slot - Cell::hidden_first) * sizes.hidden_padded / split_depth;
          fetch_blocks(b.split.step[parity], alive, Range{first, first + units.begin});
          return fetch_blocks(b.split.step[parity], alive, Range{first + units.end, first + sizes.unit_blocks()});
        }
      fetch_columns(b.grad_slots, local, alive, Range{column, column + minimum(units.begin * W, sizes.hidden)});
      fetch_columns(b.grad_slots, local, alive, Range{column + units.end * W, column + sizes.hidden});
    }

    // Where one row keeps what belongs to the first unit of a block.
    struct UnitPointers {
      const T* saved;        // [slots][hidden_padded]
      const T* cell;         // c_t
      const T* cell_before;  // c_{t-1}, or NULL for zeros
      T* grad_cell;
      T* grad_slots[Cell::slots];
      uint16_t* step_slots[Cell::slots];  // of hidden slots, for the matrix unit
    };

    FS_INLINE void update_plain(int64_t block, int64_t t, int64_t row, int64_t local) {
      int64_t unit = block * W, count = sizes.hidden - unit;
      UnitPointers at = unit_pointers(unit, t, row, local);
      T* carried = b.grad_h + row * layer.output_padded + unit;
      const T* from_y = grad_y.data ? grad_y.at(t, row) + unit : nullptr;
      const T* before = h_before(t, row);
      if (before) before += unit;
      if (count >= W) {
        plain_vector<true>(at, carried, from_y, before, 0, L);
        plain_vector<true>(at, carried, from_y, before, L, L);
      } else {
        for (int64_t v = 0; v < count; v += L) plain_vector<false>(at, carried, from_y, before, v, count - v);
      }
    }

    template <bool full>
    static FS_INLINE V get(const T* source, int64_t count) {
      return full ? load(source) : load_partial(source, count);
    }

    template <bool full>
    FS_INLINE void plain_vector(const UnitPointers& at, T* carried, const T* from_y, const T* before, int64_t v,
                                int64_t count) {
      V grad_h = load(carried + v);
      if (from_y) grad_h += get<full>(from_y + v, count);
      store(carried + v, update_vector<full>(at, grad_h, before ? get<full>(before + v, count) : V{}, v, count));
    }

    FS_INLINE UnitPointers unit_pointers(int64_t unit, int64_t t, int64_t row, int64_t local) const {
      int64_t packed_row = table.first_row[t] + row;
      UnitPointers at{};
      at.saved = reserve.slots + packed_row * sizes.slot_stride() + unit;
      if constexpr (Cell::has_cell) {
        at.cell = reserve.cells + packed_row * sizes.hidden_padded + unit;
        at.cell_before = cell_before(t, row);
        if (at.cell_before) at.cell_before += unit;
        at.grad_cell = b.grad_cell + row * sizes.hidden_padded + unit;
      }
      for (int s = 0; s < Cell::slots; ++s) at.grad_slots[s] = b.grad_slots.at(local + row, s * sizes.hidden_padded + unit);
      if constexpr (has_split_products<T>)
        if (layer.is_split) {
          int parity = (int)((walk.reverse ? sizes.steps - 1 - t : t) % 2);
          for (int i = 0; i < Cell::hidden_count; ++i)
            at.step_slots[Cell::hidden_first + i] = split_place(b.split.step[parity], row, i * sizes.hidden_padded + unit);
        }
      return at;
    }

    // Cell backward for one vector of units; returns the part of dL/dh_{t-1} that bypasses W_hh.
    template <bool full>
    FS_INLINE V update_vector(const UnitPointers& at, V grad_h, V h_previous, int64_t v, int64_t count) {
      V slot[Cell::slots], c_previous{}, c{}, grad_c{}, direct{};
#pragma GCC unroll 8
      for (int s = 0; s < Cell::slots; ++s) slot[s] = load(at.saved + s * sizes.hidden_padded + v);
      if constexpr (Cell::has_cell) {
        if (at.cell_before) c_previous = get<full>(at.cell_before + v, count);
        c = load(at.cell + v);
        grad_c = load(at.grad_cell + v);
      }
      Cell::template backward<Math<T>>(slot, h_previous, c_previous, c, grad_h, grad_c, direct);
      if constexpr (Cell::has_cell) store(at.grad_cell + v, grad_c);
#pragma GCC unroll 8
      for (int s = 0; s < Cell::slots; ++s) {
        if (!full) slot[s] = keep_lanes<T>(slot[s], count);
        store(at.grad_slots[s] + v, slot[s]);
        if constexpr (has_split_products<T>)
          if (at.step_slots[s]) b.split.store_gradient(at.step_slots[s] + v, slot[s]);
      }
      return direct;
    }

    void gather_output_gradient(int64_t t, int64_t alive, int64_t local) {
      for (int64_t row = 0; row < alive; ++row)
        for (int64_t column = outputs.begin * W; column < minimum(outputs.end * W, sizes.output); column += L) {
          T* carried = b.grad_h + row * layer.output_padded + column;
          V grad_h = load(carried);
          if (grad_y.data) grad_h += load_partial(grad_y.at(t, row) + column, sizes.output - column);
          store(b.grad_output.at(local + row, column), grad_h);
          store(carried, V{});
        }
    }

    FS_INLINE void update_projected(int64_t block, Range rows, int64_t t, int64_t local) {
      alignas(64) static constexpr T zeros[W] = {};
      alignas(64) T scratch[block_rows * W];  // [row][W], dL/d(unprojected h)
      enter_phase(Phase::projection);
      multiply_panel(b.grad_output, local + rows.begin, rows.count(), 0, sizes.projection,
                     b.packed_projection + block * sizes.projection * W, zeros, 0, scratch, W);
      enter_phase(Phase::gate_gradient);
      int64_t count = sizes.hidden - block * W;
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        UnitPointers at = unit_pointers(block * W, t, row, local);
        for (int64_t v = 0; v < W && v < count; v += L)
          update_vector<false>(at, load(scratch + (row - rows.begin) * W + v), V{}, v, count - v);
      }
    }
  };
};

// Rows of all directions that multiply with the recurrent weights on the way back: the step that a direction begins with does
// so only for the gradient of an initial state.
FS_INLINE int64_t rows_handed_on(const fastseq_rnn_backward& call) {
  const fastseq_rnn_shape& shape = call.shape;
  auto rows_at = [&](int64_t t) { return shape.batch_sizes ? shape.batch_sizes[t] : shape.batch; };
  int64_t rows = 0;
  for (int64_t t = 0; t < shape.steps; ++t) rows += shape.directions * rows_at(t);
  if (call.grad_initial_hidden || !shape.steps) return rows;
  return rows - rows_at(0) - (shape.directions == 2 ? rows_at(shape.steps - 1) : 0);
}

template <class T, class Cell>
int rnn_backward(const fastseq_rnn_backward* call) {
  ProfiledCall profiled;
  if (profiled.begins<T>("rnn_backward", cell_name<Cell>)) {
    profile_sizes(call->shape);
    const fastseq_rnn_weight_gradients& wanted = call->grad_weights[0];
    profile_size("bias", call->weights[0].input_bias != nullptr);
    profile_size("needs_x", call->grad_x.data != nullptr);
    profile_size("needs_w", wanted.input || wanted.hidden || wanted.projection);
    profile_size("rows_handed_on", rows_handed_on(*call));
  }
  return RnnBackward<T, Cell>(*call).run();
}

}  // namespace
}  // namespace fastseq::FS_ISA
