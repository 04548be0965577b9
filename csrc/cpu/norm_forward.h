// Layer norm and RMS norm, forward: residual + dropout(input) and its norm, row by row. Rows share nothing.
//
// The variance is that of the row shifted by its rounded mean, and the sum of what is left corrects the mean: no digits are
// lost where the mean is large.
#pragma once

#include "norm_row.h"

namespace fastseq::FS_ISA {
namespace {

template <class T>
struct RowMoments {
  T mean, correction, inverse_deviation;
};

// from_memory: rows that no cache holds are asked for in the second-level cache, which has more requests under way than the
// first: 0.90 to 0.95 of the time there, 1.07 to 1.11 for rows that a cache does hold.
template <class T, bool Rms, bool from_memory>
struct NormForward {
  const fastseq_norm_forward& call;
  const fastseq_norm_shape& shape = call.shape;
  const int64_t features = shape.features;
  const T eps = (T)shape.eps;
  const T* weight = nullptr;  // [F]
  const T* bias = nullptr;    // [F]
  T* scratch = nullptr;       // [threads][scratch_stride]
  const ElementDropout<T> dropout{shape.dropout, shape.dropout_seed, shape.dropout_offset};
  const bool adds = call.residual.data || dropout.active();
  const int64_t scratch_stride = round_up(features, 64 / sizeof(T)) + 64 / sizeof(T);

  static FS_INLINE void prefetch(const T* place) {
    if constexpr (from_memory)
      __builtin_prefetch(place, 0, 2);
    else
      __builtin_prefetch(place);
  }

  int run() {
    if (shape.rows == 0 || features == 0) return FASTSEQ_OK;
    expect_writes<T>(call.output, shape.rows, shape.features);
    expect_writes<T>(call.sum, shape.rows, shape.features);
    int threads = (int)norm_threads(shape);
    Arena arena{nullptr};
    lay_out(arena, threads);
    arena = Arena{(char*)fastseq_workspace(arena.used)};
    if (!arena.base) return FASTSEQ_OUT_OF_MEMORY;
    lay_out(arena, threads);
    RangeQueue queue;
    auto body = [this, &queue](int rank, int size) {
      enter_phase(Phase::rows);
      // Runs long enough for the processor to see that memory is read in order.
      int64_t least = maximum(1, (32 << 10) / (features * (int64_t)sizeof(T)));
      for (Range rows; (rows = queue.take(shape.rows, 1, least, shape.rows, size)).count();)
        for (int64_t row = rows.begin; row < rows.end; ++row) run_row(row, scratch + rank * scratch_stride);
    };
    run_parallel(threads, body);
    return FASTSEQ_OK;
  }

  void lay_out(Arena& arena, int threads) {
    scratch = arena.take<T>(adds && !call.sum.data ? threads * scratch_stride : 0);
    T* ones = arena.take<T>(call.weight ? 0 : features);
    T* zeros = arena.take<T>(call.bias || Rms ? 0 : features);
    if (!arena.base) return;
    weight = or_constant<T>(call.weight, ones, T(1), features);
    if (!Rms) bias = or_constant<T>(call.bias, zeros, T(0), features);
  }

  FS_INLINE void run_row(int64_t row, T* row_scratch) {
    const T* x;
    T first = first_look(row, row_scratch, x);
    // The later looks find everything in the first cache: meanwhile the next row's memory is asked for.
    int64_t next = minimum(row + 1, shape.rows - 1);
    const T* next_input = row_of<T>(call.input, next);
    const T* next_residual = call.residual.data ? row_of<T>(call.residual, next) : next_input;
    RowMoments<T> moments = moments_of(x, first, next_input);
    if (call.statistics.inverse_deviation) keep(row, moments);
    write_row(x, moments, row_of<T>(call.output, row), next_input, next_residual);
  }

  FS_INLINE T first_look(int64_t row, T* row_scratch, const T*& x) {
    const T* input = x = row_of<T>(call.input, row);
    T first[1];
    if (adds) {
      T* sum = call.sum.data ? row_of<T>(call.sum, row) : row_scratch;
      add_row(row, input, sum, first);
      x = sum;
    } else {
      sum_along_row<T>(features, first, [input](int64_t column, int64_t count, auto partial, Vec<T>* sums) FS_LAMBDA_INLINE {
        add_to_first(load_some<partial.value>(input + column, count), sums);
      });
    }
    return first[0];
  }

  FS_INLINE void keep(int64_t row, const RowMoments<T>& moments) {
    ((T*)call.statistics.inverse_deviation)[row] = moments.inverse_deviation;
    if (Rms) return;
    ((T*)call.statistics.mean)[row] = moments.mean;
    ((T*)call.statistics.mean_correction)[row] = moments.correction;
  }

  // The first look at a row: its sum, or that of its squares.
  static FS_INLINE void add_to_first(Vec<T> x, Vec<T>* sums) {
    sums[0] = Rms ? fused_multiply_add(x, x, sums[0]) : sums[0] + x;
  }

  FS_INLINE void add_row(int64_t row, const T* input, T* sum, T (&first)[1]) {
    const T* residual = row_of<T>(call.residual, row);
    if (dropout.active()) {
      for_each_dropped<T>(dropout, row, features,
                          [=](int64_t column, int64_t count, auto partial, Vec<T> factor) FS_LAMBDA_INLINE {
                            Vec<T> x = apply_dropout<T>(load_some<partial.value>(input + column, count), factor);
                            if (residual) x = load_some<partial.value>(residual + column, count) + x;
                            store_some<partial.value>(sum + column, x, count);
                          });
      sum_along_row<T>(features, first, [sum](int64_t column, int64_t count, auto partial, Vec<T>* sums) FS_LAMBDA_INLINE {
        add_to_first(load_some<partial.value>(sum + column, count), sums);
      });
      return;
    }
    sum_along_row<T>(features, first, [=](int64_t column, int64_t count, auto partial, Vec<T>* sums) FS_LAMBDA_INLINE {
      Vec<T> x = load_some<partial.value>(input + column, count) + load_some<partial.value>(residual + column, count);
      store_some<partial.value>(sum + column, x, count);
      add_to_first(x, sums);
    });
  }

  FS_INLINE RowMoments<T> moments_of(const T* x, T first, const T* next_input) {
    T inverse_count = T(1) / (T)features;
    if (Rms) return {T(0), T(0), T(1) / square_root(first / (T)features + eps)};
    T mean = first * inverse_count;
    Vec<T> means = broadcast<T>(mean);
    T sums[2];
    sum_along_row<T>(features, sums, [=](int64_t column, int64_t count, auto partial, Vec<T>* sum) FS_LAMBDA_INLINE {
      prefetch(next_input + column);
      Vec<T> deviation = load_some<partial.value>(x + column, count) - means;
      if (partial.value) deviation = first_lanes<T>(deviation, count);
      sum[0] = sum[0] + deviation;
      sum[1] = fused_multiply_add(deviation, deviation, sum[1]);
    });
    T correction = sums[0] * inverse_count;
    T variance = sums[1] / (T)features, square = correction * correction;
    // Rounding must not make it negative, nor NaN of what has overflown.
    if (square < variance) {
      variance = variance - square;
    } else if (variance < T(__builtin_inff())) {
      variance = T(0);
    }
    return {mean, correction, T(1) / square_root(variance + eps)};
  }

  FS_INLINE void write_row(const T* x, const RowMoments<T>& moments, T* output, const T* next_input, const T* next_residual) {
    Vec<T> mean = broadcast<T>(moments.mean), scale = broadcast<T>(moments.inverse_deviation);
    Vec<T> shift = broadcast<T>(-moments.correction * moments.inverse_deviation);
    for_each_vector<T>(features, [=](int64_t column, int64_t count, auto partial) FS_LAMBDA_INLINE {
      if (Rms) prefetch(next_input + column);
      prefetch(next_residual + column);
      Vec<T> value = load_some<partial.value>(x + column, count);
      Vec<T> factor = load_some<partial.value>(weight + column, count);
      if (Rms) {
        value = value * scale * factor;
      } else {
        value = fused_multiply_add(value - mean, scale, shift);
        value = fused_multiply_add(value, factor, load_some<partial.value>(bias + column, count));
      }
      store_some<partial.value>(output + column, value, count);
    });
  }
};

template <class T>
int norm_forward(const fastseq_norm_forward* call) {
  ProfiledCall profiled;
  if (profiled.begins<T>("norm_forward", norm_name(call->shape))) {
    profile_sizes(call->shape);
    profile_size("residual", call->residual.data != nullptr);
    profile_size("sum", call->sum.data != nullptr);
  }
  constexpr int64_t cached_bytes = 4 << 20;
  bool from_memory = call->shape.rows * call->shape.features * (int64_t)sizeof(T) > cached_bytes;
  if (call->shape.rms) return from_memory ? NormForward<T, true, true>{*call}.run() : NormForward<T, true, false>{*call}.run();
  return from_memory ? NormForward<T, false, true>{*call}.run() : NormForward<T, false, false>{*call}.run();
}

}  // namespace
}  // namespace fastseq::FS_ISA
