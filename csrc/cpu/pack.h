// Copies of weights and sequences in the order in which the micro-kernel reads them.
#pragma once

#include "gemm.h"

namespace fastseq::FS_ISA {
namespace {

// panel[k][column] = w[column][k]: weights stored with the summed index last (W_ih, W_hh in forward).
// valid_columns of the panel exist; the others become zero.
template <class T>
void pack_transposed(const T* w /* [valid_columns, depth], row stride w_stride */, int64_t w_stride, int64_t valid_columns,
                     int64_t depth, T* panel /* [depth][panel_width] */) {
  constexpr int L = lanes<T>;
  for (int64_t half = 0; half < 2; ++half) {
    int64_t columns = maximum(0, minimum(L, valid_columns - half * L));
    const T* source = w + half * L * w_stride;
    T* target = panel + half * L;
    for (int64_t k = 0; k < depth; k += L) {
      int64_t count = minimum(L, depth - k);
      Vec<T> block[L];
      for (int j = 0; j < L; ++j) block[j] = j < columns ? load_partial(source + j * w_stride + k, count) : Vec<T>{};
      transpose<T>(block);
      for (int64_t j = 0; j < count; ++j) store(target + (k + j) * panel_width<T>, block[j]);
    }
  }
}

// panel[k][column] = row(k)[column]: matrices stored with the summed index first (weights in backward, sequences in the
// weight gradient). row(k) is a pointer to valid_columns elements, or NULL for a row of zeros. Rows lie far apart, where the
// processor's own prefetcher does not look: they are asked for ahead.
template <class T, class Row>
FS_INLINE void pack_rows(Row row, int64_t valid_columns, int64_t depth, T* panel /* [depth][panel_width] */) {
  constexpr int64_t ahead = 16, L = lanes<T>, line = 64 / (int64_t)sizeof(T);
  for (int64_t k = 0; k < depth; ++k, panel += panel_width<T>) {
    if (k + ahead < depth)
      for (int64_t i = 0; i < panel_width<T>; i += line) __builtin_prefetch(row(k + ahead) + i);
    const T* source = row(k);
    if (source && valid_columns >= panel_width<T>) {
      store(panel, load(source));
      store(panel + L, load(source + L));
      continue;
    }
    for (int64_t half = 0; half < 2; ++half) {
      int64_t columns = maximum(0, minimum(L, valid_columns - half * L));
      store(panel + half * L, source && columns ? load_partial(source + half * L, columns) : Vec<T>{});
    }
  }
}

// memcpy for rows of a few KB: of a length unknown to it, the compiler makes a string instruction that is slow to start.
template <class T>
FS_INLINE void copy_row(const T* source /* [width] */, int64_t width, T* target /* [width] */) {
  int64_t i = 0;
  for (; i + lanes<T> <= width; i += lanes<T>) store(target + i, load(source + i));
  for (; i < width; ++i) target[i] = source[i];
}

// Copies one row of `width` elements into a blocked matrix.
template <class T>
FS_INLINE void copy_to_blocked(const T* source /* [width] */, int64_t width, BlockedRows<T> target, int64_t row) {
  for (int64_t k = 0; k < width; k += block_depth<T>)
    copy_row(source + k, minimum(block_depth<T>, width - k), target.at(row, k));
}

// A tile's rows of a plain matrix, block_stride apart: in their own place rows a power of two apart would evict each other.
template <class T>
FS_INLINE const T* copy_tile(const T* source /* [rows][depth], row stride row_stride */, int64_t row_stride, int64_t rows,
                             int64_t depth, T* tile /* [FS_TILE_ROWS][block_stride] */) {
  for (int64_t row = 0; row < rows; ++row) copy_row(source + row * row_stride, depth, tile + row * block_stride<T>);
  return tile;
}

// Rows that a tile will copy next, asked for in the second-level cache while the one before is worked on. A few lines at a time: a
// core has room for some twenty open requests, and waits with the next one until there is room again.
template <class T>
struct RowRequests {
  static constexpr int64_t line = 64 / (int64_t)sizeof(T), at_a_time = 8;
  const T* row;
  int64_t row_stride, depth, rows, k = 0;

  RowRequests(const T* first, int64_t row_stride, int64_t rows, int64_t depth)
      : row(first), row_stride(row_stride), depth(depth), rows(rows) {}
  FS_INLINE void ask() {
    for (int64_t i = 0; i < at_a_time && rows > 0; ++i) {
      __builtin_prefetch(row + k, 0, 2);
      k += line;
      if (k < depth) continue;
      k = 0;
      row += row_stride;
      --rows;
    }
  }
};

}  // namespace
}  // namespace fastseq::FS_ISA
