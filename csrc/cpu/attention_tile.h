// The micro-kernel of gemm.h for attention: the same R x two vectors of sums in registers, but over operands as they lie.
//
// Lanes are query rows throughout. That makes every operand of forward one of two kinds: a panel [k][panel_width] of lanes
// (queries transposed, or the weights that the softmax has just written), and keys or values read element by element from
// the user's memory, whatever its strides. Maxima and sums over keys run down rows. Only rows that are multiplied along
// themselves by several panels are re-laid, a block at a time (RowBlock).
#pragma once

#include "gemm.h"

namespace fastseq::FS_ISA {
namespace {

// Rows of a matrix as they lie. Where enough panels read them, once more in the order of a tile of products: its FS_TILE_ROWS
// rows side by side, [tile][size][FS_TILE_ROWS]. A tile then reads one stream instead of one per row.
template <class T>
struct RowBlock {
  const T* data;
  int64_t stride;
  const T* tiles = nullptr;  // or NULL
  int64_t size = 0;          // elements of a row, where there are tiles
  int64_t first = 0;         // place of the first row in the tiles

  FS_INLINE RowBlock from(int64_t row) const { return {data + row * stride, stride, tiles, size, first + row}; }

  // Elements of the tiles of so many rows; the last store reaches past them.
  static constexpr int64_t tiles_size(int64_t rows, int64_t row_size) {
    return round_up(rows, FS_TILE_ROWS) * row_size + lanes<T>;
  }
  FS_NOINLINE void pack(int64_t rows, int64_t row_size, T* target /* [tiles_size] */) {
    constexpr int64_t L = lanes<T>, R = FS_TILE_ROWS;
    tiles = target;
    size = row_size;
    for (int64_t tile = 0; tile < rows; tile += R, target += R * size)
      for (int64_t k = 0; k < size; k += L) {
        int64_t count = minimum(L, size - k);
        // Rows may lie far apart, where the processor's own prefetcher does not look.
        for (int64_t row = tile + R; row < minimum(tile + 2 * R, rows); ++row) __builtin_prefetch(data + row * stride + k);
        // A store may reach into the next k: the parts of a tile go from the last to the first, which then repairs that.
        for (int64_t part = (R - 1) / L * L; part >= 0; part -= L) {
          Vec<T> block[L];
          for (int j = 0; j < L; ++j)
            block[j] =
                part + j < R && tile + part + j < rows ? load_partial(data + (tile + part + j) * stride + k, count) : Vec<T>{};
          transpose<T>(block);
          for (int64_t j = 0; j < count; ++j) store(target + (k + j) * R + part, block[j]);
        }
      }
  }
};

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
      const T* scalar = (const T*)(base[r / 3] + (r % 3) * stride_bytes) + ahead;
      // Rows with a pointer of their own: with an index register the instruction would be split in two again.
      if (broadcasts_in_multiply_add && r % 3 == 0) {
        sum[r][0] = multiply_add_scalar(scalar, w0, sum[r][0]);
        sum[r][1] = multiply_add_scalar(scalar, w1, sum[r][1]);
        continue;
      }
      Vec<T> value = broadcast(*scalar);
      accumulate<T>(sum[r][0], value, w0);
      accumulate<T>(sum[r][1], value, w1);
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
  constexpr int plain_rows = R - R * 2 / 7, unrolled = short_turns ? 4 : 2;
  auto turn = [&]() FS_LAMBDA_INLINE {
    Vec<T> w0 = load(panel), w1 = load(panel + lanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      if (broadcasts_in_multiply_add && r >= plain_rows) {
        sum[r][0] = multiply_add_scalar(a + r, w0, sum[r][0]);
        sum[r][1] = multiply_add_scalar(a + r, w1, sum[r][1]);
        continue;
      }
      Vec<T> value = broadcast(a[r]);
      accumulate<T>(sum[r][0], value, w0);
      accumulate<T>(sum[r][1], value, w1);
    }
    a += a_stride;
    panel += panel_stride;
  };
  for (int64_t k = depth / unrolled; k > 0; --k) {
#pragma GCC unroll 4
    for (int i = 0; i < unrolled; ++i) turn();
  }
  for (int64_t k = depth % unrolled; k > 0; --k) turn();
}

// c[R][panel_width] = sums, and the largest value per lane joins `largest`; a NaN does not take part.
template <class T, int R>
FS_INLINE void store_products(const Vec<T> (&sum)[R][2], T* c, T* largest /* [panel_width] */) {
  constexpr int chains = 3;  // one maximum after the other would wait for itself
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    Vec<T> top[chains];
#pragma GCC unroll 4
    for (int i = 0; i < chains; ++i) top[i] = load(largest + half * lanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      store(c + r * panel_width<T> + half * lanes<T>, sum[r][half]);
      top[r % chains] = at_least(top[r % chains], sum[r][half]);
    }
    store(largest + half * lanes<T>, at_least(at_least(top[0], top[1]), top[2]));
  }
}

// c[R][panel_width] = A * panel for A's rows as they lie.
template <class T, int R>
FS_NOINLINE void product_tile(const T* a, int64_t a_stride, const T* panel, int64_t depth, T* c, T* largest) {
  Vec<T> sum[R][2] = {};
  accumulate_rows<T, R>(a, a_stride, panel, panel_width<T>, depth, sum);
  store_products<T, R>(sum, c, largest);
}

// The same for rows side by side, A [depth][FS_TILE_ROWS].
template <class T, int R>
FS_NOINLINE void interleaved_product_tile(const T* a, const T* panel, int64_t depth, T* c, T* largest) {
  Vec<T> sum[R][2] = {};
  accumulate_columns<T, R>(a, FS_TILE_ROWS, panel, panel_width<T>, depth, sum);
  store_products<T, R>(sum, c, largest);
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
struct InterleavedProductTiles {
  using Function = void (*)(const T*, const T*, int64_t, T*, T*);
  static constexpr Function table[] = {interleaved_product_tile<T, Rows + 1>...};
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

// c[rows][panel_width] = the block's rows [rows][depth] * panel; largest[panel_width] takes part in the maximum and is updated.
template <class T>
FS_INLINE void multiply_rows(RowBlock<T> block, int64_t rows, const T* panel, int64_t depth, T* c, T* largest) {
  if (block.tiles) {
    for (int64_t done = 0, count; done < rows; done += count) {
      int64_t row = block.first + done, place = row % FS_TILE_ROWS;
      count = minimum(FS_TILE_ROWS - place, rows - done);
      const T* tile = block.tiles + row / FS_TILE_ROWS * FS_TILE_ROWS * block.size + place;
      tile_table<InterleavedProductTiles, T, FS_TILE_ROWS>()[count - 1](tile, panel, depth, c + done * panel_width<T>, largest);
    }
    return;
  }
  int64_t tiles = tile_count(rows);
  EvenSplit split_rows(rows, tiles);
  for (int64_t i = 0; i < tiles; ++i) {
    Range part = split_rows.part(i);
    tile_table<ProductTiles, T, FS_TILE_ROWS>()[part.count() - 1](block.data + part.begin * block.stride, block.stride, panel,
                                                                  depth, c + part.begin * panel_width<T>, largest);
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
