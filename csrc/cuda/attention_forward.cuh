// Attention forward with a running maximum and sum per row (Milakov and Gimelshein 2018), and the weights where they are asked
// for, which are computed anew from the final ones.
#pragma once

#include "attention_tile.cuh"

namespace fastseq::cuda {
namespace {

template <class S, int COLUMNS>
__global__ void __launch_bounds__(attention_threads, 2) attention_forward_kernel(fastseq_attention_forward call) {
  using A = Sum<S>;
  using Memory = TileMemory<A, COLUMNS>;
  FS_SHARED(Memory, memory);
  const fastseq_attention_shape& shape = call.shape;
  Place place(divide_up(shape.queries, tile_rows), shape.heads);
  int64_t b = place.batch, h = place.head, kv_head = h / (shape.heads / shape.kv_heads), first_row = place.tile * tile_rows;
  Span span(shape, b);
  if (first_row >= span.query_rows) return;
  Scorer<S> scorer(shape, span, b, h);
  Tile<S, COLUMNS> tile(memory);
  int64_t warp_row = first_row + rows_per_warp * tile.warp;
  const A none = minus_infinity(A(0));
  Stretch keys = keys_seen(shape, span, first_row, smaller(first_row + tile_rows, span.queries) - 1);
  auto query = [&](int row) -> const S* {
    int64_t i = first_row + row;
    return i < span.queries ? row_at<S>(call.query, b, h, span.query_start + i) : nullptr;
  };

  for (int64_t column = 0; column < shape.value_size; column += warp_lanes * COLUMNS) {
    A maximum[rows_per_warp], total[rows_per_warp] = {}, sums[rows_per_warp][COLUMNS] = {};
#pragma unroll
    for (int r = 0; r < rows_per_warp; ++r) maximum[r] = none;
    for (int64_t first = keys.begin; first < keys.end; first += tile_lanes) {
      auto row_of = [&](const fastseq_heads& tensor, int other) -> const S* {
        return first + other < keys.end ? key_row<S>(shape, tensor, span, b, kv_head, first + other) : nullptr;
      };
      A products[rows_per_warp] = {}, weights[rows_per_warp];
      bool seen[rows_per_warp];
      tile.multiply(query, [&](int other) { return row_of(call.key, other); }, shape.key_size, products);
#pragma unroll
      for (int r = 0; r < rows_per_warp; ++r) {
        int64_t i = warp_row + r, j = first + tile.lane;
        auto score = scorer(products[r], i, j);
        A next = larger_or_nan(maximum[r], largest_of_lanes(score.visible ? score.value : none));
        bool nothing = next == none;  // so far
        A factor = nothing ? A(1) : exponential(maximum[r] - next);
        A weight = score.visible && !nothing ? exponential(score.value - next) : A(0);
        total[r] = total[r] * factor + sum_of_lanes(weight);
        maximum[r] = next;
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) sums[r][c] *= factor;
        seen[r] = score.visible;
        weights[r] = seen[r] ? weight * scorer.kept(i, j) : A(0);
      }
      tile.accumulate(weights, seen, [&](int other) { return row_of(call.value, other); }, column, shape.value_size, sums);
    }

    A row_scale[rows_per_warp], factors[rows_per_warp];
#pragma unroll
    for (int r = 0; r < rows_per_warp; ++r) {
      int64_t i = warp_row + r, row = span.query_start + i;
      bool sees = maximum[r] != none;
      A factor = 1;
      if (sees && shape.sinks) {
        A sink = widen(((const S*)shape.sinks)[h]), next = larger_or_nan(maximum[r], sink);
        factor = exponential(maximum[r] - next);
        total[r] = total[r] * factor + exponential(sink - next);
        maximum[r] = next;
      }
      row_scale[r] = sees ? A(1) / total[r] : A(0);
      factors[r] = factor * row_scale[r];
      if (column == 0 && tile.lane == 0 && i < span.query_rows) {
        if (call.lse.data) *row_at<A>(call.lse, b, h, row) = sees ? maximum[r] + logarithm(total[r]) : none;
        if (call.row_maximum.data) *row_at<A>(call.row_maximum, b, h, row) = sees ? maximum[r] : A(0);
        if (call.row_scale.data) *row_at<A>(call.row_scale, b, h, row) = row_scale[r];
      }
    }
    tile.store(
        sums, factors,
        [&](int row) -> S* {
          int64_t i = first_row + row;
          return i < span.query_rows ? row_at<S>(call.output, b, h, span.query_start + i) : nullptr;
        },
        column, shape.value_size);
  }
}

// weights[i][j] of 16 x 32 pairs: of one head, or the mean over all of them.
template <class S>
__global__ void __launch_bounds__(attention_threads, 2) attention_weights_kernel(fastseq_attention_forward call) {
  using A = Sum<S>;
  using Memory = TileMemory<A, 1>;
  FS_SHARED(Memory, memory);
  const fastseq_attention_shape& shape = call.shape;
  int64_t key_tiles = divide_up(shape.keys, tile_lanes), heads = call.average_weights ? 1 : shape.heads;
  Place place(divide_up(shape.queries, tile_rows) * key_tiles, heads);
  int64_t b = place.batch, first_row = place.tile / key_tiles * tile_rows, first = place.tile % key_tiles * tile_lanes;
  Span span(shape, b);
  Tile<S, 1> tile(memory);
  A result[rows_per_warp] = {};
  int64_t first_head = call.average_weights ? 0 : place.head, last_head = call.average_weights ? shape.heads : place.head + 1;
  for (int64_t h = first_head; h < last_head; ++h) {
    Scorer<S> scorer(shape, span, b, h);
    A products[rows_per_warp] = {};
    tile.multiply(
        [&](int row) -> const S* {
          int64_t i = first_row + row;
          return i < span.queries ? row_at<S>(call.query, b, h, span.query_start + i) : nullptr;
        },
        [&](int other) -> const S* {
          int64_t j = first + other, kv_head = h / (shape.heads / shape.kv_heads);
          return j < span.keys ? key_row<S>(shape, call.key, span, b, kv_head, j) : nullptr;
        },
        shape.key_size, products);
#pragma unroll
    for (int r = 0; r < rows_per_warp; ++r) {
      int64_t i = first_row + rows_per_warp * tile.warp + r, j = first + tile.lane, row = span.query_start + i;
      auto score = scorer(products[r], i, j);
      if (!score.visible) continue;
      A weight = exponential(score.value - *row_at<A>(call.row_maximum, b, h, row)) * *row_at<A>(call.row_scale, b, h, row);
      result[r] += weight * scorer.kept(i, j);
    }
  }
#pragma unroll
  for (int r = 0; r < rows_per_warp; ++r) {
    int64_t i = first_row + rows_per_warp * tile.warp + r, j = first + tile.lane;
    if (i < shape.queries && j < shape.keys)
      *score_at<S>(call.weights, b, place.head, i, j) =
          narrow<S>(call.average_weights ? result[r] / (A)shape.heads : result[r]);
  }
}

}  // namespace
}  // namespace fastseq::cuda
