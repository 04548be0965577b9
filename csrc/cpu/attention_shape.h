// What forward and backward of attention share: the extent of each sequence, which keys a query sees, panels of query rows.
#pragma once

#include "../fastseq.h"
#include "attention_tile.h"
#include "dropout.h"
#include "math.h"
#include "pack.h"

namespace fastseq::FS_ISA {
namespace {

// Keys worked on at a time: their scores for one panel (16 KiB) stay in L1. Whole tiles, however many rows those have.
inline constexpr int64_t key_block = 126;

// One sequence of the batch.
struct SequenceSpan {
  int64_t queries, keys;
  int64_t query_start, key_start;  // first row in the tensors
  int64_t shift;                   // position of query i is i + shift
  Range unpadded;                  // keys before and after are padding
};

template <class T>
FS_INLINE T* row_at(const fastseq_heads& tensor, int64_t batch, int64_t head, int64_t row) {
  return (T*)tensor.data + batch * tensor.batch_stride + head * tensor.head_stride + row * tensor.row_stride;
}
template <class T>
FS_INLINE T* row_at(const fastseq_rows& tensor, int64_t batch, int64_t head, int64_t row) {
  return (T*)tensor.data + batch * tensor.batch_stride + head * tensor.head_stride + row;
}

FS_INLINE void profile_sizes(const fastseq_attention_shape& shape) {
  profile_size("B", shape.batch);
  profile_size("Hq", shape.heads);
  profile_size("Hkv", shape.kv_heads);
  profile_size("Sq", shape.queries);
  profile_size("Skv", shape.keys);
  profile_size("E", shape.key_size);
  profile_size("Ev", shape.value_size);
}

template <class T>
struct AttentionSizes {
  static constexpr int64_t W = panel_width<T>;

  const fastseq_attention_shape& shape;
  int64_t batch, heads, kv_heads, group, key_size, value_size;
  SequenceSpan* spans = nullptr;  // [B]
  WideKeys dropout_keys;

  explicit AttentionSizes(const fastseq_attention_shape& shape)
      : shape(shape),
        batch(shape.batch),
        heads(shape.heads),
        kv_heads(shape.kv_heads),
        group(shape.kv_heads ? shape.heads / shape.kv_heads : 0),
        key_size(shape.key_size),
        value_size(shape.value_size),
        dropout_keys(shape.dropout_seed) {}

  void fill_spans() const {
    for (int64_t b = 0; b < batch; ++b) {
      SequenceSpan& span = spans[b];
      span.query_start = shape.query_starts ? shape.query_starts[b] : 0;
      span.key_start = shape.key_starts ? shape.key_starts[b] : 0;
      span.queries = shape.query_starts ? shape.query_starts[b + 1] - span.query_start : shape.queries;
      span.keys = shape.key_starts ? shape.key_starts[b + 1] - span.key_start : shape.keys;
      if (shape.query_lengths) span.queries = minimum(span.queries, shape.query_lengths[b]);
      if (shape.key_lengths) span.keys = minimum(span.keys, shape.key_lengths[b]);
      span.shift = shape.bottom_right ? span.keys - span.queries : 0;
      span.unpadded = {0, span.keys};
      if (shape.key_padding) {
        const uint8_t* padding = shape.key_padding + b * shape.key_padding_stride;  // [Skv]
        while (span.unpadded.end > 0 && padding[span.unpadded.end - 1]) --span.unpadded.end;
        while (span.unpadded.begin < span.unpadded.end && padding[span.unpadded.begin]) ++span.unpadded.begin;
      }
    }
  }

  // What is known once the spans are: (query, key) pairs of one head, and rows, over all sequences. What masks and biases hide
  // by their values is not looked into.
  void profile_spans() const {
    if (!__builtin_expect(fastseq_profiling, 0)) return;
    int64_t pairs = 0, query_rows = 0, key_rows = 0;
    for (int64_t b = 0; b < batch; ++b) {
      query_rows += spans[b].queries;
      key_rows += spans[b].keys;
      for (int64_t query = 0; query < spans[b].queries; ++query) {
        int64_t position = query + spans[b].shift;
        pairs += maximum(0, visible(spans[b], position, position).count());
      }
    }
    profile_size("pairs", pairs);
    profile_size("query_rows", query_rows);
    profile_size("key_rows", key_rows);
  }

  // Keys that some query at positions [first, last] may see.
  FS_INLINE Range visible(const SequenceSpan& span, int64_t first, int64_t last) const {
    Range keys = span.unpadded;
    if (shape.window_left >= 0) keys.begin = maximum(keys.begin, first - shape.window_left);
    if (shape.window_right >= 0) keys.end = minimum(keys.end, last + shape.window_right + 1);
    return keys.end > keys.begin ? keys : Range{0, 0};
  }
  // Queries that may see a key of [first, last].
  FS_INLINE Range seen_from(const SequenceSpan& span, int64_t first, int64_t last) const {
    Range queries{0, span.queries};
    if (shape.window_right >= 0) queries.begin = maximum(0, first - shape.window_right - span.shift);
    if (shape.window_left >= 0) queries.end = minimum(queries.end, last + shape.window_left - span.shift + 1);
    return queries.end > queries.begin ? queries : Range{0, 0};
  }

  // Upper bound on what is computed, to decide whether a second thread is worth waking.
  int64_t score_count() const {
    int64_t count = 0;
    for (int64_t b = 0; b < batch; ++b) count += spans[b].queries * spans[b].keys;
    return count * heads;
  }
  int useful_threads(int threads, int64_t single_thread_flops = 1 << 20) const {
    return 2 * score_count() * (key_size + value_size) < single_thread_flops ? 1 : threads;
  }

  // The score is a plain multiple of the product of query and key, up to which pairs are visible.
  bool plain_scores() const { return shape.softcap == 0 && !shape.bias.data && !shape.alibi_slopes && shape.scale > 0; }
};

// panel_width query rows side by side in the lanes. Rows are those of one head; where queries are fewer than a panel, the
// rows of all heads that share keys follow each other, so that the keys are read once for all of them.
template <class T>
struct Panel {
  static constexpr int64_t W = panel_width<T>;
  int64_t batch;
  int64_t first_head;       // of row 0
  int64_t rows_per_head;    // queries of the sequence
  int64_t first_row, rows;  // rows in use, 1 ... W
  Range positions;          // of its queries: begin ... end - 1

  FS_INLINE int64_t clamped(int64_t lane) const { return first_row + minimum(lane, rows - 1); }
  FS_INLINE int64_t head(int64_t lane) const {
    int64_t row = clamped(lane);
    return row < rows_per_head ? first_head : first_head + row / rows_per_head;
  }
  FS_INLINE int64_t query(int64_t lane) const {
    int64_t row = clamped(lane);
    return row < rows_per_head ? row : row % rows_per_head;
  }
};

template <class T>
FS_INLINE Panel<T> make_panel(const SequenceSpan& span, int64_t batch, int64_t first_head, int64_t first_row, int64_t rows) {
  Panel<T> panel{batch, first_head, span.queries, first_row, rows, {}};
  bool one_head = first_row + rows <= span.queries || (first_row + rows - 1) / span.queries == first_row / span.queries;
  panel.positions = one_head ? Range{panel.query(0) + span.shift, panel.query(rows - 1) + span.shift + 1}
                             : Range{span.shift, span.queries + span.shift};
  return panel;
}

// panel[k][lane] = rows[lane][k].
template <class T>
FS_INLINE void pack_lanes(const T* const* rows /* [panel_width] */, int64_t depth, T* panel /* [depth][panel_width] */) {
  constexpr int L = lanes<T>;
  for (int lane = 0; lane < 2 * L; ++lane) __builtin_prefetch(rows[lane]);
  for (int half = 0; half < 2; ++half)
    for (int64_t k = 0; k < depth; k += L) {
      int64_t count = minimum(L, depth - k);
      Vec<T> block[L];
      for (int j = 0; j < L; ++j) {
        __builtin_prefetch(rows[half * L + j] + k + 2 * L);
        block[j] = load_partial(rows[half * L + j] + k, count);
      }
      transpose<T>(block);
      for (int64_t j = 0; j < count; ++j) store(panel + (k + j) * panel_width<T> + half * L, block[j]);
    }
}

// rows[lane][k] = panel[k][lane] * factor[lane], or += with Add, for the lanes in use.
template <class T, bool Add = false>
FS_INLINE void unpack_lanes(const T* panel /* [depth][panel_width] */, int64_t depth, const T* factor /* [panel_width] */,
                            int64_t lanes_used, T* const* rows /* [panel_width] */) {
  constexpr int L = lanes<T>;
  for (int half = 0; half < 2; ++half) {
    int64_t used = minimum(L, lanes_used - half * L);
    Vec<T> by = load(factor + half * L);
    for (int64_t k = 0; k < depth && used > 0; k += L) {
      int64_t count = minimum(L, depth - k);
      Vec<T> block[L];
      if (count == L && used == L) {
#pragma GCC unroll 16
        for (int j = 0; j < L; ++j) block[j] = load(panel + (k + j) * panel_width<T> + half * L) * by;
        transpose<T>(block);
#pragma GCC unroll 16
        for (int j = 0; j < L; ++j) {
          T* target = rows[half * L + j] + k;
          if constexpr (Add) {
            __builtin_prefetch(target + 4 * L, 1);
            block[j] = block[j] + load(target);
          }
          store(target, block[j]);
        }
        continue;
      }
      for (int j = 0; j < L; ++j) block[j] = j < count ? load(panel + (k + j) * panel_width<T> + half * L) * by : Vec<T>{};
      transpose<T>(block);
      for (int64_t j = 0; j < used; ++j) {
        T* target = rows[half * L + j] + k;
        if constexpr (Add) block[j] = block[j] + load_partial(target, count);
        store_partial(target, block[j], count);
      }
    }
  }
}

// Panels that have to read a block of keys before tiles of it pay (RowBlock::tiles).
inline constexpr int64_t panels_worth_tiles = 2;

// Rows of keys or values are read as they lie, or copied together where they are pages or lie so far apart that the rows of
// a tile would share a few cache sets.
template <class T>
FS_INLINE bool needs_copy(const fastseq_attention_shape& shape, const fastseq_heads& tensor, int64_t size) {
  constexpr int64_t slack = 256 / (int64_t)sizeof(T);
  return shape.block_table || tensor.row_stride > size + slack;
}
template <class T>
constexpr int64_t copied_stride(int64_t size) {
  return round_up(size, 64 / (int64_t)sizeof(T)) + 64 / (int64_t)sizeof(T);
}
template <class T>
FS_INLINE const T* key_row(const fastseq_attention_shape& shape, const fastseq_heads& tensor, const SequenceSpan& span,
                           int64_t batch, int64_t head, int64_t key) {
  if (shape.block_table) {
    int64_t block = shape.block_table[batch * shape.blocks_per_sequence + key / shape.block_size];
    return row_at<T>(tensor, block, head, key % shape.block_size);
  }
  return row_at<T>(tensor, batch, head, span.key_start + key);
}
template <class T>
FS_INLINE RowBlock<T> key_rows(const fastseq_attention_shape& shape, const fastseq_heads& tensor, const SequenceSpan& span,
                               int64_t batch, int64_t head, Range keys, int64_t size,
                               T* copy /* [key_block][copied_stride] or NULL */,
                               T* tiles = nullptr /* [tiles_size] or NULL: not wanted */) {
  RowBlock<T> block{copy, copied_stride<T>(size)};
  if (!copy) {
    block.data = key_row<T>(shape, tensor, span, batch, head, keys.begin);
    block.stride = tensor.row_stride;
  } else {
    constexpr int64_t ahead = 8, line = 64 / (int64_t)sizeof(T);
    for (int64_t key = keys.begin; key < keys.end; ++key) {
      if (key + ahead < keys.end) {
        const T* next = key_row<T>(shape, tensor, span, batch, head, key + ahead);
        for (int64_t i = 0; i < size; i += line) __builtin_prefetch(next + i);
      }
      copy_row(key_row<T>(shape, tensor, span, batch, head, key), size, copy + (key - keys.begin) * block.stride);
    }
  }
  if (tiles) block.pack(keys.count(), size, tiles);
  return block;
}

}  // namespace
}  // namespace fastseq::FS_ISA
