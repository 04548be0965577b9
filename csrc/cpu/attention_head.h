// One query head as backward of attention reads it: queries and output gradients with rows in the lanes and, where they do not
// lie together already, with columns in the lanes; what forward kept of each row; the rules for its scores.
#pragma once

#include "attention_scores.h"

namespace fastseq::FS_ISA {
namespace {

template <class T>
struct PackedHead {
  static constexpr int64_t W = panel_width<T>;
  static constexpr int L = lanes<T>;

  T* query;                     // [panels][E][W]
  T* grad_output;               // [panels][Ev][W]
  T* output;                    // [Ev][W], of the panel being prepared
  T* query_rows;                // [E panels][Sq][W] or NULL: as they lie
  T* grad_output_rows;          // [Ev panels][Sq][W] or NULL
  PanelScores<T>* lane_scores;  // [panels]
  PanelDropout<T>* dropout;     // [panels]
  T* row_maximum;               // [panels][W]
  T* row_scale;                 // [panels][W]
  T* delta;                     // [panels][W]

  static bool copies_query(const fastseq_attention_backward& call) {
    return call.shape.key_size % W || needs_copy<T>(call.shape, call.query, call.shape.key_size);
  }
  static bool copies_grad_output(const fastseq_attention_backward& call) {
    return call.shape.value_size % W || needs_copy<T>(call.shape, call.grad_output, call.shape.value_size);
  }

  void lay_out(Arena& arena, const fastseq_attention_backward& call) {
    const fastseq_attention_shape& shape = call.shape;
    int64_t panels = (shape.queries + W - 1) / W;
    query = arena.take<T>(panels * shape.key_size * W);
    grad_output = arena.take<T>(panels * shape.value_size * W);
    output = arena.take<T>(shape.value_size * W);
    query_rows = copies_query(call) ? arena.take<T>((shape.key_size + W - 1) / W * shape.queries * W) : nullptr;
    grad_output_rows = copies_grad_output(call) ? arena.take<T>((shape.value_size + W - 1) / W * shape.queries * W) : nullptr;
    lane_scores = arena.take<PanelScores<T>>(panels);
    dropout = arena.take<PanelDropout<T>>(shape.dropout > 0 ? panels : 0);
    row_maximum = arena.take<T>(panels * W);
    row_scale = arena.take<T>(panels * W);
    delta = arena.take<T>(panels * W);
  }

  void prepare(const fastseq_attention_backward& call, const AttentionSizes<T>& sizes, int64_t batch, int64_t head,
               T* deltas /* [Sq], written */) const {
    const SequenceSpan& span = sizes.spans[batch];
    for (int64_t p = 0; p * W < span.queries; ++p) prepare_panel(call, sizes, batch, head, deltas, p);
    if (query_rows) pack_columns(call.query, sizes, batch, head, sizes.key_size, query_rows);
    if (grad_output_rows) pack_columns(call.grad_output, sizes, batch, head, sizes.value_size, grad_output_rows);
  }

  void prepare_panel(const fastseq_attention_backward& call, const AttentionSizes<T>& sizes, int64_t batch, int64_t head,
                     T* deltas, int64_t p) const {
    const SequenceSpan& span = sizes.spans[batch];
    PanelScores<T>& scores = lane_scores[p];
    int64_t first = p * W;
    scores.prepare(sizes, make_panel<T>(span, batch, head, first, minimum(W, span.queries - first)));
    if (sizes.shape.dropout > 0) dropout[p].prepare(sizes, scores.panel);
    const T* query_of[W];
    const T* gradient_of[W];
    const T* output_of[W];
    for (int64_t lane = 0; lane < W; ++lane) {
      int64_t place = scores.panel.query(lane), row = span.query_start + place;
      query_of[lane] = row_at<T>(call.query, batch, head, row);
      gradient_of[lane] = row_at<T>(call.grad_output, batch, head, row);
      output_of[lane] = row_at<T>(call.output, batch, head, row);
      row_maximum[first + lane] = *row_at<T>(call.row_maximum, batch, head, row);
      row_scale[first + lane] = *row_at<T>(call.row_scale, batch, head, row);
    }
    pack_lanes(query_of, sizes.key_size, query + p * sizes.key_size * W);
    T* gradient = grad_output + p * sizes.value_size * W;
    pack_lanes(gradient_of, sizes.value_size, gradient);
    pack_lanes(output_of, sizes.value_size, output);
    // delta, summed in the order of dP: a row that sees one key has output = value, and the two then cancel to the last bit.
    for (int half = 0; half < 2; ++half) {
      Vec<T> sum{};
      for (int64_t k = 0; k < sizes.value_size; ++k)
        sum = fused_multiply_add(load(output + k * W + half * L), load(gradient + k * W + half * L), sum);
      store(delta + first + half * L, sum);
    }
    for (int64_t lane = 0; lane < scores.panel.rows; ++lane) {
      int64_t place = scores.panel.query(lane);
      if (call.grad_lse.data) delta[first + lane] -= *row_at<T>(call.grad_lse, batch, head, span.query_start + place);
      deltas[place] = delta[first + lane];
    }
  }

  // target [size panels][Sq][W]: the rows of the head cut into panels of columns.
  static void pack_columns(const fastseq_heads& tensor, const AttentionSizes<T>& sizes, int64_t batch, int64_t head,
                           int64_t size, T* target) {
    const SequenceSpan& span = sizes.spans[batch];
    for (int64_t column = 0; column < size; column += W, target += sizes.shape.queries * W)
      for (int64_t row = 0; row < span.queries; ++row) {
        const T* source = row_at<T>(tensor, batch, head, span.query_start + row) + column;
        store(target + row * W, load_partial(source, minimum(L, size - column)));
        store(target + row * W + L, load_partial(source + L, maximum(0, minimum(L, size - column - L))));
      }
  }
};

}  // namespace
}  // namespace fastseq::FS_ISA
