// Matrices of the linear layers and norms.
#pragma once

#include "../fastseq.h"
#include "parallel.h"

namespace fastseq::FS_ISA {
namespace {

template <class T>
FS_INLINE T* at(const fastseq_matrix& matrix, int64_t row, int64_t column) {
  return (T*)matrix.data + row * matrix.row_stride + column;
}

// Results of some megabytes are often memory that was never written: a fault per small page would take longer than a norm.
template <class T>
FS_INLINE void expect_writes(const fastseq_matrix& matrix, int64_t rows, int64_t columns) {
  constexpr int64_t worthwhile_bytes = 4 << 20;
  int64_t bytes = rows * columns * (int64_t)sizeof(T);
  if (matrix.data && bytes >= worthwhile_bytes && matrix.row_stride == columns)
    fastseq_prefer_huge_pages(matrix.data, (size_t)bytes);
}

}  // namespace
}  // namespace fastseq::FS_ISA
