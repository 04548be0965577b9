// Inference with small weights: each thread takes some sequences of the batch through all steps by itself. Nobody waits for
// anybody at the end of a step, which costs little work more than it does and much where a neighbour is slow; each core reads
// all of the weights, which therefore have to fit its own cache. A row's bits are those of the whole batch.
#pragma once

#include "rnn_forward.h"

namespace fastseq::FS_ISA {
namespace {

template <class T, class Cell>
struct RnnRowParts {
  // Half of the second-level cache of the processors in use that have least of it; the rest is for states and a chunk's inputs.
  static constexpr int64_t most_weight_bytes = 512 << 10;
  // With fewer rows a tile waits for the weights; and a part must not fall to the ways of its own that a few rows have.
  static constexpr int64_t least_rows = 8;
  static_assert(least_rows > short_rows && least_rows > DirectPlan<T, Cell>::few_rows);

  const fastseq_rnn_forward& call;
  int64_t parts;

  RnnRowParts(const fastseq_rnn_forward& call) : call(call), parts(1) {
    const fastseq_rnn_shape& shape = call.shape;
    LayerSizes<T, Cell> sizes(shape);
    int64_t weight_bytes =
        (Cell::gates * sizes.hidden * (sizes.input + sizes.output) + sizes.projection * sizes.hidden) * (int64_t)sizeof(T);
    if (call.reserve || shape.directions != 1 || shape.batch_sizes || shape.row_order || weight_bytes > most_weight_bytes ||
        rnn_is_split(sizes))
      return;
    parts = maximum(1, minimum(sizes.useful_threads(shape.threads), sizes.batch / least_rows));
  }

  // A part of the rows as a call of its own.
  fastseq_rnn_forward part(int64_t index) const {
    fastseq_rnn_forward own = call;
    Range rows = split(call.shape.batch, parts, index);
    int64_t hidden = call.shape.hidden_size, output = call.shape.projection_size ? call.shape.projection_size : hidden;
    own.shape.batch = rows.count();
    own.shape.threads = 1;
    own.x.data = from((T*)call.x.data, rows.begin * call.x.row_stride);
    own.y.data = from((T*)call.y.data, rows.begin * call.y.row_stride);
    own.initial_hidden = from((const T*)call.initial_hidden, rows.begin * output);
    own.initial_cell = from((const T*)call.initial_cell, rows.begin * hidden);
    own.final_hidden = from((T*)call.final_hidden, rows.begin * output);
    own.final_cell = from((T*)call.final_cell, rows.begin * hidden);
    return own;
  }
  template <class Pointer>
  static Pointer from(Pointer data, int64_t offset) {
    return data ? data + offset : data;
  }

  int run() const {
    constexpr int64_t page = 4096;
    fastseq_rnn_forward largest = part(0);
    Arena sizing{nullptr};
    RnnForward<T, Cell>(largest).lay_out(sizing, false, 1);
    int64_t part_bytes = round_up((int64_t)sizing.used, page) + page;
    char* memory = (char*)fastseq_workspace((size_t)(parts * part_bytes));
    if (!memory) return FASTSEQ_OUT_OF_MEMORY;
    auto body = [&](int rank, int size) {
      // Fewer threads than were asked for may come.
      for (int64_t index = rank; index < parts; index += size) {
        fastseq_rnn_forward own = part(index);
        RnnForward<T, Cell> layer(own);
        Arena arena{memory + index * part_bytes};
        layer.lay_out(arena, false, 1);
        layer.table.fill();
        DirectionTeams teams(1, 0, 1, layer.barriers);
        typename RnnForward<T, Cell>::Direction(layer, 0, teams.team).run();
      }
    };
    run_parallel((int)parts, body);
    return FASTSEQ_OK;
  }
};

template <class T, class Cell>
int rnn_forward(const fastseq_rnn_forward* call) {
  ProfiledCall profiled;
  if (profiled.begins<T>("rnn_forward", cell_name<Cell>)) {
    profile_sizes(call->shape);
    profile_size("bias", call->weights[0].input_bias != nullptr);
    profile_size("training", call->reserve != nullptr);
  }
  RnnRowParts<T, Cell> row_parts(*call);
  return row_parts.parts > 1 ? row_parts.run() : RnnForward<T, Cell>(*call).run();
}

}  // namespace
}  // namespace fastseq::FS_ISA
