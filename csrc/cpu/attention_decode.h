// Attention of a few query rows against many keys, as in decoding: reading keys and values is all that costs, so each is read
// once for all the query rows that share it, vectors run along the head, and where sequences and heads are few the keys are
// cut into splits whose partial results are joined at the end. The number of splits depends on sizes alone.
#pragma once

#include "attention_scores.h"
#include "dots.h"

namespace fastseq::FS_ISA {
namespace {

template <class T>
struct AttentionDecode {
  using V = Vec<T>;
  static constexpr int64_t W = panel_width<T>;
  static constexpr int L = lanes<T>;
  // Keys and values that the second-level caches do not hold mostly come from memory.
  static constexpr int64_t cached_bytes = 1 << 20;
  static constexpr int64_t most_rows = 8;                           // of all query heads that share keys
  static constexpr int64_t score_stride = round_up(key_block, 64);  // of a row of scores: whole vectors
  // Keys and values are read once: 512 KiB of them take one thread 30 us and more, several times what waking a second does.
  static constexpr int64_t single_thread_flops = 1 << 18;
  static constexpr int64_t wanted_pieces = 16, fewest_keys = 256;  // of a split

  // What one split knows about the rows of one key head.
  struct Partial {
    T maximum[most_rows];  // of the scores as score_block leaves them
    T sum[most_rows];
  };

  const fastseq_attention_forward& call;
  const fastseq_attention_shape& shape;
  AttentionSizes<T> sizes;
  int64_t splits, output_stride, query_stride;
  bool from_memory;             // rather than from a cache
  bool unmarked;                // nothing but lengths decides what is seen, and scores are plain
  Partial* partials;            // [B][Hkv][splits]
  T* outputs;                   // [B][Hkv][splits][most_rows][output_stride]
  T* queries;                   // [threads][most_rows][query_stride]
  T* scores;                    // [threads][most_rows][key_block]
  T* panels;                    // [threads][key_block][W]
  PanelScores<T>* lane_scores;  // [threads]
  WorkQueue queue;
  Barrier barrier;

  static bool applies(const fastseq_attention_forward& call) {
    const fastseq_attention_shape& shape = call.shape;
    return shape.kv_heads > 0 && shape.heads / shape.kv_heads * shape.queries <= minimum(most_rows, W) && shape.dropout == 0 &&
           !call.weights.data && !shape.query_lengths;
  }

  explicit AttentionDecode(const fastseq_attention_forward& call) : call(call), shape(call.shape), sizes(call.shape) {
    int64_t pieces = sizes.batch * sizes.kv_heads;
    splits = pieces ? minimum((wanted_pieces + pieces - 1) / pieces, (shape.keys + fewest_keys - 1) / fewest_keys) : 1;
    splits = maximum(splits, 1);
    from_memory = pieces * shape.keys * (sizes.key_size + sizes.value_size) * (int64_t)sizeof(T) > cached_bytes;
    unmarked = sizes.plain_scores() && !shape.key_padding && !shape.mask.data && shape.window_left < 0 &&
               (shape.window_right < 0 || (shape.bottom_right && shape.queries == 1));
    output_stride = round_up(sizes.value_size, L);
    query_stride = round_up(sizes.key_size, L);
  }

  void lay_out(Arena& arena, int threads) {
    sizes.spans = arena.take<SequenceSpan>(sizes.batch);
    int64_t pieces = sizes.batch * sizes.kv_heads * splits;
    partials = arena.take<Partial>(pieces);
    outputs = arena.take<T>(pieces * most_rows * output_stride);
    queries = arena.take<T>(threads * most_rows * query_stride);
    scores = arena.take<T>(threads * most_rows * score_stride);
    panels = arena.take<T>(threads * key_block * W);
    lane_scores = arena.take<PanelScores<T>>(threads);
  }

  int run() {
    int threads = shape.threads;
    Arena arena{nullptr};
    lay_out(arena, threads);
    arena = Arena{(char*)fastseq_workspace(arena.used)};
    if (!arena.base) return FASTSEQ_OUT_OF_MEMORY;
    lay_out(arena, threads);
    sizes.fill_spans();
    sizes.profile_spans();
    auto body = [this](int rank, int size) {
      Team team{rank, size, &barrier};
      int64_t heads = sizes.batch * sizes.kv_heads;
      if (size == 1) {
        // Nothing to share out, and a division per head is felt in the smallest calls.
        for (int64_t batch = 0; batch < sizes.batch; ++batch)
          for (int64_t head = 0; head < sizes.kv_heads; ++head)
            for (int64_t s = 0; s < splits; ++s) run_split(rank, batch, head, s);
      } else {
        for (int64_t piece; (piece = queue.take()) < heads * splits;)
          run_split(rank, piece / splits / sizes.kv_heads, piece / splits % sizes.kv_heads, piece % splits);
      }
      team.wait();
      enter_phase(Phase::join);
      Range mine = split(heads, size, rank);
      for (int64_t i = mine.begin; i < mine.end; ++i) join_splits(i / sizes.kv_heads, i % sizes.kv_heads);
    };
    run_parallel(sizes.useful_threads(threads, single_thread_flops), body);
    return FASTSEQ_OK;
  }

  void run_split(int rank, int64_t batch, int64_t kv_head, int64_t split_index) {
    const SequenceSpan& span = sizes.spans[batch];
    enter_phase(Phase::pack);
    int64_t piece = (batch * sizes.kv_heads + kv_head) * splits + split_index;
    int64_t rows = sizes.group * span.queries;
    if (rows == 0) return;
    Panel<T> panel = make_panel<T>(span, batch, kv_head * sizes.group, 0, rows);
    if (!unmarked) lane_scores[rank].prepare(sizes, panel);
    T* query = queries + rank * most_rows * query_stride;
    Partial& partial = partials[piece];
    T* output = outputs + piece * most_rows * output_stride;
    for (int64_t row = 0; row < rows; ++row) {
      const T* source = row_at<T>(call.query, batch, panel.head(row), span.query_start + panel.query(row));
      for (int64_t k = 0; k < query_stride; k += L)
        store(query + row * query_stride + k, load_partial(source + k, sizes.key_size - k));
      partial.maximum[row] = T(-__builtin_inff());
      partial.sum[row] = T(0);
      memset(output + row * output_stride, 0, (size_t)output_stride * sizeof(T));
    }
    Range visible = sizes.visible(span, panel.positions.begin, panel.positions.end - 1);
    Range part = splits == 1 ? Range{0, visible.count()} : split(visible.count(), splits, split_index);
    part = {visible.begin + part.begin, visible.begin + part.end};
    for (int64_t begin = part.begin; begin < part.end;) {
      int64_t end = minimum(begin + key_block, part.end);
      if (shape.block_table) end = minimum(end, (begin / shape.block_size + 1) * shape.block_size);
      run_block(rank, batch, kv_head, {begin, end}, rows, query, partial, output);
      begin = end;
    }
  }

  void run_block(int rank, int64_t batch, int64_t kv_head, Range keys, int64_t rows, const T* query, Partial& partial,
                 T* output) {
    const SequenceSpan& span = sizes.spans[batch];
    const PanelScores<T>& lanes_of_rows = lane_scores[rank];
    using Seen = typename PanelScores<T>::Seen;
    enter_phase(Phase::scores);
    Seen seen = shape.key_padding || shape.mask.data ? lanes_of_rows.seen(keys) : Seen::all;
    if (seen == Seen::none) return;
    T* row_scores = scores + rank * most_rows * score_stride;
    RowBlock<T> key_block_rows = key_rows<T>(shape, call.key, span, batch, kv_head, keys, sizes.key_size, nullptr);
    RowBlock<T> values = key_rows<T>(shape, call.value, span, batch, kv_head, keys, sizes.value_size, nullptr);
    products(key_block_rows, keys.count(), query, rows, row_scores);
    bool in_window = unmarked || lanes_of_rows.all_in_window(keys);
    bool partly = !in_window || seen == Seen::some;
    if (partly || !sizes.plain_scores()) {
      enter_phase(Phase::mask);
      // The rules for scores are written for queries in lanes.
      T* panel = panels + rank * key_block * W;
      alignas(64) T largest[W];
      for (int64_t k = 0; k < keys.count(); ++k)
        for (int64_t lane = 0; lane < W; ++lane) panel[k * W + lane] = row_scores[minimum(lane, rows - 1) * score_stride + k];
      bool hides = lanes_of_rows.adjust(keys, in_window, seen == Seen::some, panel, largest);
      partly = partly || hides;
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t k = 0; k < keys.count(); ++k) row_scores[row * score_stride + k] = panel[k * W + row];
    }
    T shrink[most_rows];
    enter_phase(Phase::softmax);
    for (int64_t row = 0; row < rows; ++row) weigh(row_scores + row * score_stride, keys.count(), partial, row, shrink[row]);
    enter_phase(Phase::values);
    // A value that nobody sees may be NaN.
    bool skips = partly && !all_finite(values, keys.count(), sizes.value_size);
    add_values(values, keys.count(), row_scores, rows, shrink, skips, output);
  }

  // row_scores[row][k] = key k . query row; lanes past the last key are -Inf.
  FS_NOINLINE void products(RowBlock<T> keys, int64_t count, const T* query, int64_t rows, T* row_scores) const {
    if (reads_streams && from_memory) {
      RowStreams<T>::multiply(keys.data, keys.stride, count, sizes.key_size, query, query_stride, rows, row_scores,
                              score_stride);
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t k = count; k % L; ++k) row_scores[row * score_stride + k] = T(-__builtin_inff());
      return;
    }
    int64_t size = sizes.key_size, whole = size / L * L;
    for (int64_t first = 0; first < count; first += L) {
      const T* key[L];
      int64_t valid = minimum(L, count - first);
      for (int j = 0; j < L; ++j) key[j] = keys.data + (first + minimum(j, valid - 1)) * keys.stride;
      for (int64_t row = 0; row < rows; ++row) {
        const T* q = query + row * query_stride;
        V sum[L] = {};
        for (int64_t k = 0; k < whole; k += L) {
          V value = load(q + k);
#pragma GCC unroll 16
          for (int j = 0; j < L; ++j) sum[j] = fused_multiply_add(load(key[j] + k), value, sum[j]);
          // Each row asks for its share of the next keys, so that memory has something to do all the time.
          for (int64_t j = reads_streams ? L : row; j < L; j += rows)
            __builtin_prefetch(key[j] + k + 2 * L * keys.stride, 0, 2);
        }
        if (whole < size) {
          V value = load(q + whole);
#pragma GCC unroll 16
          for (int j = 0; j < L; ++j) sum[j] = fused_multiply_add(load_partial(key[j] + whole, size - whole), value, sum[j]);
        }
        V total = transpose_add<T, 1, L>(sum);
        total = lane_index<T>() < IntVec<T>{} + (decltype(IntVec<T>{}[0] + 0))valid ? total : negative_infinity<T>();
        store(row_scores + row * score_stride + first, total);
      }
    }
  }

  // Scores of one row to weights; the running maximum and sum take part.
  FS_INLINE void weigh(T* row_scores, int64_t count, Partial& partial, int64_t row, T& shrink) const {
    T factor = score_factor(sizes), minus_infinity = T(-__builtin_inff());
    V top = broadcast(minus_infinity);
    for (int64_t k = 0; k < count; k += L) {
      V score = load(row_scores + k);
      top = score > top ? score : top;
    }
    T here = largest_lane<T>(top), largest = here > partial.maximum[row] ? here : partial.maximum[row];
    T subtracted = largest == minus_infinity ? T(0) : largest;
    V total{};
    for (int64_t k = 0; k < count; k += L) {
      V score = load(row_scores + k);
      V exponent = (score - broadcast(subtracted)) * broadcast(factor);
      V weight = Math<T>::exp2_nonpositive(exponent);
      total = total + weight;
      store(row_scores + k, weight);
    }
    T sum = sum_of_lanes<T>(total);
    shrink = Math<T>::exp2_nonpositive(broadcast((partial.maximum[row] - subtracted) * factor))[0];
    partial.sum[row] = partial.sum[row] * shrink + sum;
    partial.maximum[row] = largest;
  }

  // output[row] = output[row] * shrink[row] + sum over keys of weight * value.
  void add_values(RowBlock<T> values, int64_t count, const T* weights, int64_t rows, const T* shrink, bool skips,
                  T* output) const {
    if (skips) {
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t column = 0; column < sizes.value_size; ++column) {
          T sum = output[row * output_stride + column] * shrink[row];
          for (int64_t k = 0; k < count; ++k) {
            T weight = weights[row * score_stride + k];
            if (weight != 0) sum += weight * values.data[k * values.stride + column];
          }
          output[row * output_stride + column] = sum;
        }
      return;
    }
    if (reads_streams && from_memory) return add_streams(values, count, weights, rows, shrink, output);
    for (int64_t row = 0; row < rows;) {
      const T* weight = weights + row * score_stride;
      T* target = output + row * output_stride;
      if (rows - row >= 4) {
        add_rows<4, 4>(values, count, weight, shrink + row, target);
        row += 4;
      } else if (rows - row >= 2) {
        add_rows<2, 8>(values, count, weight, shrink + row, target);
        row += 2;
      } else {
        add_rows<1, 8>(values, count, weight, shrink + row, target);
        row += 1;
      }
    }
  }
  // As RowStreams, down the values: four keys at a time, a quarter of the block apart, whole rows of each. Two query rows share
  // what is loaded; their outputs, a row of values long, stay in L1.
  FS_NOINLINE void add_streams(RowBlock<T> values, int64_t count, const T* weights, int64_t rows, const T* shrink,
                               T* output) const {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t column = 0; column < output_stride; column += L)
        store(output + row * output_stride + column, load(output + row * output_stride + column) * broadcast(shrink[row]));
    constexpr int64_t streams = RowStreams<T>::streams;
    const int64_t apart = count / streams;
    for (int64_t k = 0; k < apart; ++k) add_keys<streams>(values, k, apart, weights, rows, output);
    for (int64_t k = streams * apart; k < count; ++k) add_keys<1>(values, k, 0, weights, rows, output);
  }
  template <int streams>
  FS_INLINE void add_keys(RowBlock<T> values, int64_t first, int64_t apart, const T* weights, int64_t rows, T* output) const {
    int64_t row = 0;
    for (; row + 2 <= rows; row += 2) add_keys_to<streams, 2>(values, first, apart, weights, row, output);
    if (row < rows) add_keys_to<streams, 1>(values, first, apart, weights, row, output);
  }
  template <int streams, int R>
  FS_INLINE void add_keys_to(RowBlock<T> values, int64_t first, int64_t apart, const T* weights, int64_t row, T* output) const {
    const T* value[streams];
    V weight[R][streams];
#pragma GCC unroll 4
    for (int s = 0; s < streams; ++s) {
      int64_t key = first + s * apart;
      value[s] = values.data + key * values.stride;
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) weight[r][s] = broadcast(weights[(row + r) * score_stride + key]);
    }
    T* target = output + row * output_stride;
    auto add = [&](int64_t column, auto read) FS_LAMBDA_INLINE {
      V part[streams];
#pragma GCC unroll 4
      for (int s = 0; s < streams; ++s) part[s] = read(value[s] + column);
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
        V sum = load(target + r * output_stride + column);
#pragma GCC unroll 4
        for (int s = 0; s < streams; ++s) sum = fused_multiply_add(weight[r][s], part[s], sum);
        store(target + r * output_stride + column, sum);
      }
    };
    int64_t column = 0;
    for (; column + L <= sizes.value_size; column += L) add(column, [](const T* from) FS_LAMBDA_INLINE { return load(from); });
    if (column < sizes.value_size)
      add(column, [&](const T* from) FS_LAMBDA_INLINE { return load_partial(from, sizes.value_size - column); });
  }
  template <int R, int C>
  FS_INLINE void add_rows(RowBlock<T> values, int64_t count, const T* weights, const T* shrink, T* output) const {
    int64_t column = 0;
    for (; column + C * L <= sizes.value_size; column += C * L)
      add_columns<R, C>(values, count, weights, shrink, output, column);
    if constexpr (C > 1) {
      // Heads of 64 and less are half of that at most.
      for (; column + C / 2 * L <= sizes.value_size; column += C / 2 * L)
        add_columns<R, C / 2>(values, count, weights, shrink, output, column);
    }
    for (; column < sizes.value_size; column += L) {
      V sum[R] = {};
      for (int64_t k = 0; k < count; ++k) {
        V part = load_partial(values.data + k * values.stride + column, sizes.value_size - column);
        for (int r = 0; r < R; ++r) sum[r] = fused_multiply_add(broadcast(weights[r * score_stride + k]), part, sum[r]);
      }
      for (int r = 0; r < R; ++r) {
        T* place = output + r * output_stride + column;
        store(place, fused_multiply_add(load(place), broadcast(shrink[r]), sum[r]));
      }
    }
  }
  // Columns [column, column + C * L) of R rows. Every second key has sums of its own where there are registers for them: fewer
  // than eight sums would wait for their own multiply-adds.
  template <int R, int C>
  FS_NOINLINE void add_columns(RowBlock<T> values, int64_t count, const T* weights, const T* shrink, T* output,
                               int64_t column) const {
    constexpr int64_t ahead = 48;
    constexpr int parts = R * C <= (short_turns ? 4 : 8) ? 2 : 1;
    V sum[parts][R][C] = {};
    auto add_key = [&](int64_t k, int i) FS_LAMBDA_INLINE {
      const T* value = values.data + k * values.stride + column;
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        V part = load(value + c * L);
        if constexpr (!reads_streams) __builtin_prefetch(value + c * L + ahead * values.stride, 0, 2);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
          sum[i][r][c] = fused_multiply_add(broadcast(weights[r * score_stride + k]), part, sum[i][r][c]);
      }
    };
    int64_t k = 0;
    for (; k + parts <= count; k += parts) {
#pragma GCC unroll 2
      for (int i = 0; i < parts; ++i) add_key(k + i, i);
    }
    if (k < count) add_key(k, 0);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) {
        T* place = output + r * output_stride + column + c * L;
        V total = sum[0][r][c];
        if constexpr (parts == 2) total += sum[1][r][c];
        store(place, fused_multiply_add(load(place), broadcast(shrink[r]), total));
      }
  }

  void join_splits(int64_t batch, int64_t kv_head) const {
    const SequenceSpan& span = sizes.spans[batch];
    int64_t piece = (batch * sizes.kv_heads + kv_head) * splits;
    for (int64_t row = 0; row < sizes.group * span.queries; ++row) {
      int64_t member = span.queries == 1 ? row : row / span.queries;
      int64_t head = kv_head * sizes.group + member, place = span.query_start + row - member * span.queries;
      T largest = T(-__builtin_inff()), sum = 0;
      for (int64_t s = 0; s < splits; ++s)
        largest = partials[piece + s].maximum[row] > largest ? partials[piece + s].maximum[row] : largest;
      T subtracted = largest == T(-__builtin_inff()) ? T(0) : largest;
      T by[wanted_pieces], factor = score_factor(sizes);
      for (int64_t s = 0; s < splits; ++s) {
        by[s] = Math<T>::exp2_nonpositive(broadcast((partials[piece + s].maximum[row] - subtracted) * factor))[0];
        sum += partials[piece + s].sum[row] * by[s];
      }
      T shrink = 1;
      if (shape.sinks) join_sink(((const T*)shape.sinks)[head], factor, largest, sum, shrink);
      T inverse = sum == 0 ? T(0) : shrink / sum;
      T* target = row_at<T>(call.output, batch, head, place);
      for (int64_t column = 0; column < sizes.value_size; column += L) {
        V total{};
        for (int64_t s = 0; s < splits; ++s)
          total = fused_multiply_add(load(outputs + ((piece + s) * most_rows + row) * output_stride + column), broadcast(by[s]),
                                     total);
        store_partial(target + column, total * broadcast(inverse), sizes.value_size - column);
      }
      write_row_statistics(call, factor, batch, head, place, largest, sum);
    }
  }
};

}  // namespace
}  // namespace fastseq::FS_ISA
