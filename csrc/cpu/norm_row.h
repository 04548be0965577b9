// What forward and backward of the norms share: sums along a row, the sub-layer's dropout, constants in place of weights.
//
// A row is looked at several times while it lies in the first cache. Its sums go through `partial_sums` vectors, emptied
// every few thousand elements, so that their rounding errors stay those of short sums, in an order that depends on F alone.
#pragma once

#include "dropout.h"
#include "matrix.h"

namespace fastseq::FS_ISA {
namespace {

template <bool Value>
struct Flag {
  static constexpr bool value = Value;
};

// Lanes below `count` keep their value, the others are zero, whatever they held.
template <class T>
FS_INLINE Vec<T> first_lanes(Vec<T> value, int64_t count) {
  IntVec<T> limit = IntVec<T>{} + (decltype(limit[0] + 0))count;
  return (Vec<T>)((IntVec<T>)value & (lane_index<T>() < limit));
}

template <bool Partial, class T>
FS_INLINE Vec<T> load_some(const T* pointer, int64_t count) {
  if constexpr (Partial) return load_partial(pointer, count);
  return load(pointer);
}
template <bool Partial, class T>
FS_INLINE void store_some(T* pointer, Vec<T> value, int64_t count) {
  if constexpr (Partial) return store_partial(pointer, value, count);
  store(pointer, value);
}

// body(column, count, partial) for every vector of a row; partial.value says that only `count` lanes exist.
template <class T, class Body>
FS_INLINE void for_each_vector(int64_t features, Body body) {
  int64_t column = 0;
  for (; column + lanes<T> <= features; column += lanes<T>) body(column, (int64_t)lanes<T>, Flag<false>{});
  if (column < features) body(column, features - column, Flag<true>{});
}

// totals[s] = sum over the row of what body(column, count, partial, sums) adds to sums[s], where lanes past `count` must add
// zero.
template <class T, int Sums, class Body>
FS_INLINE void sum_along_row(int64_t features, T (&totals)[Sums], Body body) {
  constexpr int partial_sums = 4;
  constexpr int64_t stretch = 64 * partial_sums * lanes<T>;
  Vec<T> total[Sums] = {};
  for (int64_t begin = 0; begin < features; begin += stretch) {
    int64_t end = minimum(begin + stretch, features), column = begin;
    Vec<T> part[partial_sums][Sums] = {};
    for (; column + partial_sums * lanes<T> <= end; column += partial_sums * lanes<T>) {
#pragma GCC unroll 4
      for (int i = 0; i < partial_sums; ++i) body(column + i * lanes<T>, (int64_t)lanes<T>, Flag<false>{}, part[i]);
    }
    for (; column + lanes<T> <= end; column += lanes<T>) body(column, (int64_t)lanes<T>, Flag<false>{}, part[0]);
    if (column < end) body(column, end - column, Flag<true>{}, part[1]);
    for (int s = 0; s < Sums; ++s) total[s] = total[s] + ((part[0][s] + part[1][s]) + (part[2][s] + part[3][s]));
  }
  for (int s = 0; s < Sums; ++s) totals[s] = sum_of_lanes<T>(total[s]);
}

// body(column, count, partial, factor) for every vector of a row with what dropout multiplies it with.
template <class T, class Body>
FS_INLINE void for_each_dropped(const ElementDropout<T>& dropout, int64_t row, int64_t features, Body body) {
  Vec<T> factor[ElementDropout<T>::vectors];
  int64_t column = 0;
  for (; column + dropout_group <= features; column += dropout_group) {
    dropout.draw(row, column / dropout_group, factor);
#pragma GCC unroll 16
    for (int i = 0; i < ElementDropout<T>::vectors; ++i)
      body(column + i * lanes<T>, (int64_t)lanes<T>, Flag<false>{}, factor[i]);
  }
  if (column == features) return;
  dropout.draw(row, column / dropout_group, factor);
  for (int i = 0; column < features; ++i, column += lanes<T>)
    body(column, minimum(features - column, lanes<T>), Flag<true>{}, factor[i]);
}

// A dropped NaN is dropped, too.
template <class T>
FS_INLINE Vec<T> apply_dropout(Vec<T> value, Vec<T> factor) {
  return factor == Vec<T>{} ? Vec<T>{} : value * factor;
}

FS_INLINE float square_root(float value) { return __builtin_sqrtf(value); }
FS_INLINE double square_root(double value) { return __builtin_sqrt(value); }

template <class T>
FS_INLINE T* row_of(const fastseq_matrix& matrix, int64_t row) {
  return matrix.data ? (T*)matrix.data + row * matrix.row_stride : nullptr;
}

FS_INLINE void profile_sizes(const fastseq_norm_shape& shape) {
  profile_size("M", shape.rows);
  profile_size("F", shape.features);
  profile_size("dropout", shape.dropout > 0);
}
FS_INLINE const char* norm_name(const fastseq_norm_shape& shape) { return shape.rms ? "rms_norm" : "layer_norm"; }

// One thread for what it does in less time than another takes to wake up.
FS_INLINE int64_t norm_threads(const fastseq_norm_shape& shape) {
  constexpr int64_t elements_per_thread = 32768;
  int64_t most = minimum(shape.rows, shape.rows * shape.features / elements_per_thread);
  return maximum(1, minimum(shape.threads, most));
}

// What a row is multiplied with: the weight, or ones that take its place.
template <class T>
FS_INLINE const T* or_constant(const void* given, T* replacement, T value, int64_t count) {
  if (given) return (const T*)given;
  for (int64_t i = 0; i < count; ++i) replacement[i] = value;
  return replacement;
}

}  // namespace
}  // namespace fastseq::FS_ISA
