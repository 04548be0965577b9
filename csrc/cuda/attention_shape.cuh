// What forward and backward of attention share: rows of each sequence, which pairs are visible, a pair's score, its dropout.
// The formula is in fastseq.h. Nothing here is specific to a kernel: one text serves every mask and option.
#pragma once

#include "device.cuh"
// After device.cuh, which says how its functions are declared.
#include "../attention/philox.h"

namespace fastseq::cuda {
namespace {

struct Span {
  int64_t queries, keys;           // that take part
  int64_t query_rows, key_rows;    // that there are in the tensors: results of the others are zero
  int64_t query_start, key_start;  // first row in the tensors
  int64_t shift;                   // position of query i is i + shift

  FS_INLINE Span(const fastseq_attention_shape& shape, int64_t b) {
    query_start = shape.query_starts ? shape.query_starts[b] : 0;
    key_start = shape.key_starts ? shape.key_starts[b] : 0;
    query_rows = shape.query_starts ? shape.query_starts[b + 1] - query_start : shape.queries;
    key_rows = shape.key_starts ? shape.key_starts[b + 1] - key_start : shape.keys;
    queries = shape.query_lengths ? smaller(query_rows, shape.query_lengths[b]) : query_rows;
    keys = shape.key_lengths ? smaller(key_rows, shape.key_lengths[b]) : key_rows;
    shift = shape.bottom_right ? keys - queries : 0;
  }
};

struct Stretch {
  int64_t begin, end;
};
// Keys that some query of [first, last] may see, and the other way round.
FS_INLINE Stretch keys_seen(const fastseq_attention_shape& shape, const Span& span, int64_t first, int64_t last) {
  Stretch keys{0, span.keys};
  if (shape.window_left >= 0) keys.begin = larger<int64_t>(0, first + span.shift - shape.window_left);
  if (shape.window_right >= 0) keys.end = smaller(keys.end, last + span.shift + shape.window_right + 1);
  return keys;
}
FS_INLINE Stretch queries_seeing(const fastseq_attention_shape& shape, const Span& span, int64_t first, int64_t last) {
  Stretch queries{0, span.queries};
  if (shape.window_right >= 0) queries.begin = larger<int64_t>(0, first - shape.window_right - span.shift);
  if (shape.window_left >= 0) queries.end = smaller(queries.end, last + shape.window_left - span.shift + 1);
  return queries;
}

template <class S>
FS_INLINE S* row_at(const fastseq_heads& tensor, int64_t batch, int64_t head, int64_t row) {
  return (S*)tensor.data + batch * tensor.batch_stride + head * tensor.head_stride + row * tensor.row_stride;
}
template <class A>
FS_INLINE A* row_at(const fastseq_rows& tensor, int64_t batch, int64_t head, int64_t row) {
  return (A*)tensor.data + batch * tensor.batch_stride + head * tensor.head_stride + row;
}
template <class T>
FS_INLINE T* score_at(const fastseq_scores& table, int64_t batch, int64_t head, int64_t query, int64_t key) {
  return (T*)table.data + batch * table.batch_stride + head * table.head_stride + query * table.query_stride +
         key * table.key_stride;
}
template <class S>
FS_INLINE const S* key_row(const fastseq_attention_shape& shape, const fastseq_heads& tensor, const Span& span, int64_t batch,
                           int64_t head, int64_t key) {
  if (!shape.block_table) return row_at<S>(tensor, batch, head, span.key_start + key);
  int64_t block = shape.block_table[batch * shape.blocks_per_sequence + key / shape.block_size];
  return row_at<S>(tensor, block, head, key % shape.block_size);
}

FS_INLINE float minus_infinity(float) { return -INFINITY; }
FS_INLINE double minus_infinity(double) { return -(double)INFINITY; }

// The scores of one head of one sequence.
template <class S>
struct Scorer {
  using A = Sum<S>;
  const fastseq_attention_shape& shape;
  const Span& span;
  int64_t batch, head;
  A scale, softcap, alibi_slope, kept_scale;
  uint64_t threshold;  // of dropout; 0: none

  FS_INLINE Scorer(const fastseq_attention_shape& shape, const Span& span, int64_t batch, int64_t head)
      : shape(shape),
        span(span),
        batch(batch),
        head(head),
        scale((A)shape.scale),
        softcap((A)shape.softcap),
        alibi_slope(zero_without<S>(shape.alibi_slopes, batch * shape.alibi_batch_stride + head)),
        kept_scale(shape.dropout < 1 ? (A)(1 / (1 - shape.dropout)) : A(0)),
        threshold(dropout_threshold(shape.dropout)) {}

  struct Score {
    bool visible;
    A value;
    A slope;  // its derivative with respect to the product of query and key
  };
  FS_INLINE Score operator()(A product, int64_t i, int64_t j) const {
    Score score{false, A(0), scale};
    if (i >= span.queries || j >= span.keys) return score;
    int64_t distance = j - (i + span.shift);
    if (shape.window_left >= 0 && distance < -shape.window_left) return score;
    if (shape.window_right >= 0 && distance > shape.window_right) return score;
    if (shape.mask.data && !*score_at<uint8_t>(shape.mask, batch, head, i, j)) return score;
    if (shape.key_padding && shape.key_padding[batch * shape.key_padding_stride + j]) return score;
    score.value = product * scale;
    if (softcap > A(0)) {
      A t = hyperbolic_tangent(score.value / softcap);
      score.value = softcap * t;
      score.slope = scale * multiply_add(-t, t, A(1));
    }
    if (shape.bias.data) {
      A bias = widen(*score_at<S>(shape.bias, batch, head, i, j));
      if (bias == minus_infinity(bias)) return score;
      score.value += bias;
    }
    if (shape.alibi_slopes) score.value -= alibi_slope * (A)(distance < 0 ? -distance : distance);
    score.visible = true;
    return score;
  }

  // What dropout multiplies the pair's weight with.
  FS_INLINE A kept(int64_t i, int64_t j) const {
    if (threshold == 0) return A(1);
    uint64_t word[4] = {(uint64_t)(j / 4) & 0xffffffffu, (uint64_t)i & 0xffffffffu,
                        (uint64_t)(batch * shape.heads + head) & 0xffffffffu, shape.dropout_offset & 0xffffffffu};
    philox(
        word, [](uint64_t a, uint64_t b) { return (a & 0xffffffffu) * b; }, [](uint32_t value) { return (uint64_t)value; },
        [&](int round, int i) { return (uint64_t)philox_key(shape.dropout_seed, round, i); });
    uint64_t drawn = j % 4 == 0 ? word[0] : j % 4 == 1 ? word[1] : j % 4 == 2 ? word[2] : word[3];
    return drawn >= threshold ? kept_scale : A(0);
  }
};

}  // namespace
}  // namespace fastseq::cuda
