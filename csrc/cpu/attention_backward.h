// Backward of attention. The weights are computed again from what forward kept of each row, a maximum and 1 / sum, so that
// nothing of size Sq x Skv is ever stored:
//   P = exp(scores - maximum) / sum,  dP = dO V^T,  dS = P (dP - delta),  delta = rowsum(dO O) - dlse
//   dV = P^T dO,  dQ = scale dS K,  dK = scale dS^T Q,  dbias = dS
// A piece of work owns a run of key blocks of one key head and walks, per query head, the queries that see them. Gradients of
// keys and values are therefore summed by one thread in a fixed order. Where pieces of that kind are few, the keys are cut
// into a number of splits that depends on sizes alone, and the query gradients of the splits are added at the end. Pieces
// whose bias gradients meet (a bias broadcast over sequences or heads) are done one after another by the same thread.
#pragma once

#include "attention_head.h"

namespace fastseq::FS_ISA {
namespace {

template <class T>
struct AttentionBackward {
  using V = Vec<T>;
  static constexpr int64_t W = panel_width<T>, L = lanes<T>;
  static constexpr int64_t panels_per_block = 4;  // queries are worked on four panels at a time
  static constexpr int64_t wanted_pieces = 16, most_splits = 4;

  struct Buffers {
    PackedHead<T> head;  // of the head being worked on, unless splits share them
    T* grad_query;       // [panels][E][W], unless splits keep theirs
    T* weights;          // [panels_per_block][key_block][W]
    T* grad_scores;      // [panels_per_block][key_block][W]
    T* cap_slope;        // [key_block][W]
    T* grad_key;         // [E panels][key_block][W]
    T* grad_value;       // [Ev panels][key_block][W]
    T* key_copy;         // [key_block][copied_stride(E)] or NULL
    T* value_copy;       // [key_block][copied_stride(Ev)] or NULL
    T* key_tiles;        // of the block, unless there is one panel only
    T* value_tiles;
  };

  const fastseq_attention_backward& call;
  const fastseq_attention_shape& shape;
  AttentionSizes<T> sizes;
  int64_t panels;  // of one head, at most
  int64_t key_panels, value_panels;
  int64_t units, unit_batches, unit_heads;  // a unit: so many sequences times so many key heads
  int64_t splits;
  bool shares_batches, shares_heads;
  T* all_delta;                 // [B][Hq][Sq]
  PackedHead<T>* shared_heads;  // [B * Hq], when splits > 1
  T* split_query;               // [splits][B * Hq][panels][E][W], when splits > 1
  WorkQueue queue;
  Barrier barrier;

  explicit AttentionBackward(const fastseq_attention_backward& call) : call(call), shape(call.shape), sizes(call.shape) {
    panels = (shape.queries + W - 1) / W;
    key_panels = (sizes.key_size + W - 1) / W;
    value_panels = (sizes.value_size + W - 1) / W;
    const fastseq_scores& bias = call.grad_bias;
    shares_batches = bias.data && bias.batch_stride == 0;
    shares_heads = bias.data && bias.head_stride == 0;
    unit_batches = shares_batches ? sizes.batch : 1;
    unit_heads = shares_heads ? sizes.kv_heads : 1;
    units = (shares_batches ? 1 : sizes.batch) * (shares_heads ? 1 : sizes.kv_heads);
    int64_t blocks = (shape.keys + key_block - 1) / key_block;
    splits = units ? minimum(minimum((wanted_pieces + units - 1) / units, most_splits), blocks) : 1;
    if ((bias.data && bias.key_stride == 0) || splits < 1) splits = 1;  // every key block adds to the same elements
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
      Team team{rank, size, &barrier};
      Range heads = split(sizes.batch * sizes.heads, size, rank);
      enter_phase(Phase::pack);
      if (call.grad_bias.data) {
        Range mine = split(call.grad_bias_elements, size, rank);
        memset((T*)call.grad_bias.data + mine.begin, 0, (size_t)mine.count() * sizeof(T));
      }
      for (int64_t i = heads.begin; i < heads.end; ++i) {
        zero_unused_rows(i / sizes.heads, i % sizes.heads);
        if (splits > 1) prepare_head(shared_heads[i], i / sizes.heads, i % sizes.heads);
      }
      team.wait();
      for (int64_t piece; (piece = queue.take()) < units * splits;) run_unit(buffers[rank], piece / splits, piece % splits);
      team.wait();
      enter_phase(Phase::join);
      if (splits > 1) {
        if (call.grad_query.data)
          for (int64_t i = heads.begin; i < heads.end; ++i) add_splits(i / sizes.heads, i % sizes.heads);
      }
      if (call.grad_sinks) {
        Range mine = split(sizes.heads, size, rank);
        for (int64_t head = mine.begin; head < mine.end; ++head) sink_gradient(head);
      }
    };
    run_parallel(sizes.useful_threads(threads), body);
    return FASTSEQ_OK;
  }

  // Called with buffers NULL for the size and the place of the table of buffers, then to fill that table.
  Buffers* lay_out(Arena& arena, int threads, Buffers* buffers) {
    sizes.spans = arena.take<SequenceSpan>(sizes.batch);
    all_delta = arena.take<T>(sizes.batch * sizes.heads * shape.queries);
    split_query = arena.take<T>(splits > 1 ? splits * sizes.batch * sizes.heads * panels * sizes.key_size * W : 0);
    int64_t heads_shared = splits > 1 ? sizes.batch * sizes.heads : 0;
    shared_heads = arena.take<PackedHead<T>>(heads_shared);
    for (int64_t i = 0; i < heads_shared; ++i) {
      PackedHead<T> head;
      head.lay_out(arena, call);
      if (buffers) shared_heads[i] = head;
    }
    Buffers* table = arena.take<Buffers>(threads);
    for (int i = 0; i < threads; ++i) {
      Buffers b{};
      if (splits == 1) b.head.lay_out(arena, call);
      b.grad_query = arena.take<T>(splits > 1 ? 0 : panels * sizes.key_size * W);
      b.weights = arena.take<T>(panels_per_block * key_block * W);
      b.grad_scores = arena.take<T>(panels_per_block * key_block * W);
      b.cap_slope = arena.take<T>(shape.softcap != 0 ? key_block * W : 0);
      b.grad_key = arena.take<T>(key_panels * key_block * W);
      b.grad_value = arena.take<T>(value_panels * key_block * W);
      if (needs_copy<T>(shape, call.key, sizes.key_size))
        b.key_copy = arena.take<T>(key_block * copied_stride<T>(sizes.key_size));
      if (needs_copy<T>(shape, call.value, sizes.value_size))
        b.value_copy = arena.take<T>(key_block * copied_stride<T>(sizes.value_size));
      if (panels >= panels_worth_tiles) {
        b.key_tiles = arena.take<T>(RowBlock<T>::tiles_size(key_block, sizes.key_size));
        b.value_tiles = arena.take<T>(RowBlock<T>::tiles_size(key_block, sizes.value_size));
      }
      if (buffers) buffers[i] = b;
    }
    return table;
  }

  FS_INLINE T* delta_row(int64_t batch, int64_t head) const { return all_delta + (batch * sizes.heads + head) * shape.queries; }

  // Zeros where no query is.
  void zero_unused_rows(int64_t batch, int64_t head) const {
    const SequenceSpan& span = sizes.spans[batch];
    int64_t all = shape.query_starts ? shape.query_starts[batch + 1] - span.query_start : shape.queries;
    if (call.grad_query.data)
      for (int64_t query = span.queries; query < all; ++query)
        memset(row_at<T>(call.grad_query, batch, head, span.query_start + query), 0, (size_t)sizes.key_size * sizeof(T));
  }

  void run_unit(Buffers& b, int64_t unit, int64_t split_index) {
    int64_t heads_apart = shares_heads ? 1 : sizes.kv_heads;
    int64_t first_batch = shares_batches ? 0 : unit / heads_apart, first_head = shares_heads ? 0 : unit % heads_apart;
    for (int64_t batch = first_batch; batch < first_batch + unit_batches; ++batch)
      for (int64_t head = first_head; head < first_head + unit_heads; ++head)
        for (int64_t member = 0; member < sizes.group; ++member)
          run_head(b, batch, head, head * sizes.group + member, member > 0, split_index);
  }

  void run_head(Buffers& b, int64_t batch, int64_t kv_head, int64_t head, bool adds, int64_t split_index) {
    const SequenceSpan& span = sizes.spans[batch];
    int64_t count = (span.queries + W - 1) / W;
    T* grad_query = b.grad_query;
    enter_phase(Phase::pack);
    if (splits > 1)
      grad_query = split_query + ((split_index * sizes.batch + batch) * sizes.heads + head) * panels * sizes.key_size * W;
    memset(grad_query, 0, (size_t)(count * sizes.key_size * W) * sizeof(T));
    if (splits > 1)
      b.head = shared_heads[batch * sizes.heads + head];
    else
      prepare_head(b.head, batch, head);

    int64_t all_keys = shape.key_starts ? span.keys : shape.keys;
    Range blocks = split((all_keys + key_block - 1) / key_block, splits, split_index);
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      Range keys{block * key_block, minimum((block + 1) * key_block, all_keys)};
      bool touched = run_key_block(b, span, batch, kv_head, head, keys, grad_query);
      if (!touched && adds) continue;
      enter_phase(Phase::output);
      if (call.grad_key.data)
        store_rows(b.grad_key, touched, adds, keys, span, batch, kv_head, call.grad_key, sizes.key_size, (T)shape.scale);
      if (call.grad_value.data)
        store_rows(b.grad_value, touched, adds, keys, span, batch, kv_head, call.grad_value, sizes.value_size, T(1));
    }
    enter_phase(Phase::output);
    if (splits == 1 && call.grad_query.data) write_query(grad_query, batch, head);
  }

  void prepare_head(const PackedHead<T>& packed, int64_t batch, int64_t head) const {
    packed.prepare(call, sizes, batch, head, delta_row(batch, head));
  }

  // Everything that one block of keys and one query head have to do with each other; false if no query sees a key.
  bool run_key_block(Buffers& b, const SequenceSpan& span, int64_t batch, int64_t kv_head, int64_t head, Range keys,
                     T* grad_query) {
    Range seen{maximum(keys.begin, span.unpadded.begin), minimum(keys.end, span.unpadded.end)};
    if (seen.count() <= 0) return false;
    Range queries = sizes.seen_from(span, seen.begin, seen.end - 1);
    if (queries.count() <= 0) return false;
    enter_phase(Phase::pack);
    Range used{keys.begin, minimum(keys.end, span.keys)};
    RowBlock<T> key_block_rows =
        key_rows<T>(shape, call.key, span, batch, kv_head, used, sizes.key_size, b.key_copy, b.key_tiles);
    RowBlock<T> value_block_rows =
        key_rows<T>(shape, call.value, span, batch, kv_head, used, sizes.value_size, b.value_copy, b.value_tiles);
    memset(b.grad_key, 0, (size_t)(key_panels * key_block * W) * sizeof(T));
    memset(b.grad_value, 0, (size_t)(value_panels * key_block * W) * sizeof(T));
    int64_t last_panel = (queries.end - 1) / W + 1;
    for (int64_t first = queries.begin / W; first < last_panel; first += panels_per_block) {
      int64_t count = minimum(panels_per_block, last_panel - first);
      Range parts[panels_per_block];
      for (int64_t i = 0; i < count; ++i)
        parts[i] = run_panel(b, first + i, i, span, keys, key_block_rows, value_block_rows, grad_query);
      add_key_gradients(b, span, batch, head, first, count, parts, keys);
    }
    return true;
  }

  // One panel against one block of keys: weights and score gradients into buffer i, its share of dQ and dbias. The keys
  // that the panel sees, as rows of the block.
  Range run_panel(Buffers& b, int64_t p, int64_t i, const SequenceSpan& span, Range keys, RowBlock<T> key_block_rows,
                  RowBlock<T> value_block_rows, T* grad_query) {
    const PanelScores<T>& lane_scores = b.head.lane_scores[p];
    Range part = sizes.visible(span, lane_scores.panel.positions.begin, lane_scores.panel.positions.end - 1);
    part = {maximum(part.begin, keys.begin), minimum(part.end, keys.end)};
    if (part.count() <= 0) return {0, 0};
    int64_t skipped = part.begin - keys.begin;
    T* weights = b.weights + (i * key_block + skipped) * W;
    T* grad_scores = b.grad_scores + (i * key_block + skipped) * W;
    alignas(64) T largest[W], unused[W];
    BlockKind kind = score_block(lane_scores, b.head.query + p * sizes.key_size * W, key_block_rows.from(skipped), part,
                                 weights, largest, b.cap_slope);
    if (kind == BlockKind::hidden) return {0, 0};
    RowBlock<T> values = value_block_rows.from(skipped);
    enter_phase(Phase::values);
    for (T& value : unused) value = 0;
    multiply_rows(values, part.count(), b.head.grad_output + p * sizes.value_size * W, sizes.value_size, grad_scores, unused);
    enter_phase(Phase::score_gradient);
    score_gradients(b, p, part, weights, grad_scores);
    if (call.grad_bias.data) {
      enter_phase(Phase::bias_gradient);
      add_bias_gradient(lane_scores.panel, part, grad_scores);
    }
    if (shape.softcap != 0) {
      for (int64_t k = 0; k < part.count() * W; k += L) {
        V gradient = load(grad_scores + k);
        // The slope at a hidden score may be NaN.
        store(grad_scores + k, gradient == V{} ? V{} : gradient * load(b.cap_slope + k));
      }
    }
    if (call.grad_query.data) {
      enter_phase(Phase::query_gradient);
      alignas(64) T one[W];
      for (T& value : one) value = 1;
      weighted_sum(kind, key_block_rows.from(skipped), sizes.key_size, grad_scores, part.count(),
                   grad_query + p * sizes.key_size * W, one);
    }
    return {skipped, skipped + part.count()};
  }

  // weights: scores -> P after dropout; grad_scores: dP -> dS.
  FS_NOINLINE void score_gradients(const Buffers& b, int64_t p, Range part, T* weights, T* grad_scores) const {
    bool drops = shape.dropout > 0;
    T kept_scale = shape.dropout < 1 ? T(1 / (1 - shape.dropout)) : T(0);
    V factor = broadcast(score_factor(sizes));
    for (int half = 0; half < 2; ++half) {
      V top = load(b.head.row_maximum + p * W + half * L), scale = load(b.head.row_scale + p * W + half * L);
      V delta = load(b.head.delta + p * W + half * L);
      IntVec<T> keep[4];
      for (int64_t k = part.begin; k < part.end; ++k) {
        int64_t place = (k - part.begin) * W + half * L;
        V weight = Math<T>::exp2_nonpositive((load(weights + place) - top) * factor) * scale;
        V from_value = load(grad_scores + place), kept = weight;
        if (drops) {
          if (k == part.begin || k % 4 == 0) b.head.dropout[p].draw(half, k / 4, keep);
          V by = (V)((IntVec<T>)broadcast(kept_scale) & keep[k % 4]);
          kept = weight * by;
          from_value = (V)((IntVec<T>)from_value & keep[k % 4]) * broadcast(kept_scale);
        }
        V gradient = weight * (from_value - delta);
        // A hidden value may be NaN; its weight is zero, and so is its gradient.
        gradient = weight == V{} ? V{} : gradient;
        store(weights + place, kept);
        store(grad_scores + place, gradient);
      }
    }
  }

  // dK and dV of the block from the buffers of `count` panels.
  void add_key_gradients(Buffers& b, const SequenceSpan& span, int64_t batch, int64_t head, int64_t first, int64_t count,
                         const Range* parts, Range keys) {
    enter_phase(Phase::key_gradient);
    // Rows that a panel does not see hold something old.
    T* const buffers[] = {b.weights, b.grad_scores};
    for (int64_t i = 0; i < count; ++i)
      for (T* buffer : buffers) {
        T* rows = buffer + i * key_block * W;
        memset(rows, 0, (size_t)(parts[i].begin * W) * sizeof(T));
        memset(rows + parts[i].end * W, 0, (size_t)((keys.count() - parts[i].end) * W) * sizeof(T));
      }
    EvenSplit tiles(keys.count(), tile_count(keys.count()));
    for (int64_t tile = 0; tile < tile_count(keys.count()); ++tile) {
      Range rows = tiles.part(tile);
      Range seen{count, 0};
      for (int64_t i = 0; i < count; ++i)
        if (parts[i].begin < rows.end && parts[i].end > rows.begin) seen = {minimum(seen.begin, i), i + 1};
      if (seen.count() <= 0) continue;
      int64_t query = (first + seen.begin) * W, queries = minimum((first + seen.end) * W, span.queries) - query;
      enter_phase(Phase::value_gradient);
      if (call.grad_value.data)
        add_tile(b.weights, rows, seen.begin, call.grad_output, b.head.grad_output_rows, span, batch, head, query, queries,
                 sizes.value_size, b.grad_value);
      enter_phase(Phase::key_gradient);
      if (call.grad_key.data)
        add_tile(b.grad_scores, rows, seen.begin, call.query, b.head.query_rows, span, batch, head, query, queries,
                 sizes.key_size, b.grad_key);
    }
  }
  FS_INLINE void add_tile(const T* buffers, Range rows, int64_t first_buffer, const fastseq_heads& tensor, const T* packed,
                          const SequenceSpan& span, int64_t batch, int64_t head, int64_t query, int64_t queries, int64_t size,
                          T* gradient) const {
    const T* a = buffers + (first_buffer * key_block + rows.begin) * W;
    for (int64_t column = 0; column < size; column += W) {
      const T* right = packed ? packed + column * shape.queries + query * W
                              : row_at<T>(tensor, batch, head, span.query_start + query) + column;
      tile_table<GradientTiles, T, FS_TILE_ROWS>()[rows.count() - 1](a, key_block * W, right, packed ? W : tensor.row_stride,
                                                                     queries, gradient + column * key_block + rows.begin * W);
    }
  }

  // A block's gradient [size panels][key_block][W] to its rows in the result.
  void store_rows(const T* gradient, bool touched, bool adds, Range keys, const SequenceSpan& span, int64_t batch,
                  int64_t kv_head, const fastseq_heads& target, int64_t size, T factor) const {
    for (int64_t key = keys.begin; key < keys.end; ++key) {
      T* row = row_at<T>(target, batch, kv_head, span.key_start + key);
      if (!touched) {
        memset(row, 0, (size_t)size * sizeof(T));
        continue;
      }
      for (int64_t k = 0; k < size; k += L) {
        V value = load(gradient + k / W * key_block * W + (key - keys.begin) * W + k % W) * broadcast(factor);
        if (adds) value = value + load_partial(row + k, size - k);
        store_partial(row + k, value, size - k);
      }
    }
  }

  void add_bias_gradient(const Panel<T>& panel, Range part, const T* grad_scores) const {
    const fastseq_scores& table = call.grad_bias;
    T* base = (T*)table.data + panel.batch * table.batch_stride + panel.first_head * table.head_stride;
    if (table.query_stride && table.key_stride == 1) {
      alignas(64) T one[W];
      T* row_of[W];
      for (int64_t lane = 0; lane < W; ++lane) {
        one[lane] = 1;
        row_of[lane] = base + panel.query(lane) * table.query_stride + part.begin;
      }
      unpack_lanes<T, true>(grad_scores, part.count(), one, panel.rows, row_of);
      return;
    }
    // Sums over a block first: what is added to a long sum has more digits then.
    if (table.query_stride) {
      for (int64_t lane = 0; lane < panel.rows; ++lane) add_sum(grad_scores + lane, part, table, base, panel.query(lane), 1);
    } else {
      add_sum(grad_scores, part, table, base, 0, panel.rows);
    }
  }
  // Adds `lanes_summed` neighbouring lanes of every key to the elements that the keys have in a row of the table.
  void add_sum(const T* grad_scores, Range part, const fastseq_scores& table, T* base, int64_t query,
               int64_t lanes_summed) const {
    T* row = base + query * table.query_stride;
    T over_keys = 0;
    for (int64_t k = part.begin; k < part.end; ++k) {
      T sum = 0;
      for (int64_t lane = 0; lane < lanes_summed; ++lane) sum += grad_scores[(k - part.begin) * W + lane];
      if (table.key_stride)
        row[k * table.key_stride] += sum;
      else
        over_keys += sum;
    }
    if (!table.key_stride) *row += over_keys;
  }

  void write_query(const T* gradient /* [panels][E][W] */, int64_t batch, int64_t head) const {
    const SequenceSpan& span = sizes.spans[batch];
    alignas(64) T factor[W];
    for (T& value : factor) value = (T)shape.scale;
    for (int64_t first = 0; first < span.queries; first += W) {
      int64_t rows = minimum(W, span.queries - first);
      T* row_of[W];
      for (int64_t lane = 0; lane < W; ++lane)
        row_of[lane] = row_at<T>(call.grad_query, batch, head, span.query_start + first + minimum(lane, rows - 1));
      unpack_lanes(gradient + first * sizes.key_size, sizes.key_size, factor, rows, row_of);
    }
  }

  void add_splits(int64_t batch, int64_t head) const {
    int64_t head_size = panels * sizes.key_size * W, step = sizes.batch * sizes.heads * head_size;
    T* sum = split_query + (batch * sizes.heads + head) * head_size;
    int64_t count = (sizes.spans[batch].queries + W - 1) / W * sizes.key_size * W;
    for (int64_t i = 0; i < count; i += L) {
      V total = load(sum + i);
      for (int64_t s = 1; s < splits; ++s) total = total + load(sum + s * step + i);
      store(sum + i, total);
    }
    write_query(sum, batch, head);
  }

  void sink_gradient(int64_t head) const {
    T sink = ((const T*)shape.sinks)[head];
    double total = 0;  // over every row of the batch, of either sign
    for (int64_t batch = 0; batch < sizes.batch; ++batch) {
      const SequenceSpan& span = sizes.spans[batch];
      const T* delta = delta_row(batch, head);
      for (int64_t query = 0; query < span.queries; ++query) {
        int64_t row = span.query_start + query;
        T exponent = sink * T(log2_e) - *row_at<T>(call.row_maximum, batch, head, row) * score_factor(sizes);
        Vec<T> weight =
            Math<T>::exp2_nonpositive(broadcast(exponent)) * broadcast(*row_at<T>(call.row_scale, batch, head, row));
        total -= (double)weight[0] * (double)delta[query];
      }
    }
    ((T*)call.grad_sinks)[head] = (T)total;
  }
};

template <class T>
int attention_backward(const fastseq_attention_backward* call) {
  ProfiledCall profiled;
  if (profiled.begins<T>("attention_backward", "")) {
    profile_sizes(call->shape);
    profile_size("needs_query", call->grad_query.data != nullptr);
    profile_size("needs_key", call->grad_key.data != nullptr);
    profile_size("needs_value", call->grad_value.data != nullptr);
    profile_size("needs_bias", call->grad_bias.data != nullptr);
  }
  return AttentionBackward<T>(*call).run();
}

}  // namespace
}  // namespace fastseq::FS_ISA
