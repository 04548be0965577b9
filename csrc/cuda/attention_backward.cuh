// Attention backward: weights are computed again from forward's row maxima and scales. A block owns 16 queries (their gradient)
// or 16 keys (theirs and their values'), so that every sum is one block's, in one order, and nothing is added atomically.
#pragma once

#include "attention_tile.cuh"

namespace fastseq::cuda {
namespace {

// What one pair contributes, given query . key and value . grad_output.
template <class A>
struct PairGradient {
  bool visible;
  A weight;        // after dropout
  A grad_score;    // of the score, bias included
  A grad_product;  // of query . key
};
template <class S>
FS_INLINE PairGradient<Sum<S>> pair_gradient(const fastseq_attention_backward& call, const fastseq_rows& delta,
                                             const Scorer<S>& scorer, int64_t i, int64_t j, Sum<S> product,
                                             Sum<S> grad_weight) {
  using A = Sum<S>;
  PairGradient<A> gradient{};
  auto score = scorer(product, i, j);
  gradient.visible = score.visible;
  if (!score.visible) return gradient;
  int64_t row = scorer.span.query_start + i;
  A probability = exponential(score.value - *row_at<A>(call.row_maximum, scorer.batch, scorer.head, row)) *
                  *row_at<A>(call.row_scale, scorer.batch, scorer.head, row);
  A kept = scorer.kept(i, j);
  gradient.weight = probability * kept;
  gradient.grad_score = probability * (grad_weight * kept - *row_at<A>(delta, scorer.batch, scorer.head, row));
  gradient.grad_product = gradient.grad_score * score.slope;
  return gradient;
}

// delta[row] = output . grad_output - grad_lse: what the softmax subtracts from every weight's gradient. One warp a row.
template <class S>
__global__ void __launch_bounds__(attention_threads, 2)
    attention_delta_kernel(fastseq_attention_backward call, fastseq_rows delta) {
  using A = Sum<S>;
  const fastseq_attention_shape& shape = call.shape;
  Place place(divide_up(shape.queries, attention_warps), shape.heads);
  Span span(shape, place.batch);
  int lane = (int)threadIdx.x % warp_lanes;
  int64_t i = place.tile * attention_warps + (int)threadIdx.x / warp_lanes, row = span.query_start + i;
  if (i >= span.query_rows) return;
  A sum = 0;
  if (i < span.queries) {
    const S* output = row_at<S>(call.output, place.batch, place.head, row);
    const S* gradient = row_at<S>(call.grad_output, place.batch, place.head, row);
    for (int64_t c = lane; c < shape.value_size; c += warp_lanes) sum = multiply_add(widen(output[c]), widen(gradient[c]), sum);
  }
  sum = sum_of_lanes(sum);
  if (lane == 0) {
    // A row that sees nothing has no weights: whatever its gradients are, they go nowhere.
    bool sees = *row_at<A>(call.row_scale, place.batch, place.head, row) != A(0);
    if (call.grad_lse.data) sum -= *row_at<A>(call.grad_lse, place.batch, place.head, row);
    *row_at<A>(delta, place.batch, place.head, row) = sees ? sum : A(0);
  }
}

template <class S, int COLUMNS>
__global__ void __launch_bounds__(attention_threads, 2)
    attention_query_kernel(fastseq_attention_backward call, fastseq_rows delta) {
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
  Stretch keys = keys_seen(shape, span, first_row, smaller(first_row + tile_rows, span.queries) - 1);
  auto query_row = [&](const fastseq_heads& tensor, int row) -> const S* {
    int64_t i = first_row + row;
    return i < span.queries ? row_at<S>(tensor, b, h, span.query_start + i) : nullptr;
  };

  for (int64_t column = 0; column < shape.key_size; column += warp_lanes * COLUMNS) {
    A sums[rows_per_warp][COLUMNS] = {};
    for (int64_t first = keys.begin; first < keys.end; first += tile_lanes) {
      auto key_of = [&](const fastseq_heads& tensor, int other) -> const S* {
        return first + other < keys.end ? row_at<S>(tensor, b, kv_head, span.key_start + first + other) : nullptr;
      };
      A products[rows_per_warp] = {}, grad_weights[rows_per_warp] = {}, coefficients[rows_per_warp];
      bool seen[rows_per_warp];
      auto key = [&](int other) { return key_of(call.key, other); };
      tile.multiply([&](int row) { return query_row(call.query, row); }, key, shape.key_size, products);
      tile.multiply([&](int row) { return query_row(call.grad_output, row); },
                    [&](int other) { return key_of(call.value, other); }, shape.value_size, grad_weights);
#pragma unroll
      for (int r = 0; r < rows_per_warp; ++r) {
        int64_t i = first_row + rows_per_warp * tile.warp + r;
        auto gradient = pair_gradient(call, delta, scorer, i, first + tile.lane, products[r], grad_weights[r]);
        seen[r] = gradient.visible;
        coefficients[r] = gradient.grad_product;
      }
      tile.accumulate(coefficients, seen, key, column, shape.key_size, sums);
    }
    const A ones[rows_per_warp] = {1, 1, 1, 1};
    tile.store(
        sums, ones,
        [&](int row) -> S* {
          int64_t i = first_row + row;
          return i < span.query_rows ? row_at<S>(call.grad_query, b, h, span.query_start + i) : nullptr;
        },
        column, shape.key_size);
  }
}

// Rows of the tile are keys, lanes queries of all heads that share them.
template <class S, int COLUMNS>
__global__ void __launch_bounds__(attention_threads, 2)
    attention_key_kernel(fastseq_attention_backward call, fastseq_rows delta) {
  using A = Sum<S>;
  using Memory = TileMemory<A, COLUMNS>;
  FS_SHARED(Memory, memory);
  const fastseq_attention_shape& shape = call.shape;
  Place place(divide_up(shape.keys, tile_rows), shape.kv_heads);
  int64_t b = place.batch, kv_head = place.head, group = shape.heads / shape.kv_heads, first_row = place.tile * tile_rows;
  Span span(shape, b);
  if (first_row >= span.key_rows) return;
  Tile<S, COLUMNS> tile(memory);
  Stretch queries = queries_seeing(shape, span, first_row, smaller(first_row + tile_rows, span.keys) - 1);
  auto key_row = [&](const fastseq_heads& tensor, int row) -> const S* {
    int64_t j = first_row + row;
    return j < span.keys ? row_at<S>(tensor, b, kv_head, span.key_start + j) : nullptr;
  };
  auto target = [&](const fastseq_heads& tensor, int row) -> S* {
    int64_t j = first_row + row;
    return j < span.key_rows ? row_at<S>(tensor, b, kv_head, span.key_start + j) : nullptr;
  };

  const A ones[rows_per_warp] = {1, 1, 1, 1};
  for (int64_t column = 0; column < larger(shape.key_size, shape.value_size); column += warp_lanes * COLUMNS) {
    A key_sums[rows_per_warp][COLUMNS] = {}, value_sums[rows_per_warp][COLUMNS] = {};
    for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
      Scorer<S> scorer(shape, span, b, h);
      for (int64_t first = queries.begin; first < queries.end; first += tile_lanes) {
        auto query_of = [&](const fastseq_heads& tensor, int other) -> const S* {
          return first + other < queries.end ? row_at<S>(tensor, b, h, span.query_start + first + other) : nullptr;
        };
        auto query = [&](int other) { return query_of(call.query, other); };
        auto gradient_row = [&](int other) { return query_of(call.grad_output, other); };
        A products[rows_per_warp] = {}, grad_weights[rows_per_warp] = {};
        A of_key[rows_per_warp], of_value[rows_per_warp];
        bool seen[rows_per_warp];
        tile.multiply([&](int row) { return key_row(call.key, row); }, query, shape.key_size, products);
        tile.multiply([&](int row) { return key_row(call.value, row); }, gradient_row, shape.value_size, grad_weights);
#pragma unroll
        for (int r = 0; r < rows_per_warp; ++r) {
          int64_t j = first_row + rows_per_warp * tile.warp + r;
          auto gradient = pair_gradient(call, delta, scorer, first + tile.lane, j, products[r], grad_weights[r]);
          seen[r] = gradient.visible;
          of_key[r] = gradient.grad_product;
          of_value[r] = gradient.weight;
        }
        if (call.grad_value.data) tile.accumulate(of_value, seen, gradient_row, column, shape.value_size, value_sums);
        if (call.grad_key.data) tile.accumulate(of_key, seen, query, column, shape.key_size, key_sums);
      }
    }
    if (call.grad_value.data)
      tile.store(value_sums, ones, [&](int row) { return target(call.grad_value, row); }, column, shape.value_size);
    if (call.grad_key.data)
      tile.store(key_sums, ones, [&](int row) { return target(call.grad_key, row); }, column, shape.key_size);
  }
}

// Gradient of the bias, 16 x 32 elements of it or, along a dimension it is broadcast over, their sum: the block goes over all
// pairs that share the elements.
template <class S>
__global__ void __launch_bounds__(attention_threads, 2)
    attention_bias_kernel(fastseq_attention_backward call, fastseq_rows delta) {
  using A = Sum<S>;
  using Memory = TileMemory<A, 1>;
  FS_SHARED(Memory, memory);
  const fastseq_attention_shape& shape = call.shape;
  const fastseq_scores& target = call.grad_bias;
  bool over_batch = target.batch_stride == 0, over_heads = target.head_stride == 0;
  bool over_queries = target.query_stride == 0, over_keys = target.key_stride == 0;
  int64_t row_tiles = over_queries ? 1 : divide_up(shape.queries, tile_rows);
  int64_t key_tiles = over_keys ? 1 : divide_up(shape.keys, tile_lanes);
  Place place(row_tiles * key_tiles, over_heads ? 1 : shape.heads);
  Tile<S, 1> tile(memory);
  int64_t own_row = place.tile / key_tiles * tile_rows, own_key = place.tile % key_tiles * tile_lanes;
  int64_t last_batch = over_batch ? shape.batch : place.batch + 1, last_head = over_heads ? shape.heads : place.head + 1;
  int64_t last_row = over_queries ? shape.queries : own_row + 1, last_key = over_keys ? shape.keys : own_key + 1;
  A sums[rows_per_warp] = {};
  for (int64_t b = over_batch ? 0 : place.batch; b < last_batch; ++b) {
    Span span(shape, b);
    for (int64_t h = over_heads ? 0 : place.head; h < last_head; ++h) {
      Scorer<S> scorer(shape, span, b, h);
      int64_t kv_head = h / (shape.heads / shape.kv_heads);
      for (int64_t first_row = own_row; first_row < last_row; first_row += tile_rows) {
        auto query_row = [&](const fastseq_heads& tensor, int row) -> const S* {
          int64_t i = first_row + row;
          return i < span.queries ? row_at<S>(tensor, b, h, span.query_start + i) : nullptr;
        };
        for (int64_t first = own_key; first < last_key; first += tile_lanes) {
          auto key_of = [&](const fastseq_heads& tensor, int other) -> const S* {
            return first + other < span.keys ? row_at<S>(tensor, b, kv_head, span.key_start + first + other) : nullptr;
          };
          A products[rows_per_warp] = {}, grad_weights[rows_per_warp] = {};
          tile.multiply([&](int row) { return query_row(call.query, row); }, [&](int other) { return key_of(call.key, other); },
                        shape.key_size, products);
          tile.multiply([&](int row) { return query_row(call.grad_output, row); },
                        [&](int other) { return key_of(call.value, other); }, shape.value_size, grad_weights);
#pragma unroll
          for (int r = 0; r < rows_per_warp; ++r) {
            int64_t i = first_row + rows_per_warp * tile.warp + r;
            sums[r] += pair_gradient(call, delta, scorer, i, first + tile.lane, products[r], grad_weights[r]).grad_score;
          }
        }
      }
    }
  }
  if (over_queries) {  // one row is left: that of the first warp
#pragma unroll
    for (int r = 1; r < rows_per_warp; ++r) sums[0] += sums[r];
    __syncthreads();
    memory.coefficients[tile.warp][0][tile.lane] = sums[0];
    __syncthreads();
    sums[0] = 0;
    for (int warp = 0; warp < attention_warps; ++warp) sums[0] += memory.coefficients[warp][0][tile.lane];
  }
#pragma unroll
  for (int r = 0; r < rows_per_warp; ++r) {
    A sum = over_keys ? sum_of_lanes(sums[r]) : sums[r];
    int64_t i = own_row + rows_per_warp * tile.warp + r, j = own_key + tile.lane;
    bool own = over_queries ? i == 0 : i < shape.queries;
    if (own && (over_keys ? tile.lane == 0 : j < shape.keys))
      *score_at<S>(target, place.batch, place.head, i, j) = narrow<S>(sum);
  }
}

// A sink takes part in the denominator only: its weight times what is subtracted from the gradients of the others. One block a
// head; sums of threads are added in order.
template <class S>
__global__ void __launch_bounds__(attention_threads, 2)
    attention_sink_kernel(fastseq_attention_backward call, fastseq_rows delta) {
  using A = Sum<S>;
  struct Sums {
    A of_thread[attention_threads];
  };
  FS_SHARED(Sums, sums);
  const fastseq_attention_shape& shape = call.shape;
  int64_t h = blockIdx.x;
  A sink = widen(((const S*)shape.sinks)[h]), sum = 0;
  for (int64_t b = 0; b < shape.batch; ++b) {
    Span span(shape, b);
    for (int64_t i = threadIdx.x; i < span.queries; i += attention_threads) {
      int64_t row = span.query_start + i;
      A scale = *row_at<A>(call.row_scale, b, h, row);
      if (scale != A(0))
        sum -= exponential(sink - *row_at<A>(call.row_maximum, b, h, row)) * scale * *row_at<A>(delta, b, h, row);
    }
  }
  sums.of_thread[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    A total = 0;
    for (int thread = 0; thread < attention_threads; ++thread) total += sums.of_thread[thread];
    ((S*)call.grad_sinks)[h] = narrow<S>(total);
  }
}

}  // namespace
}  // namespace fastseq::cuda
