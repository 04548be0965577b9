// The one matrix-product micro-kernel and the loops around it.
//
// Every product here is C[rows, columns] = C0 + A[rows, K] * W[K, columns] with
//   A  in "blocked rows": K is cut into blocks of block_depth elements; each block is a dense [rows][block_stride] array.
//      The stride is a compile-time constant, so that one pointer reaches all the rows of a tile, and it is a cache line
//      more than the block, so that rows never fall into the same cache sets whatever K is.
//   W  in panels of panel_width = 2 vectors of columns: [panel][K][panel_width].
// A tile holds FS_TILE_ROWS x panel_width sums in registers: per k two loads of W, one broadcast per row, two multiply-adds
// per row. The sum over k runs in order of k whatever the tile, so bits do not depend on how rows or panels are shared out.
#pragma once

#include "parallel.h"
#include "vec.h"

namespace fastseq::FS_ISA {
namespace {

template <class T>
inline constexpr int64_t panel_width = 2 * lanes<T>;
template <class T>
inline constexpr int64_t block_depth = (FS_VECTOR_BYTES == 64 ? 2048 : 1024) / (int64_t)sizeof(T);
template <class T>
inline constexpr int64_t block_stride = block_depth<T> + 64 / (int64_t)sizeof(T);
// Terms that a tile adds up before it meets what was there.
template <class T>
inline constexpr int64_t longest_sum = block_depth<T> / 2;

// Widths that end up in saved tensors are rounded to this on every instruction set.
inline constexpr int64_t padded_multiple = 32;

template <class T>
struct BlockedRows {
  T* data;  // [ceil(K / block_depth)][rows][block_stride]
  int64_t rows;

  FS_INLINE T* at(int64_t row, int64_t k) const {
    return data + ((k / block_depth<T>)*rows + row) * block_stride<T> + k % block_depth<T>;
  }
  static int64_t size(int64_t rows, int64_t depth) {
    return round_up(depth, block_depth<T>) / block_depth<T> * rows * block_stride<T>;
  }
};

// How a tile walks A: along the rows of a blocked matrix, or through a copy in the tile's own order, [k][FS_TILE_ROWS].
// `rows_ahead` walks like `rows` and asks for what comes after the panel meanwhile. `strided` walks A along the rows while the
// panel lies in a larger matrix, its rows panel_step apart.
enum class Walk { rows, rows_ahead, interleaved, strided };

// With vectors of 32 bytes a turn of 6 rows is 20 instructions that count, in 6 cycles: an eighth or a tenth of the time is
// lost to two or three more where a hyperthread next door takes half of the decoder. So pointers move every fourth turn, and
// nothing is asked for that the processor's own prefetcher brings as well.
inline constexpr bool short_turns = FS_VECTOR_BYTES == 32;

// c[R][panel_width] = init + A * panel. init_stride 0 repeats one row (a bias). The sum starts from zero and init is added
// last: its cache lines arrive behind the loop, and partial sums of similar size lose fewer digits.
// Weights are asked for prefetch_turns early, which makes weights from L3 nearly as fast as from L2. Where the multiply-add
// broadcasts by itself, some rows leave it that: 48 instructions per turn of 14 rows leave the decoder little slack, fewer
// give it some, and too many such rows would run out of load ports instead.
// With Walk::rows_ahead a turn asks for one line of what comes after this panel, from `ahead` on, into the second-level cache.
template <class T, Walk walk, int R>
FS_NOINLINE void tile(const T* a, const T* panel /* [depth][panel_width] */, int64_t depth, const T* init, int64_t init_stride,
                      T* c, int64_t c_stride, int64_t panel_step, const T* ahead, int64_t ahead_step) {
  constexpr int64_t prefetch_turns = 32;
  constexpr int plain_rows = broadcasts_in_multiply_add ? R - R * 2 / 7 : R;
  constexpr bool along_rows = walk != Walk::interleaved;
  constexpr int unrolled = short_turns ? 4 : 2;
  constexpr int64_t row_step = along_rows ? block_stride<T> : 1;
  constexpr int64_t k_step = along_rows ? 1 : FS_TILE_ROWS;
  if constexpr (walk != Walk::strided) panel_step = panel_width<T>;
  Vec<T> sum[R][2] = {};
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    __builtin_prefetch(init + r * init_stride);
    __builtin_prefetch(init + r * init_stride + lanes<T>);
  }
  auto turn = [&](int64_t k) __attribute__((always_inline)) {
    const T* weights = panel + k * panel_step;
    Vec<T> w0 = load(weights), w1 = load(weights + lanes<T>);
    if constexpr (!short_turns) __builtin_prefetch(weights + prefetch_turns * panel_step);
    if constexpr (!short_turns && walk == Walk::strided) __builtin_prefetch(weights + prefetch_turns * panel_step + lanes<T>);
    if constexpr (walk == Walk::rows_ahead) {
      __builtin_prefetch(ahead, 0, 2);
      ahead += ahead_step;
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const T* scalar = a + r * row_step + k * k_step;
      if (r >= plain_rows) {
        sum[r][0] = multiply_add_scalar(scalar, w0, sum[r][0]);
        sum[r][1] = multiply_add_scalar(scalar, w1, sum[r][1]);
        continue;
      }
      Vec<T> value = broadcast(*scalar);
      accumulate<T>(sum[r][0], value, w0);
      accumulate<T>(sum[r][1], value, w1);
    }
  };
  // Long sums go by way of C in equal parts: the shorter a running sum, the more digits it keeps.
  for (int64_t parts = (depth + longest_sum<T> - 1) / longest_sum<T>;; --parts) {
    int64_t turns = parts > 1 ? depth / parts : depth;
    depth -= turns;
    for (int64_t k = turns / unrolled; k > 0; --k) {
#pragma GCC unroll 4
      for (int i = 0; i < unrolled; ++i) turn(i);
      a += unrolled * k_step;
      panel += unrolled * panel_step;
    }
    for (int64_t k = turns % unrolled; k > 0; --k) {
      turn(0);
      a += k_step;
      panel += panel_step;
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      store(c + r * c_stride, sum[r][0] + load(init + r * init_stride));
      store(c + r * c_stride + lanes<T>, sum[r][1] + load(init + r * init_stride + lanes<T>));
    }
    if (!depth) break;
    init = c;
    init_stride = c_stride;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = Vec<T>{};
  }
}

template <class T>
using TileFunction = void (*)(const T*, const T*, int64_t, const T*, int64_t, T*, int64_t, int64_t, const T*, int64_t);

// One instance of the tile per number of rows, indexed by that.
template <class T, Walk walk>
struct Tiles {
#if FS_TILE_ROWS == 14
  static constexpr TileFunction<T> table[] = {nullptr,           tile<T, walk, 1>,  tile<T, walk, 2>,  tile<T, walk, 3>,
                                              tile<T, walk, 4>,  tile<T, walk, 5>,  tile<T, walk, 6>,  tile<T, walk, 7>,
                                              tile<T, walk, 8>,  tile<T, walk, 9>,  tile<T, walk, 10>, tile<T, walk, 11>,
                                              tile<T, walk, 12>, tile<T, walk, 13>, tile<T, walk, 14>};
#elif FS_TILE_ROWS == 12
  static constexpr TileFunction<T> table[] = {nullptr,          tile<T, walk, 1>, tile<T, walk, 2>,  tile<T, walk, 3>,
                                              tile<T, walk, 4>, tile<T, walk, 5>, tile<T, walk, 6>,  tile<T, walk, 7>,
                                              tile<T, walk, 8>, tile<T, walk, 9>, tile<T, walk, 10>, tile<T, walk, 11>,
                                              tile<T, walk, 12>};
#else
  static constexpr TileFunction<T> table[] = {nullptr,          tile<T, walk, 1>, tile<T, walk, 2>, tile<T, walk, 3>,
                                              tile<T, walk, 4>, tile<T, walk, 5>, tile<T, walk, 6>};
#endif
};

template <class T, Walk walk>
FS_INLINE void run_tile(int64_t rows, const T* a, const T* panel, int64_t depth, const T* init, int64_t init_stride, T* c,
                        int64_t c_stride, int64_t panel_step = panel_width<T>) {
  Tiles<T, walk>::table[rows](a, panel, depth, init, init_stride, c, c_stride, panel_step, nullptr, 0);
}
// Along rows, asking for `ahead` if there is something to ask for.
template <class T>
FS_INLINE void run_tile_ahead(int64_t rows, const T* a, const T* panel, int64_t depth, const T* init, int64_t init_stride, T* c,
                              int64_t c_stride, const T* ahead /* or NULL */, int64_t ahead_step) {
  const TileFunction<T>* table = ahead ? Tiles<T, Walk::rows_ahead>::table : Tiles<T, Walk::rows>::table;
  table[rows](a, panel, depth, init, init_stride, c, c_stride, panel_width<T>, ahead, ahead_step);
}

// Rows are dealt to tiles evenly: 16 rows go as 8 + 8, not as 14 + 2, because a short tile waits for W.
FS_INLINE int64_t tile_count(int64_t rows) { return (rows + FS_TILE_ROWS - 1) / FS_TILE_ROWS; }

// The same for a few rows of a step: four sums over every fourth k each. One sum would wait for its own multiply-add most of
// the time, and would lose more digits over as many terms.
template <class T, int R>
FS_NOINLINE void short_tile(const T* a /* R rows, block_stride apart */, const T* panel /* [depth][panel_width] */,
                            int64_t depth, const T* init, int64_t init_stride, T* c, int64_t c_stride) {
  constexpr int parts = 4;
  constexpr int64_t prefetch_turns = 32;
  Vec<T> sum[parts][R][2] = {};
  auto turn = [&](int part, int64_t k) __attribute__((always_inline)) {
    const T* weights = panel + k * panel_width<T>;
    Vec<T> w0 = load(weights), w1 = load(weights + lanes<T>);
    __builtin_prefetch(weights + prefetch_turns * panel_width<T>);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      Vec<T> value = broadcast(a[r * block_stride<T> + k]);
      sum[part][r][0] = fused_multiply_add(value, w0, sum[part][r][0]);
      sum[part][r][1] = fused_multiply_add(value, w1, sum[part][r][1]);
    }
  };
  int64_t k = 0;
  for (; k + parts <= depth; k += parts) {
#pragma GCC unroll 4
    for (int part = 0; part < parts; ++part) turn(part, k + part);
  }
  for (; k < depth; ++k) turn(0, k);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      Vec<T> total = (sum[0][r][half] + sum[1][r][half]) + (sum[2][r][half] + sum[3][r][half]);
      store(c + r * c_stride + half * lanes<T>, total + load(init + r * init_stride + half * lanes<T>));
    }
}

// Up to here a step's rows go through short_tile. It depends on the rows of a step alone, so bits do not depend on the threads.
inline constexpr int64_t short_rows = FS_TILE_ROWS == 14 ? 3 : 1;

// c[rows][panel_width] = init + A[first_row ... , first_k ... first_k + depth) * panel.
// The first tile of rows brings a block of the panel into the second-level cache, which the others read. They leave the memory
// alone, so they ask for the next block meanwhile, a line or less of it a turn; after the last block that is what follows the
// panel in memory, mostly the next panel. With weights beyond L2 it is worth 5 to 10 % of the time.
template <class T>
FS_INLINE void multiply_panel(BlockedRows<T> a, int64_t first_row, int64_t rows, int64_t first_k, int64_t depth,
                              const T* panel /* [depth][panel_width] */, const T* init, int64_t init_stride, T* c,
                              int64_t c_stride) {
  int64_t tiles = tile_count(rows);
  int64_t ahead_step = tiles > 1 ? (panel_width<T> + tiles - 2) / (tiles - 1) : 0;
  EvenSplit tile_rows(rows, tiles);
  for (int64_t done = 0; done < depth;) {
    int64_t k = first_k + done;
    int64_t step = minimum(depth - done, block_depth<T> - k % block_depth<T>);
    for (int64_t i = 0; i < tiles; ++i) {
      Range part = tile_rows.part(i);
      const T* weights = panel + done * panel_width<T>;
      const T* ahead = i ? weights + step * (panel_width<T> + (i - 1) * ahead_step) : nullptr;
      const T* left = a.at(first_row + part.begin, k);
      const T* start = init + part.begin * init_stride;
      T* target = c + part.begin * c_stride;
      if (rows == 1)
        short_tile<T, 1>(left, weights, step, start, init_stride, target, c_stride);
      else if (rows == 2 && short_rows >= 2)
        short_tile<T, 2>(left, weights, step, start, init_stride, target, c_stride);
      else if (rows == 3 && short_rows >= 3)
        short_tile<T, 3>(left, weights, step, start, init_stride, target, c_stride);
      else
        run_tile_ahead(part.count(), left, weights, step, start, init_stride, target, c_stride, ahead, ahead_step);
    }
    init = c;
    init_stride = c_stride;
    done += step;
  }
}

// Where a tile of C lies and what its sum starts from; init_stride 0 repeats one row [panel_width].
template <class T>
struct TilePlace {
  T* c;
  int64_t c_stride;
  const T* init;
  int64_t init_stride;
};

// The large product: rows of A against a run of panels.
//   rows_of(row, count, k, depth) is where those rows of A begin, block_stride apart, depth elements from k.
//   place_of(row, panel) is the place of the tile whose first element is (row, first column of panel).
//   finish(row, count, panel) is called when those rows of that panel are complete, still warm in the cache.
// Loop order: a group of panels small enough to stay in L2, then blocks of K, then row tiles (their A stays in L1),
// then the panels of the group.
template <class T, class Rows, class Place, class Finish>
FS_INLINE void multiply_blocked(Rows rows_of, Range rows, int64_t first_k, int64_t depth,
                                const T* panels /* [panel][depth][panel_width] */, Range panel_range, Place place_of,
                                Finish finish) {
  constexpr int64_t group = (640 << 10) / (block_depth<T> * panel_width<T> * (int64_t)sizeof(T));
  int64_t tiles = tile_count(rows.count());
  EvenSplit tile_rows(rows.count(), tiles);
  for (int64_t first = panel_range.begin; first < panel_range.end; first += group) {
    int64_t last = minimum(first + group, panel_range.end);
    for (int64_t done = 0; done < depth;) {
      int64_t k = first_k + done;
      int64_t step = minimum(depth - done, block_depth<T> - k % block_depth<T>);
      for (int64_t i = 0; i < tiles; ++i) {
        Range part = tile_rows.part(i);
        int64_t row = rows.begin + part.begin;
        const T* a = rows_of(row, part.count(), k, step);
        for (int64_t p = first; p < last; ++p) {
          TilePlace<T> place = place_of(row, p);
          const T* weights = panels + (p * depth + done) * panel_width<T>;
          run_tile<T, Walk::rows>(part.count(), a, weights, step, done ? place.c : place.init,
                                  done ? place.c_stride : place.init_stride, place.c, place.c_stride);
          if (done + step == depth) finish(row, part.count(), p);
        }
      }
      done += step;
    }
  }
}

}  // namespace
}  // namespace fastseq::FS_ISA
