// The two products of attention on tiles of 16 rows (four per warp) and 32 lanes (one row of the other side each): of rows with
// rows, summed along the head, and of the coefficients that come of it with rows, summed along the lanes.
#pragma once

#include "attention_shape.cuh"

namespace fastseq::cuda {
namespace {

constexpr int attention_threads = 128, attention_warps = attention_threads / warp_lanes;
constexpr int rows_per_warp = 4, tile_rows = attention_warps * rows_per_warp, tile_lanes = warp_lanes;
constexpr int tile_depth = warp_lanes;  // elements of the head at a time

// COLUMNS: columns of a result that a lane owns; with more than 32 * COLUMNS the kernels go over everything again.
template <class A, int COLUMNS>
struct TileMemory {
  union {
    struct {
      A left[tile_rows][tile_depth];
      A right[tile_lanes][tile_depth + 1];  // lanes read down a column
    } factors;
    A values[tile_lanes][warp_lanes * COLUMNS];
  };
  A coefficients[attention_warps][rows_per_warp][tile_lanes];
  uint8_t seen[attention_warps][rows_per_warp][tile_lanes];
};

template <class S, int COLUMNS>
struct Tile {
  using A = Sum<S>;
  TileMemory<A, COLUMNS>& memory;
  int lane, warp;

  FS_INLINE explicit Tile(TileMemory<A, COLUMNS>& memory)
      : memory(memory), lane((int)threadIdx.x % warp_lanes), warp((int)threadIdx.x / warp_lanes) {}

  // products[r] += left row (4 * warp + r) . right row `lane`. left and right give a row's address, or NULL for zeros.
  template <class Left, class Right>
  FS_INLINE void multiply(Left left, Right right, int64_t size, A (&products)[rows_per_warp]) {
    for (int64_t first = 0; first < size; first += tile_depth) {
      int depth = (int)smaller<int64_t>(tile_depth, size - first);
      __syncthreads();
      for (int row = warp; row < tile_rows; row += attention_warps) {
        const S* source = left(row);
        memory.factors.left[row][lane] = source && lane < depth ? widen(source[first + lane]) : A(0);
      }
      for (int row = warp; row < tile_lanes; row += attention_warps) {
        const S* source = right(row);
        memory.factors.right[row][lane] = source && lane < depth ? widen(source[first + lane]) : A(0);
      }
      __syncthreads();
      for (int k = 0; k < depth; ++k) {
        A factor = memory.factors.right[lane][k];
#pragma unroll
        for (int r = 0; r < rows_per_warp; ++r)
          products[r] = multiply_add(memory.factors.left[rows_per_warp * warp + r][k], factor, products[r]);
      }
    }
  }

  // sums[r][c] += coefficient of (row r, each lane) * that lane's row at column first + lane + 32 c. Where a pair is not seen
  // the row is not looked at: what a mask hides may be NaN.
  template <class Right>
  FS_INLINE void accumulate(const A (&coefficients)[rows_per_warp], const bool (&seen)[rows_per_warp], Right right,
                            int64_t first, int64_t size, A (&sums)[rows_per_warp][COLUMNS]) {
    __syncthreads();
    for (int row = warp; row < tile_lanes; row += attention_warps) {
      const S* source = right(row);
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) {
        int64_t column = first + lane + warp_lanes * c;
        memory.values[row][lane + warp_lanes * c] = source && column < size ? widen(source[column]) : A(0);
      }
    }
#pragma unroll
    for (int r = 0; r < rows_per_warp; ++r) {
      memory.coefficients[warp][r][lane] = coefficients[r];
      memory.seen[warp][r][lane] = seen[r];
    }
    __syncthreads();
    for (int other = 0; other < tile_lanes; ++other)
#pragma unroll
      for (int r = 0; r < rows_per_warp; ++r)
        if (memory.seen[warp][r][other]) {
          A coefficient = memory.coefficients[warp][r][other];
#pragma unroll
          for (int c = 0; c < COLUMNS; ++c)
            sums[r][c] = multiply_add(coefficient, memory.values[other][lane + warp_lanes * c], sums[r][c]);
        }
  }

  // The rows of a result, times a factor of each.
  template <class Target>
  FS_INLINE void store(const A (&sums)[rows_per_warp][COLUMNS], const A (&factor)[rows_per_warp], Target target, int64_t first,
                       int64_t size) {
#pragma unroll
    for (int r = 0; r < rows_per_warp; ++r) {
      S* row = target(rows_per_warp * warp + r);  // NULL: there is no such row
      if (!row) continue;
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) {
        int64_t column = first + lane + warp_lanes * c;
        if (column < size) row[column] = narrow<S>(factor[r] == A(0) ? A(0) : sums[r][c] * factor[r]);
      }
    }
  }
};

// Which tile of which head of which sequence a block works on: blockIdx.x counts tiles first, then heads, then sequences.
struct Place {
  int64_t tile, head, batch;
  FS_INLINE Place(int64_t tiles, int64_t heads) {
    int64_t index = blockIdx.x;
    tile = index % tiles;
    head = index / tiles % heads;
    batch = index / tiles / heads;
  }
};

// The larger one, NaN if either is: every lane of a warp must come to the same result.
template <class A>
FS_INLINE A larger_or_nan(A a, A b) {
  return a < b || b != b ? b : a;
}
template <class A>
FS_INLINE A largest_of_lanes(A value) {
#pragma unroll
  for (int mask = warp_lanes / 2; mask; mask /= 2) value = larger_or_nan(value, __shfl_xor_sync(all_lanes, value, mask));
  return value;
}

}  // namespace
}  // namespace fastseq::cuda
