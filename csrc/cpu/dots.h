// Products along the rows of weights as they lie: nothing is packed, every weight is read once for a few rows of A.
#pragma once

#include "gemm.h"

namespace fastseq::FS_ISA {
namespace {

// One row of a blocked matrix, or a plain row (block_step = block_depth).
template <class T>
struct BlockedRow {
  const T* data;
  int64_t block_step;  // elements from one block of K to the next
};
template <class T>
FS_INLINE BlockedRow<T> blocked_row(BlockedRows<T> matrix, int64_t row) {
  return {matrix.at(row, 0), matrix.rows * block_stride<T>};
}
template <class T>
FS_INLINE BlockedRow<T> plain_row(const T* data) {
  return {data, block_depth<T>};
}

// lanes<T> dot products with W's rows in place, for a single row of A: nothing is packed, every weight is read once.
// Result lane j is init lane j + W[row + j] . a; lanes past valid_rows are zero. Half of the rows at a time, because the
// pointers to all of sixteen do not fit the integer registers, and several vectors along each: eight sums at least are needed
// to hide the latency of a multiply-add. Rows are short and many, and the processor's own prefetcher begins anew with each: with
// from_memory the second-level cache is asked for what is read one group of rows and prefetch_depth later. Where the weights
// are in a cache already that costs 13 to 25 % of the time, where they are not it saves 15 to 30 %.
template <class T, bool from_memory = false>
FS_INLINE Vec<T> dot_rows(const T* w /* [valid_rows, depth], row stride depth */, int64_t valid_rows, BlockedRow<T> a,
                          int64_t depth, Vec<T> init) {
  constexpr int L = lanes<T>, group = L >= 4 ? L / 2 : L, along = group >= 4 ? 2 : 4;
  constexpr int64_t line = 64 / (int64_t)sizeof(T);
  const int64_t prefetch_depth = minimum(depth, 2048 / (int64_t)sizeof(T));
  Vec<T> sums[L];
#pragma GCC unroll 2
  for (int first_row = 0; first_row < L; first_row += group) {
    const T* row[group];
#pragma GCC unroll 8
    for (int j = 0; j < group; ++j) row[j] = w + minimum(first_row + j, valid_rows - 1) * depth;
    Vec<T> part[along][group] = {};
    const T* block = a.data;
    for (int64_t first = 0; first < depth; first += block_depth<T>, block += a.block_step) {
      int64_t last = minimum(depth, first + block_depth<T>);
      const T* value_at = block - first;
      int64_t k = first;
      for (; k + along * L <= last; k += along * L) {
        if (from_memory) {
          int64_t later = k + prefetch_depth;
          if (later >= depth) later += (2 * group - 1) * depth;
#pragma GCC unroll 8
          for (int j = 0; j < group; ++j)
            for (int64_t i = 0; i < along * L; i += line) __builtin_prefetch(row[j] + later + i, 0, 2);
        }
#pragma GCC unroll 4
        for (int i = 0; i < along; ++i) {
          Vec<T> value = load(value_at + k + i * L);
#pragma GCC unroll 8
          for (int j = 0; j < group; ++j) part[i][j] = fused_multiply_add(load(row[j] + k + i * L), value, part[i][j]);
        }
      }
      for (; k < last; k += L) {
        Vec<T> value = load_partial(value_at + k, last - k);
#pragma GCC unroll 8
        for (int j = 0; j < group; ++j) part[0][j] = fused_multiply_add(load_partial(row[j] + k, last - k), value, part[0][j]);
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < group; ++j) {
      sums[first_row + j] = part[0][j] + part[1][j];
      if constexpr (along == 4) sums[first_row + j] += part[2][j] + part[3][j];
    }
  }
  Vec<T> total = transpose_add<T, 1, L>(sums) + init;
  for (int64_t j = valid_rows; j < L; ++j) total[j] = 0;
  return total;
}

// Whether what comes from memory is read in streams (below). Vectors of 64 bytes do without: dot_rows asks ahead there, and streams
// have not been measured.
inline constexpr bool reads_streams = FS_VECTOR_BYTES < 64;

// sums[row][output] = A . W, or += with `adds`, for a few rows of A and a run of outputs, whose weights mostly come from memory.
// They are read in four streams, a quarter of the run apart: a processor that looks ahead along one stream brings half of what it
// brings along four that lie in pages of their own. Up to three rows of A meet a vector of each.
template <class T>
struct RowStreams {
  static constexpr int64_t streams = 4, L = lanes<T>, tile_rows = 3;
  // Longer sums would lose digits; blocks of a few KiB would end the streams before the processor has found them.
  static constexpr int64_t depth_block = 16384 / (int64_t)sizeof(T);

  // A single row has sums of its own kind, below. Where rows are shared out to threads, rows_alike keeps it from them: its bits must
  // not depend on the rows beside it.
  template <bool rows_alike = false>
  static FS_INLINE void multiply(const T* w /* [outputs, depth], row stride w_stride */, int64_t w_stride, int64_t outputs,
                                 int64_t depth, const T* a /* [rows, depth], row stride a_stride */, int64_t a_stride,
                                 int64_t rows, T* sums /* [rows][sums_stride] */, int64_t sums_stride, bool adds = false) {
    const int64_t apart = (outputs + streams - 1) / streams;
    EvenSplit rows_of_tile(rows, tile_count(rows));
    for (int64_t k = 0; k < depth; k += depth_block)
      for (int64_t output = 0; output < apart; ++output) {
        const T* weights[streams];
#pragma GCC unroll 4
        for (int s = 0; s < streams; ++s) weights[s] = w + minimum(output + s * apart, outputs - 1) * w_stride + k;
        for (int64_t i = 0; i < tile_count(rows); ++i) {
          Range part = rows_of_tile.part(i);
          const T* from = a + part.begin * a_stride + k;
          T* target = sums + part.begin * sums_stride + output;
          const int64_t step = minimum(depth_block, depth - k), valid = outputs - output;
          if (part.count() == 1)
            run_tile<1, rows_alike ? 1 : 2>(weights, from, a_stride, step, adds || k > 0, target, sums_stride, apart, valid);
          else if (part.count() == 2)
            run_tile<2, 1>(weights, from, a_stride, step, adds || k > 0, target, sums_stride, apart, valid);
          else
            run_tile<3, 1>(weights, from, a_stride, step, adds || k > 0, target, sums_stride, apart, valid);
        }
      }
  }
  static int64_t tile_count(int64_t rows) { return (rows + tile_rows - 1) / tile_rows; }

  // sums[r][s * apart] (+)= weights[s] . a[r], for s * apart < valid. A row on its own has two parts: eight sums at least hide the
  // latency of a multiply-add.
  template <int R, int parts>
  static FS_INLINE void run_tile(const T* const* weights /* [streams][depth] */, const T* a /* [R][depth] */, int64_t a_stride,
                                 int64_t depth, bool adds, T* sums, int64_t sums_stride, int64_t apart, int64_t valid) {
    Vec<T> sum[parts][R][streams] = {};
    const T* w[streams];
#pragma GCC unroll 4
    for (int s = 0; s < streams; ++s) w[s] = weights[s];
    auto turn = [&](int part, int64_t k, auto read) FS_LAMBDA_INLINE {
      Vec<T> value[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) value[r] = read(a + r * a_stride + k);
#pragma GCC unroll 4
      for (int s = 0; s < streams; ++s) {
        Vec<T> weight = read(w[s] + k);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) accumulate<T>(sum[part][r][s], weight, value[r]);
      }
    };
    int64_t k = 0;
    for (; k + 2 * L <= depth; k += 2 * L) {
      turn(0, k, [](const T* from) FS_LAMBDA_INLINE { return load(from); });
      turn(parts - 1, k + L, [](const T* from) FS_LAMBDA_INLINE { return load(from); });
    }
    for (; k < depth; k += L) turn(0, k, [&](const T* from) FS_LAMBDA_INLINE { return load_partial(from, depth - k); });
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      if constexpr (parts == 2)
#pragma GCC unroll 4
        for (int s = 0; s < streams; ++s) sum[0][r][s] += sum[1][r][s];
      add_lanes(sum[0][r]);
#pragma GCC unroll 4
      for (int s = 0; s < streams; ++s)
        if (s * apart < valid) {
          T* place = sums + r * sums_stride + s * apart;
          T total = sum[0][r][s / L][s % L];
          *place = adds ? *place + total : total;
        }
    }
  }

  // The sums of the lanes of each stream: in the first lanes of sum[0], or in as many vectors as they fill.
  static FS_INLINE void add_lanes(Vec<T>* sum) {
    constexpr int together = L < streams ? L : streams;
#pragma GCC unroll 2
    for (int i = 0; i < streams / together; ++i) sum[i] = fold<together>(transpose_add<T, 1, together>(sum + i * together));
  }
  template <int Step>
  static FS_INLINE Vec<T> fold(Vec<T> value) {
    if constexpr (Step < L)
      return fold<Step * 2>(value + shuffle<T, Partner<Step>>(value, value));
    else
      return value;
  }
};

}  // namespace
}  // namespace fastseq::FS_ISA
