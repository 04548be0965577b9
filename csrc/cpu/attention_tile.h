// The micro-kernel of gemm.h for attention: the same R x two vectors of sums in registers, but over operands as they lie.
//
// Lanes are query rows throughout. That makes every operand of forward one of two kinds: a panel [k][panel_width] of lanes
// (queries transposed, or the weights that the softmax has just written), and keys or values read element by element from
// the user's memory, whatever its strides. Nothing of K or V is ever re-laid, and maxima and sums over keys run down rows.
#pragma once

#include "gemm.h"

namespace fastseq::FS_ISA {
namespace {

// sum[r] += A[r][k] * panel[k] with A's rows a run-time stride apart, the panel's rows panel_stride apart. Every third row has a pointer; the x86 address modes
// (base + 1, 2, 4, 8 strides) reach the others from those, so that the pointers fit into registers.
template <class T, int R>
FS_INLINE void accumulate_rows(const T* a /* [R][depth] */, int64_t a_stride, const T* panel /* [depth][panel_width] */,
                               int64_t panel_stride, int64_t depth, Vec<T> (&sum)[R][2]) {
  constexpr int bases = (R + 2) / 3;
  int64_t stride_bytes = a_stride * (int64_t)sizeof(T);
  const char* base[bases];
  for (int i = 0; i < bases; ++i) base[i] = (const char*)a + 3 * i * stride_bytes;
  auto turn = [&](int64_t ahead) FS_LAMBDA_INLINE {
    Vec<T> w0 = load(panel + ahead * panel_stride), w1 = load(panel + ahead * panel_stride + lanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const char* row = base[r / 3] + (r % 3) * stride_bytes;
      Vec<T> value = broadcast(((const T*)row)[ahead]);
      sum[r][0] = fused_multiply_add(value, w0, sum[r][0]);
      sum[r][1] = fused_multiply_add(value, w1, sum[r][1]);
    }
  };
  int64_t k = 0;
  for (; k + 4 <= depth; k += 4, panel += 4 * panel_stride) {
    turn(0);
    turn(1);
    turn(2);
    turn(3);
#pragma GCC unroll 16
    for (int i = 0; i < bases; ++i) base[i] += 4 * sizeof(T);
  }
  for (; k < depth; ++k, panel += panel_stride) {
    turn(0);
#pragma GCC unroll 16
    for (int i = 0; i < bases; ++i) base[i] += sizeof(T);
  }
}

// sum[r] += A[k][r] * panel[k]: down the columns of A, whose rows are a_stride apart; the panel's rows are panel_stride apart.
template <class T, int R>
FS_INLINE void accumulate_columns(const T* a /* [depth][R] */, int64_t a_stride, const T* panel /* [depth][panel_width] */,
                                  int64_t panel_stride, int64_t depth, Vec<T> (&sum)[R][2]) {
  for (int64_t k = 0; k < depth; ++k, a += a_stride, panel += panel_stride) {
    Vec<T> w0 = load(panel), w1 = load(panel + lanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      Vec<T> value = broadcast(a[r]);
      sum[r][0] = fused_multiply_add(value, w0, sum[r][0]);
      sum[r][1] = fused_multiply_add(value, w1, sum[r][1]);
    }
  }
}

// c[R][panel_width] = A * panel, and the largest value per lane joins `largest`.
template <class T, int R>
FS_NOINLINE void product_tile(const T* a, int64_t a_stride, const T* panel, int64_t depth, T* c,
                              T* largest /* [panel_width] */) {
  Vec<T> sum[R][2] = {};
  accumulate_rows<T, R>(a, a_stride, panel, panel_width<T>, depth, sum);
  Vec<T> top0 = load(largest), top1 = load(largest + lanes<T>);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    store(c + r * panel_width<T>, sum[r][0]);
    store(c + r * panel_width<T> + lanes<T>, sum[r][1]);
    top0 = sum[r][0] > top0 ? sum[r][0] : top0;
    top1 = sum[r][1] > top1 ? sum[r][1] : top1;
  }
  store(largest, top0);
  store(largest + lanes<T>, top1);
}

// c[R][panel_width] = A^T * panel + c * factor; a NULL factor stands for zero: c is only written.
template <class T, int R>
FS_NOINLINE void weighted_tile(const T* a, int64_t a_stride, const T* panel, int64_t panel_stride, int64_t depth, T* c,
                               const T* factor /* [panel_width] or NULL */) {
  constexpr int64_t c_stride = panel_width<T>;
  Vec<T> sum[R][2] = {};
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    __builtin_prefetch(c + r * c_stride, 1);
    __builtin_prefetch(c + r * c_stride + lanes<T>, 1);
  }
  accumulate_columns<T, R>(a, a_stride, panel, panel_stride, depth, sum);
  if (factor) {
    Vec<T> factor0 = load(factor), factor1 = load(factor + lanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      sum[r][0] = fused_multiply_add(load(c + r * c_stride), factor0, sum[r][0]);
      sum[r][1] = fused_multiply_add(load(c + r * c_stride + lanes<T>), factor1, sum[r][1]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    store(c + r * c_stride, sum[r][0]);
    store(c + r * c_stride + lanes<T>, sum[r][1]);
  }
}

// c[R][panel_width] += A * B for a weight gradient: A in score buffers [buffer][key][panel_width] of consecutive panels, the
// sum runs over their lanes, which are the rows of B.
template <class T, int R>
FS_NOINLINE void gradient_tile(const T* a, int64_t buffer_step, const T* b /* [rows][panel_width] */, int64_t b_stride,
                               int64_t rows, T* c) {
  constexpr int64_t W = panel_width<T>;
  Vec<T> sum[R][2] = {};
  for (; rows > 0; rows -= W, a += buffer_step, b += W * b_stride)
    accumulate_rows<T, R>(a, W, b, b_stride, minimum(rows, W), sum);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    store(c + r * W, sum[r][0] + load(c + r * W));
    store(c + r * W + lanes<T>, sum[r][1] + load(c + r * W + lanes<T>));
  }
}

// One instance of a tile per number of rows, FS_TILE_ROWS at most, indexed by rows - 1.
template <class T, int... Rows>
struct ProductTiles {
  using Function = void (*)(const T*, int64_t, const T*, int64_t, T*, T*);
  static constexpr Function table[] = {product_tile<T, Rows + 1>...};
};
template <class T, int... Rows>
struct WeightedTiles {
  using Function = void (*)(const T*, int64_t, const T*, int64_t, int64_t, T*, const T*);
  static constexpr Function table[] = {weighted_tile<T, Rows + 1>...};
};
template <class T, int... Rows>
struct GradientTiles {
  using Function = void (*)(const T*, int64_t, const T*, int64_t, int64_t, T*);
  static constexpr Function table[] = {gradient_tile<T, Rows + 1>...};
};
template <template <class, int...> class Tiles, class T, int Count, int... Rows>
FS_INLINE constexpr auto* tile_table() {
  if constexpr (Count == 0)
    return Tiles<T, Rows...>::table;
  else
    return tile_table<Tiles, T, Count - 1, Count - 1, Rows...>();
}

// c[rows][panel_width] = A[rows][depth] * panel; largest[panel_width] takes part in the maximum and is updated.
template <class T>
FS_INLINE void multiply_rows(const T* a, int64_t a_stride, int64_t rows, const T* panel, int64_t depth, T* c, T* largest) {
  int64_t tiles = tile_count(rows);
  EvenSplit split_rows(rows, tiles);
  for (int64_t i = 0; i < tiles; ++i) {
    Range part = split_rows.part(i);
    tile_table<ProductTiles, T, FS_TILE_ROWS>()[part.count() - 1](a + part.begin * a_stride, a_stride, panel, depth,
                                                                  c + part.begin * panel_width<T>, largest);
  }
}

// c[columns][panel_width] = A[depth][columns]^T * panel + c * factor.
template <class T>
FS_INLINE void multiply_columns(const T* a, int64_t a_stride, int64_t columns, const T* panel, int64_t panel_stride,
                                int64_t depth, T* c, const T* factor) {
  int64_t tiles = tile_count(columns);
  EvenSplit split_columns(columns, tiles);
  for (int64_t i = 0; i < tiles; ++i) {
    Range part = split_columns.part(i);
    tile_table<WeightedTiles, T, FS_TILE_ROWS>()[part.count() - 1](a + part.begin, a_stride, panel, panel_stride, depth,
                                                                   c + part.begin * panel_width<T>, factor);
  }
}

}  // namespace
}  // namespace fastseq::FS_ISA
