// Forward of attention: softmax(scores) V without ever holding the scores of more than one block.
//
// A piece of work is a few panels of query rows of one head. It walks the visible keys block by block: products (keys down
// the rows, queries in the lanes), scores, the running maximum and sum of the softmax (Milakov, Gimelshein: Online normalizer
// calculation for softmax, 2018; Dao et al.: FlashAttention, 2022), product with the values. Blocks that no query of a panel
// sees are skipped. Pieces share nothing, so that bits do not depend on the number of threads.
#pragma once

#include "attention_decode.h"

namespace fastseq::FS_ISA {
namespace {

// Weights of a block and what they do to the running sums of a panel.
template <class T>
struct RunningSoftmax {
  static constexpr int L = lanes<T>;
  static constexpr int64_t W = panel_width<T>;
  alignas(64) T maximum[W];  // of the scores as score_block leaves them: the largest weight is then exactly 1
  alignas(64) T sum[W];
  alignas(64) T rescale[W];  // factor for what was summed before the latest block

  void start() {
    for (int64_t lane = 0; lane < W; ++lane) {
      maximum[lane] = T(-__builtin_inff());
      sum[lane] = T(0);
      rescale[lane] = T(1);
    }
  }

  // scores [rows][W] become exp2(factor * (score - maximum)).
  FS_NOINLINE void weigh(T* scores, int64_t rows, T factor, const T* largest /* [W] */) {
    for (int half = 0; half < 2; ++half) {
      Vec<T> before = load(maximum + half * L), top = load(largest + half * L);
      Vec<T> now = top > before ? top : before;
      // A row that has seen nothing has no maximum to subtract.
      Vec<T> subtracted = now == negative_infinity<T>() ? broadcast(T(0)) : now;
      Vec<T> by = broadcast(factor);
      Vec<T> total{};
      T* place = scores + half * L;
      for (int64_t row = 0; row < rows; ++row, place += W) {
        Vec<T> weight = Math<T>::exp2_nonpositive((load(place) - subtracted) * by);
        total = total + weight;
        store(place, weight);
      }
      Vec<T> shrink = Math<T>::exp2_nonpositive((before - subtracted) * by);
      store(rescale + half * L, shrink);
      store(sum + half * L, fused_multiply_add(load(sum + half * L), shrink, total));
      store(maximum + half * L, now);
    }
  }
};

// scores [rows][W] become exp2(factor * (score - maximum)) for a maximum that is final.
template <class T>
FS_NOINLINE void final_weights(T* scores, int64_t rows, T factor, const T* maximum /* [W] */) {
  for (int half = 0; half < 2; ++half) {
    Vec<T> subtracted = load(maximum + half * lanes<T>), by = broadcast(factor);
    subtracted = subtracted == negative_infinity<T>() ? broadcast(T(0)) : subtracted;
    T* place = scores + half * lanes<T>;
    for (int64_t row = 0; row < rows; ++row, place += panel_width<T>)
      store(place, Math<T>::exp2_nonpositive((load(place) - subtracted) * by));
  }
}

template <class T>
struct AttentionForward {
  static constexpr int64_t W = panel_width<T>;
  static constexpr int64_t panels_per_piece = 8;

  struct Buffers {
    T* query;                       // [panels][E][W]
    T* output;                      // [panels][Ev][W]
    T* scores;                      // [key_block][W]
    T* key_copy;                    // [key_block][copied_stride(E)] or NULL
    T* value_copy;                  // [key_block][copied_stride(Ev)] or NULL
    T* key_tiles;                   // of a block
    PanelScores<T>* lane_scores;    // [panels]
    PanelDropout<T>* lane_dropout;  // [panels]
    RunningSoftmax<T>* softmax;     // [panels]
  };

  const fastseq_attention_forward& call;
  const fastseq_attention_shape& shape;
  AttentionSizes<T> sizes;
  bool only_statistics;  // no output: what is wanted of a row is what write_row_statistics says
  bool merges_heads;     // the rows of all heads of a group make one list
  int64_t piece_panels;  // panels of a piece
  int64_t lists, pieces_per_list;
  WorkQueue queue;

  explicit AttentionForward(const fastseq_attention_forward& call) : call(call), shape(call.shape), sizes(call.shape) {
    only_statistics = !call.output.data;
    merges_heads = sizes.group > 1 && shape.queries < W && !call.weights.data;
    lists = merges_heads ? sizes.kv_heads : sizes.heads;
    int64_t rows = merges_heads ? sizes.group * shape.queries : shape.queries;
    int64_t panels = (rows + W - 1) / W;
    // Few pieces would leave threads idle; long ones read the keys less often.
    piece_panels = sizes.batch * lists * panels < 64 ? 1 : panels_per_piece;
    pieces_per_list = (panels + piece_panels - 1) / piece_panels;
  }

  int run() {
    int threads = shape.threads;
    Arena arena{nullptr};
    lay_out(arena, threads, nullptr);
    arena = Arena{(char*)fastseq_workspace(arena.used)};
    if (!arena.base) return FASTSEQ_OUT_OF_MEMORY;
    Buffers* buffers = lay_out(arena, threads, nullptr);
    lay_out(arena = Arena{arena.base}, threads, buffers);
    sizes.fill_spans();
    sizes.profile_spans();
    auto body = [this, buffers](int rank, int size) {
      enter_phase(Phase::output);
      zero_unused_rows(rank, size);
      bool averages = call.weights.data && call.average_weights;
      int64_t count = sizes.batch * (averages ? 1 : lists) * pieces_per_list;
      for (int64_t piece; (piece = queue.take()) < count;) {
        // The last queries of a causal sequence see most: they go first.
        int64_t index = pieces_per_list - 1 - piece % pieces_per_list, list = piece / pieces_per_list;
        if (averages)
          for (int64_t head = 0; head < sizes.heads; ++head) run_piece(buffers[rank], list, head, index);
        else
          run_piece(buffers[rank], list / lists, list % lists, index);
      }
    };
    run_parallel(sizes.useful_threads(threads), body);
    return FASTSEQ_OK;
  }

  // Called with buffers NULL for the size and the place of the table of buffers, then to fill that table.
  Buffers* lay_out(Arena& arena, int threads, Buffers* buffers) {
    sizes.spans = arena.take<SequenceSpan>(sizes.batch);
    Buffers* table = arena.take<Buffers>(threads);
    bool copies_keys = needs_copy<T>(shape, call.key, sizes.key_size);
    bool copies_values = needs_copy<T>(shape, call.value, sizes.value_size);
    for (int i = 0; i < threads; ++i) {
      Buffers b{};
      b.query = arena.take<T>(piece_panels * sizes.key_size * W);
      b.output = arena.take<T>(piece_panels * sizes.value_size * W);
      b.scores = arena.take<T>(key_block * W);
      if (copies_keys) b.key_copy = arena.take<T>(key_block * copied_stride<T>(sizes.key_size));
      if (copies_values) b.value_copy = arena.take<T>(key_block * copied_stride<T>(sizes.value_size));
      if (piece_panels >= panels_worth_tiles) b.key_tiles = arena.take<T>(RowBlock<T>::tiles_size(key_block, sizes.key_size));
      b.lane_scores = arena.take<PanelScores<T>>(piece_panels);
      b.lane_dropout = arena.take<PanelDropout<T>>(piece_panels);
      b.softmax = arena.take<RunningSoftmax<T>>(piece_panels);
      if (buffers) buffers[i] = b;
    }
    return table;
  }

  // Rows past a sequence's length.
  void zero_unused_rows(int rank, int size) {
    if (!shape.query_lengths) return;
    Range mine = split(sizes.batch * sizes.heads, size, rank);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      int64_t batch = i / sizes.heads, head = i % sizes.heads;
      const SequenceSpan& span = sizes.spans[batch];
      int64_t all = shape.query_starts ? shape.query_starts[batch + 1] - span.query_start : shape.queries;
      for (int64_t query = span.queries; query < all; ++query) {
        memset(row_at<T>(call.output, batch, head, span.query_start + query), 0, (size_t)sizes.value_size * sizeof(T));
        write_row_statistics(call, score_factor(sizes), batch, head, span.query_start + query, T(-__builtin_inff()), T(0));
        if (call.weights.data) zero_weights(batch, head, query);
      }
    }
  }

  T* weights_row(int64_t batch, int64_t head, int64_t query) const {
    return (T*)call.weights.data + batch * call.weights.batch_stride + head * call.weights.head_stride +
           query * call.weights.query_stride;
  }
  void zero_weights(int64_t batch, int64_t head, int64_t query) {
    if (!call.average_weights || head == 0) memset(weights_row(batch, head, query), 0, (size_t)shape.keys * sizeof(T));
  }

  // A few panels of one list of rows, and where their keys are.
  struct Piece {
    int64_t batch, kv_head, panels;
    Range keys;                          // visible to any panel
    Range panel_keys[panels_per_piece];  // visible to each
    const SequenceSpan* span;
  };

  void run_piece(Buffers& b, int64_t batch, int64_t list, int64_t index) {
    Piece piece = prepare(b, batch, list, index);
    if (piece.panels <= 0) return;
    bool started[panels_per_piece] = {};
    for_each_block(b, piece, !only_statistics,
                   [&](int64_t p, Range part, BlockKind kind, const T* largest, RowBlock<T> values) FS_LAMBDA_INLINE {
                     RunningSoftmax<T>& softmax = b.softmax[p];
                     enter_phase(Phase::softmax);
                     softmax.weigh(b.scores, part.count(), score_factor(sizes), largest);
                     if (only_statistics) return;
                     if (shape.dropout > 0) {
                       enter_phase(Phase::dropout);
                       b.lane_dropout[p].apply(part, b.scores);
                     }
                     enter_phase(Phase::values);
                     weighted_sum(kind, values, sizes.value_size, b.scores, part.count(), output_panel(b, p),
                                  started[p] ? softmax.rescale : nullptr);
                     started[p] = true;
                   });
    enter_phase(Phase::output);
    for (int64_t p = 0; p < piece.panels; ++p) finish_panel(b, piece, p, started[p]);
    if (call.weights.data) write_weights(b, piece);
  }

  Piece prepare(Buffers& b, int64_t batch, int64_t list, int64_t index) {
    enter_phase(Phase::pack);
    const SequenceSpan& span = sizes.spans[batch];
    int64_t first_head = merges_heads ? list * sizes.group : list;
    int64_t rows = span.queries * (merges_heads ? sizes.group : 1);
    int64_t first_row = index * piece_panels * W;
    Piece piece{batch,
                merges_heads ? list : list / sizes.group,
                minimum(piece_panels, (rows - first_row + W - 1) / W),
                {span.keys, 0},
                {},
                &span};
    for (int64_t p = 0; p < piece.panels; ++p) {
      int64_t row = first_row + p * W;
      PanelScores<T>& scores = b.lane_scores[p];
      scores.prepare(sizes, make_panel<T>(span, batch, first_head, row, minimum(W, rows - row)));
      const Panel<T>& panel = scores.panel;
      if (shape.dropout > 0) b.lane_dropout[p].prepare(sizes, panel);
      b.softmax[p].start();
      const T* row_of[W];
      for (int64_t lane = 0; lane < W; ++lane)
        row_of[lane] = row_at<T>(call.query, batch, panel.head(lane), span.query_start + panel.query(lane));
      pack_lanes(row_of, sizes.key_size, query_panel(b, p));
      Range keys = sizes.visible(span, panel.positions.begin, panel.positions.end - 1);
      piece.panel_keys[p] = keys;
      if (keys.count() > 0) piece.keys = {minimum(piece.keys.begin, keys.begin), maximum(piece.keys.end, keys.end)};
    }
    return piece;
  }
  T* query_panel(Buffers& b, int64_t p) const { return b.query + p * sizes.key_size * W; }
  T* output_panel(Buffers& b, int64_t p) const { return b.output + p * sizes.value_size * W; }

  // visit(panel, keys, kind, largest, values) for every block of keys and every panel that sees some; scores in b.scores.
  template <class Visit>
  FS_INLINE void for_each_block(Buffers& b, const Piece& piece, bool with_values, Visit visit) {
    alignas(64) T largest[W];
    T* tiles = piece.panels >= panels_worth_tiles ? b.key_tiles : nullptr;
    for (int64_t begin = piece.keys.begin; begin < piece.keys.end; begin += key_block) {
      Range block{begin, minimum(begin + key_block, piece.keys.end)};
      if (tiles || b.key_copy || b.value_copy) enter_phase(Phase::pack);
      // Tiles are a copy, too.
      T* key_copy = tiles && !shape.block_table ? nullptr : b.key_copy;
      RowBlock<T> keys =
          key_rows<T>(shape, call.key, *piece.span, piece.batch, piece.kv_head, block, sizes.key_size, key_copy, tiles);
      RowBlock<T> values{};
      if (with_values)
        values = key_rows<T>(shape, call.value, *piece.span, piece.batch, piece.kv_head, block, sizes.value_size, b.value_copy);
      for (int64_t p = 0; p < piece.panels; ++p) {
        Range part{maximum(block.begin, piece.panel_keys[p].begin), minimum(block.end, piece.panel_keys[p].end)};
        if (part.count() <= 0) continue;
        int64_t skipped = part.begin - block.begin;
        BlockKind kind = score_block(b.lane_scores[p], query_panel(b, p), keys.from(skipped), part, b.scores, largest);
        if (kind != BlockKind::hidden) visit(p, part, kind, largest, values.from(skipped));
      }
    }
  }

  void finish_panel(Buffers& b, const Piece& piece, int64_t p, bool started) {
    const Panel<T>& panel = b.lane_scores[p].panel;
    RunningSoftmax<T>& softmax = b.softmax[p];
    if (!started && !only_statistics) memset(output_panel(b, p), 0, (size_t)(sizes.value_size * W) * sizeof(T));
    alignas(64) T factor[W];
    T* row_of[W];
    for (int64_t lane = 0; lane < W; ++lane) {
      int64_t head = panel.head(lane), row = piece.span->query_start + panel.query(lane);
      T shrink = 1;
      if (shape.sinks)
        join_sink(((const T*)shape.sinks)[head], score_factor(sizes), softmax.maximum[lane], softmax.sum[lane], shrink);
      factor[lane] = weight_scale(softmax.sum[lane]) * shrink;
      row_of[lane] = row_at<T>(call.output, piece.batch, head, row);
      if (lane < panel.rows)
        write_row_statistics(call, score_factor(sizes), piece.batch, head, row, softmax.maximum[lane], softmax.sum[lane]);
    }
    if (!only_statistics) unpack_lanes(output_panel(b, p), sizes.value_size, factor, panel.rows, row_of);
  }
  FS_INLINE T weight_scale(T sum) const {
    if (sum == 0 || shape.dropout >= 1) return T(0);
    return 1 / sum * T(1 / (1 - shape.dropout));
  }

  // The scores once more, now that maximum and sum are known.
  void write_weights(Buffers& b, const Piece& piece) {
    for (int64_t p = 0; p < piece.panels; ++p) {
      const Panel<T>& panel = b.lane_scores[p].panel;
      for (int64_t lane = 0; lane < panel.rows; ++lane) zero_weights(piece.batch, panel.head(lane), panel.query(lane));
    }
    for_each_block(b, piece, false, [&](int64_t p, Range part, BlockKind, const T*, RowBlock<T>) FS_LAMBDA_INLINE {
      const Panel<T>& panel = b.lane_scores[p].panel;
      enter_phase(Phase::output);
      alignas(64) T factor[W];
      T* row_of[W];
      for (int64_t lane = 0; lane < W; ++lane) {
        factor[lane] = weight_scale(b.softmax[p].sum[lane]) / (call.average_weights ? T(sizes.heads) : T(1));
        row_of[lane] = weights_row(piece.batch, panel.head(lane), panel.query(lane)) + part.begin;
      }
      final_weights(b.scores, part.count(), score_factor(sizes), b.softmax[p].maximum);
      if (shape.dropout > 0) b.lane_dropout[p].apply(part, b.scores);
      if (call.average_weights)
        unpack_lanes<T, true>(b.scores, part.count(), factor, panel.rows, row_of);
      else
        unpack_lanes(b.scores, part.count(), factor, panel.rows, row_of);
    });
  }
};

template <class T>
int attention_forward(const fastseq_attention_forward* call) {
  bool decodes = AttentionDecode<T>::applies(*call);
  ProfiledCall profiled;
  if (profiled.begins<T>(decodes ? "attention_decode" : "attention_forward", "")) profile_sizes(call->shape);
  if (!decodes) return AttentionForward<T>(*call).run();
  int status = AttentionDecode<T>(*call).run();
  if (status || !call->row_maximum.data) return status;
  // Backward computes the weights again, from scores whose last digits are those of tiles, and so must be the maximum and sum that
  // it takes: where scores reach 5e4, a digit of theirs is a hundredth of a weight.
  fastseq_attention_forward statistics = *call;
  statistics.output.data = statistics.lse.data = nullptr;
  return AttentionForward<T>(statistics).run();
}

}  // namespace
}  // namespace fastseq::FS_ISA
