// From products of queries and keys to scores: soft-cap, bias, ALiBi, everything that hides a pair; and dropout.
// Buffers are [key][panel_width]: a row per key, a lane per query of the panel.
#pragma once

#include "attention_shape.h"

namespace fastseq::FS_ISA {
namespace {

inline constexpr double log2_e = 1.44269504088896340735992468100189214;
inline constexpr double ln_2 = 0.693147180559945309417232121458176568;

template <class T>
FS_INLINE Vec<T> negative_infinity() {
  return broadcast<T>(T(-__builtin_inff()));
}

// What is fixed for the lanes of one panel.
template <class T>
struct PanelScores {
  static constexpr int L = lanes<T>;
  static constexpr int64_t W = panel_width<T>;
  using Integer = decltype(IntVec<T>{}[0] + 0);

  const AttentionSizes<T>* sizes;
  Panel<T> panel;
  alignas(64) T position[W];
  alignas(64) T slope[W];
  int64_t position_of[W];
  const T* bias[W];        // row of the lane, or NULL
  const uint8_t* mask[W];  // likewise
  const uint8_t* padding;  // [Skv] or NULL

  void prepare(const AttentionSizes<T>& all, const Panel<T>& rows) {
    sizes = &all;
    panel = rows;
    const fastseq_attention_shape& shape = all.shape;
    int64_t shift = all.spans[rows.batch].shift;
    for (int64_t lane = 0; lane < W; ++lane) {
      int64_t head = rows.head(lane), query = rows.query(lane);
      position_of[lane] = query + shift;
      position[lane] = (T)(query + shift);
      slope[lane] = shape.alibi_slopes ? ((const T*)shape.alibi_slopes)[rows.batch * shape.alibi_batch_stride + head] : T(0);
      bias[lane] = row_of((const T*)shape.bias.data, shape.bias, head, query);
      mask[lane] = row_of((const uint8_t*)shape.mask.data, shape.mask, head, query);
    }
    padding = shape.key_padding ? shape.key_padding + rows.batch * shape.key_padding_stride : nullptr;
  }
  template <class Element>
  FS_INLINE const Element* row_of(const Element* data, const fastseq_scores& table, int64_t head, int64_t query) const {
    return data ? data + panel.batch * table.batch_stride + head * table.head_stride + query * table.query_stride : nullptr;
  }

  // Whether every query of the panel sees every key of the range as far as positions go.
  FS_INLINE bool all_in_window(Range keys) const {
    const fastseq_attention_shape& shape = sizes->shape;
    return (shape.window_left < 0 || keys.begin >= panel.positions.end - 1 - shape.window_left) &&
           (shape.window_right < 0 || keys.end - 1 <= panel.positions.begin + shape.window_right);
  }

  enum class Seen { none, some, all };
  // What the mask and the padding leave of a range of keys.
  Seen seen(Range keys) const {
    bool any = true, all = true;
    if (padding) {
      any = false;
      for (int64_t k = keys.begin; k < keys.end; ++k) padding[k] ? all = false : any = true;
      if (!any) return Seen::none;
    }
    if (mask[0]) {
      const fastseq_scores& table = sizes->shape.mask;
      uint8_t one = 0, every = 1;
      int64_t lanes_apart = table.query_stride || table.head_stride ? panel.rows : 1;
      for (int64_t lane = 0; lane < lanes_apart; ++lane) {
        if (table.key_stride == 1) {
          for (int64_t k = keys.begin; k < keys.end; ++k) {
            one |= mask[lane][k];
            every &= mask[lane][k] != 0;
          }
        } else {
          for (int64_t k = keys.begin; k < keys.end; ++k) {
            one |= mask[lane][k * table.key_stride];
            every &= mask[lane][k * table.key_stride] != 0;
          }
        }
      }
      if (!one) return Seen::none;
      all = all && every;
    }
    return all ? Seen::all : Seen::some;
  }

  // Asks for the biases of a block while its products are computed: 32 rows are more streams than a processor follows.
  FS_INLINE void prefetch_bias(Range keys) const {
    constexpr int64_t line = 64 / (int64_t)sizeof(T);
    const fastseq_scores& table = sizes->shape.bias;
    if (!bias[0] || table.key_stride != 1) return;
    int64_t lanes_apart = table.query_stride || table.head_stride ? panel.rows : 1;
    for (int64_t lane = 0; lane < lanes_apart; ++lane)
      for (int64_t key = keys.begin; key < keys.end; key += line) __builtin_prefetch(bias[lane] + key, 0, 2);
  }

  // block[j] lane l = rows[l][first + j] for j < count, from a bias or (as 0 and 1) a mask.
  template <class Element>
  FS_INLINE void load_block(const Element* const* rows, const fastseq_scores& table, int64_t first, int64_t count,
                            Vec<T>* block) const {
    if (table.query_stride == 0 && (table.head_stride == 0 || panel.rows_per_head > panel.first_row + panel.rows - 1)) {
      for (int64_t j = 0; j < count; ++j) block[j] = broadcast<T>((T)rows[0][(first + j) * table.key_stride]);
      return;
    }
    if (table.key_stride == 1 && count == L) {
#pragma GCC unroll 16
      for (int lane = 0; lane < L; ++lane) {
        // As many streams as lanes are more than the processor follows by itself.
        __builtin_prefetch(rows[lane] + first + 4 * L);
        block[lane] = widen(rows[lane] + first);
      }
    } else {
      alignas(64) T values[L][L] = {};
      for (int lane = 0; lane < L; ++lane)
        for (int64_t j = 0; j < count; ++j) values[lane][j] = (T)rows[lane][(first + j) * table.key_stride];
      for (int lane = 0; lane < L; ++lane) block[lane] = load(values[lane]);
    }
    transpose<T>(block);
  }
  static FS_INLINE Vec<T> widen(const T* source) { return load(source); }
  static FS_INLINE Vec<T> widen(const uint8_t* source) {
    typedef uint8_t Bytes __attribute__((vector_size(L)));
    Bytes bytes;
    memcpy(&bytes, source, sizeof(bytes));
    return __builtin_convertvector(bytes, Vec<T>);
  }

  // products[k - keys.begin] -> scores in place, -Inf where a pair is hidden; `largest` becomes their maximum per lane.
  // Unless the scores are plain they leave here in natural units, else as unscaled products.
  // cap_slope, where given, takes the derivative of the soft-cap. True if the bias hides a pair.
  FS_NOINLINE bool adjust(Range keys, bool in_window, bool masked, T* products, T* largest, T* cap_slope = nullptr) const {
    const fastseq_attention_shape& shape = sizes->shape;
    bool transforms = !sizes->plain_scores();
    T scale = (T)shape.scale, cap = (T)shape.softcap, inverse_cap = shape.softcap ? T(1 / shape.softcap) : T(0);
    bool only_bias = bias[0] && cap == 0 && !shape.alibi_slopes && in_window && !masked, hides = false;
    for (int half = 0; half < 2; ++half) {
      Vec<T> top = negative_infinity<T>();
      Vec<T> at = load(position + half * L), slopes = load(slope + half * L);
      IntVec<T> first_seen{}, last_seen{};
      for (int j = 0; j < L; ++j) {
        int64_t where = position_of[half * L + j] - keys.begin;
        first_seen[j] = shape.window_left < 0 ? 0 : (Integer)maximum(0, minimum(where - shape.window_left, key_block + 1));
        last_seen[j] =
            shape.window_right < 0 ? (Integer)key_block : (Integer)maximum(-1, minimum(where + shape.window_right, key_block));
      }
      for (int64_t first = keys.begin; first < keys.end; first += L) {
        int64_t count = minimum(L, keys.end - first);
        Vec<T> addend[L], keep[L];
        if (bias[0]) load_block(bias + half * L, shape.bias, first, count, addend);
        if (masked && mask[0]) load_block(mask + half * L, shape.mask, first, count, keep);
        bool hides_here = bias[0] && holds_negative_infinity(addend, count);
        hides = hides || hides_here;
        if (only_bias && !hides_here) {
          T* place = products + (first - keys.begin) * W + half * L;
          for (int64_t j = 0; j < count; ++j, place += W) {
            Vec<T> score = fused_multiply_add(load(place), broadcast(scale), addend[j]);
            store(place, score);
            top = at_least(top, score);
          }
          continue;
        }
        for (int64_t j = 0; j < count; ++j) {
          int64_t row = first + j - keys.begin;
          T* place = products + row * W + half * L;
          Vec<T> score = load(place);
          if (transforms) {
            score = score * broadcast(scale);
            if (cap != 0) {
              Vec<T> bent = Math<T>::tanh(score * broadcast(inverse_cap));
              score = bent * broadcast(cap);
              if (cap_slope) store(cap_slope + row * W + half * L, fused_negate_multiply_add(bent, bent, broadcast(T(1))));
            }
            if (bias[0]) {
              score = cap != 0 ? score + addend[j] : fused_multiply_add(load(place), broadcast(scale), addend[j]);
              score = addend[j] == negative_infinity<T>() ? negative_infinity<T>() : score;
            }
            if (shape.alibi_slopes) {
              Vec<T> distance = at - broadcast((T)(first + j));
              distance = distance < broadcast(T(0)) ? -distance : distance;
              score = fused_negate_multiply_add(slopes, distance, score);
            }
          }
          if (!in_window) {
            IntVec<T> here = IntVec<T>{} + (Integer)row;
            score = ((here >= first_seen) & (here <= last_seen)) ? score : negative_infinity<T>();
          }
          if (masked) {
            if (mask[0]) score = keep[j] == broadcast(T(0)) ? negative_infinity<T>() : score;
            if (padding && padding[first + j]) score = negative_infinity<T>();
          }
          store(place, score);
          top = at_least(top, score);
        }
      }
      store(largest + half * L, top);
    }
    return hides;
  }
  static FS_INLINE bool holds_negative_infinity(const Vec<T>* rows, int64_t count) {
    IntVec<T> found{};
    for (int64_t j = 0; j < count; ++j) found |= (IntVec<T>)(rows[j] == negative_infinity<T>());
    Integer any = 0;
    for (int lane = 0; lane < L; ++lane) any |= found[lane];
    return any != 0;
  }
};

// What became of a block of pairs: nothing to see, all seen, or some hidden.
enum class BlockKind { hidden, whole, partial };

// scores[k - keys.begin] of a panel against some keys, as PanelScores::adjust leaves them.
template <class T>
FS_INLINE BlockKind score_block(const PanelScores<T>& lane_scores, const T* query_panel /* [E][panel_width] */,
                                RowBlock<T> key_rows, Range keys, T* scores, T* largest /* [panel_width] */,
                                T* cap_slope = nullptr) {
  using Seen = typename PanelScores<T>::Seen;
  const AttentionSizes<T>& sizes = *lane_scores.sizes;
  Seen seen = Seen::all;
  if (lane_scores.padding || lane_scores.mask[0]) {
    enter_phase(Phase::mask);
    seen = lane_scores.seen(keys);
  }
  if (seen == Seen::none) return BlockKind::hidden;
  enter_phase(Phase::scores);
  lane_scores.prefetch_bias(keys);
  bool in_window = lane_scores.all_in_window(keys);
  store(largest, negative_infinity<T>());
  store(largest + lanes<T>, negative_infinity<T>());
  multiply_rows(key_rows, keys.count(), query_panel, sizes.key_size, scores, largest);
  bool partial = !in_window || seen == Seen::some;
  if (partial || !sizes.plain_scores()) {
    enter_phase(Phase::mask);
    bool hides = lane_scores.adjust(keys, in_window, seen == Seen::some, scores, largest, cap_slope);
    partial = partial || hides;
  }
  return partial ? BlockKind::partial : BlockKind::whole;
}

// Factor from what score_block leaves to units of log 2.
template <class T>
FS_INLINE T score_factor(const AttentionSizes<T>& sizes) {
  return (T)(sizes.plain_scores() ? sizes.shape.scale * log2_e : log2_e);
}

// Whether rows of keys or values hold neither Inf nor NaN. A weight of zero hides a finite value, but not those.
template <class T>
FS_NOINLINE bool all_finite(RowBlock<T> rows, int64_t count, int64_t size) {
  Vec<T> sum{};
  for (int64_t row = 0; row < count; ++row)
    for (int64_t k = 0; k < size; k += lanes<T>)
      sum = fused_multiply_add(load_partial(rows.data + row * rows.stride + k, size - k), Vec<T>{}, sum);
  for (int lane = 0; lane < lanes<T>; ++lane)
    if (sum[lane] != 0) return false;
  return true;
}

// multiply_columns for rows with Inf or NaN: where a weight is zero its row does not take part at all.
template <class T>
FS_NOINLINE void multiply_columns_where_weighted(RowBlock<T> rows, int64_t columns, const T* weights, int64_t depth, T* c,
                                                 const T* factor) {
  for (int half = 0; half < 2; ++half)
    for (int64_t column = 0; column < columns; ++column) {
      T* place = c + column * panel_width<T> + half * lanes<T>;
      Vec<T> sum = factor ? load(place) * load(factor + half * lanes<T>) : Vec<T>{};
      for (int64_t k = 0; k < depth; ++k) {
        Vec<T> weight = load(weights + k * panel_width<T> + half * lanes<T>);
        Vec<T> next = fused_multiply_add(broadcast(rows.data[k * rows.stride + column]), weight, sum);
        sum = weight == Vec<T>{} ? sum : next;
      }
      store(place, sum);
    }
}

// c[columns][panel_width] = rows^T * weights + c * factor; a NULL factor: c is only written.
template <class T>
FS_INLINE void weighted_sum(BlockKind kind, RowBlock<T> rows, int64_t columns, const T* weights, int64_t depth, T* c,
                            const T* factor) {
  if (kind == BlockKind::partial && !all_finite(rows, depth, columns))
    multiply_columns_where_weighted(rows, columns, weights, depth, c, factor);
  else
    multiply_columns(rows.data, rows.stride, columns, weights, panel_width<T>, depth, c, factor);
}

// A sink joins the sum of a row that has seen some key, whose maximum and sum it changes; what was summed before is to be
// multiplied by `shrink`. A row that has seen nothing stays empty.
template <class T>
FS_INLINE void join_sink(T sink, T factor, T& maximum, T& sum, T& shrink) {
  if (sum == 0) return;
  T logit = T(sink * log2_e / factor), largest = logit > maximum ? logit : maximum;
  shrink = Math<T>::exp2_nonpositive(broadcast((maximum - largest) * factor))[0];
  sum = sum * shrink + Math<T>::exp2_nonpositive(broadcast((logit - largest) * factor))[0];
  maximum = largest;
}

// What forward says about one row besides its output.
template <class T>
FS_INLINE void write_row_statistics(const fastseq_attention_forward& call, T factor, int64_t batch, int64_t head, int64_t row,
                                    T maximum, T sum) {
  if (call.lse.data)
    *row_at<T>(call.lse, batch, head, row) = (T)((double)maximum * (double)factor * ln_2 + __builtin_log((double)sum));
  if (call.row_maximum.data) {
    *row_at<T>(call.row_maximum, batch, head, row) = maximum == T(-__builtin_inff()) ? T(0) : maximum;
    *row_at<T>(call.row_scale, batch, head, row) = sum == 0 ? T(0) : 1 / sum;
  }
}

// --- Dropout

// Which weights of a panel dropout takes.
template <class T>
struct PanelDropout {
  static constexpr int L = lanes<T>, wide_lanes = FS_VECTOR_BYTES / 8;
  static constexpr int parts = L / wide_lanes;  // float lanes are drawn as even and odd ones
  using Constants = PhiloxConstants;
  uint64_t threshold, seed;
  uint32_t offset;
  const WideKeys* keys;
  // What the words of query and head have become after two of Philox's rounds, in which they do not meet that of the keys; the
  // part of the first word that is not the keys', of the third, and the fourth.
  WideVector first_word[2][parts], third_word[2][parts], fourth_word[2][parts];

  void prepare(const AttentionSizes<T>& sizes, const Panel<T>& panel) {
    threshold = dropout_threshold(sizes.shape.dropout);
    seed = sizes.shape.dropout_seed;
    keys = &sizes.dropout_keys;
    offset = (uint32_t)sizes.shape.dropout_offset;
    for (int64_t lane = 0; lane < 2 * L; ++lane) {
      int half = (int)(lane / L), part = (int)(lane % L % parts), place = (int)(lane % L / parts);
      uint64_t by_head = (uint64_t)(uint32_t)(panel.batch * sizes.heads + panel.head(lane)) * Constants::multiplier1;
      uint32_t word = (uint32_t)(by_head >> 32) ^ (uint32_t)panel.query(lane) ^ (uint32_t)seed;
      uint64_t by_word = (uint64_t)word * Constants::multiplier0;
      first_word[half][part][place] = (uint32_t)by_head;
      third_word[half][part][place] = by_word >> 32;
      fourth_word[half][part][place] = (uint32_t)by_word;
    }
  }

  // For the four keys from 4 * key_group and one half of the panel: all bits set where the weight stays.
  FS_INLINE void draw(int half, int64_t key_group, IntVec<T>* keep /* [4] */) const {
    // The same two rounds for the keys' word, once for all lanes.
    uint64_t by_group = (uint64_t)(uint32_t)key_group * Constants::multiplier0;
    uint64_t by_word = (uint64_t)((uint32_t)(by_group >> 32) ^ offset ^ philox_key(seed, 0, 1)) * Constants::multiplier1;
    WideVector first = wide_word((uint32_t)(by_word >> 32) ^ philox_key(seed, 1, 0)), second = wide_word((uint32_t)by_word);
    WideVector third = wide_word((uint32_t)by_group ^ philox_key(seed, 1, 1));
    WideVector word[parts][4];
    for (int part = 0; part < parts; ++part) {
      word[part][0] = first ^ first_word[half][part];
      word[part][1] = second;
      word[part][2] = third ^ third_word[half][part];
      word[part][3] = fourth_word[half][part];
      keys->run(word[part], 2);
    }
    for (int i = 0; i < 4; ++i) {
      if constexpr (parts == 2) {
        typedef uint32_t Words __attribute__((vector_size(FS_VECTOR_BYTES)));
        Words both = (Words)(word[0][i] | word[1][i] << 32), least = Words{} + (uint32_t)threshold;
        keep[i] = (IntVec<T>)(both >= least);
        if (threshold >> 32) keep[i] = IntVec<T>{};  // nothing stays
      } else {
        keep[i] = (IntVec<T>)(word[0][i] >= threshold);
      }
    }
  }

  // Zeroes what is dropped of values[key - keys.begin]; with `second`, there as well.
  FS_NOINLINE void apply(Range keys, T* values /* [keys][panel_width] */, T* second = nullptr) const {
    for (int half = 0; half < 2; ++half)
      for (int64_t group = keys.begin / 4; group * 4 < keys.end; ++group) {
        IntVec<T> keep[4];
        draw(half, group, keep);
        for (int64_t key = maximum(group * 4, keys.begin); key < minimum(group * 4 + 4, keys.end); ++key) {
          int64_t place = (key - keys.begin) * panel_width<T> + half * L;
          IntVec<T> kept = keep[key - group * 4];
          store(values + place, (Vec<T>)((IntVec<T>)load(values + place) & kept));
          if (second) store(second + place, (Vec<T>)((IntVec<T>)load(second + place) & kept));
        }
      }
  }
};

// What the kernels draw, written out: keep[B, Hq, Sq, Skv].
inline void dropout_mask(const fastseq_attention_shape* shape, uint8_t* keep) {
  using T = float;
  constexpr int64_t W = panel_width<T>;
  constexpr int L = lanes<T>;
  AttentionSizes<T> sizes(*shape);
  for (int64_t i = 0; i < shape->batch * shape->heads; ++i, keep += shape->queries * shape->keys)
    for (int64_t first = 0; first < shape->queries; first += W) {
      Panel<T> panel{i / shape->heads, i % shape->heads, shape->queries, first, minimum(W, shape->queries - first), {}};
      PanelDropout<T> dropout;
      dropout.prepare(sizes, panel);
      for (int half = 0; half < 2; ++half)
        for (int64_t group = 0; group * 4 < shape->keys; ++group) {
          IntVec<T> kept[4];
          dropout.draw(half, group, kept);
          for (int64_t lane = half * L; lane < minimum(panel.rows, (half + 1) * L); ++lane)
            for (int64_t key = group * 4; key < minimum(group * 4 + 4, shape->keys); ++key)
              keep[(first + lane) * shape->keys + key] = kept[key % 4][lane % L] != 0;
        }
    }
}

}  // namespace
}  // namespace fastseq::FS_ISA
