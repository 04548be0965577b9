// Layer norm and RMS norm, backward. With n = (x - mean) / deviation (RMS: x / deviation) and g = grad_output * weight
//   grad_x = (g - mean(g) - n mean(g n)) / deviation + grad_sum        (RMS: without mean(g))
//   grad_weight = sum over rows of grad_output * n,  grad_bias = sum over rows of grad_output.
// The normalized values are not kept but computed again from x and the row's statistics.
//
// Rows go in blocks, whose number depends on sizes alone. Every block has sums of its own over its rows, which are added in
// the order of the blocks: the bits do not depend on the number of threads.
#pragma once

#include "norm_row.h"

namespace fastseq::FS_ISA {
namespace {

template <class T, bool Rms>
struct NormBackward {
  // Rows whose products are added up in registers before they meet the block's sums.
  static constexpr int group_rows = 4;

  const fastseq_norm_backward& call;
  const fastseq_norm_shape& shape = call.shape;
  const int64_t features = shape.features;
  const ElementDropout<T> dropout{shape.dropout, shape.dropout_seed, shape.dropout_offset};
  const bool wants_parameters = call.grad_weight || call.grad_bias;
  const bool wants_input = call.grad_x.data || call.grad_input.data;
  const int64_t stride = round_up(features, 64 / sizeof(T)) + 64 / sizeof(T);
  // A block's sums take a sixteenth of the memory of its rows at most.
  const int64_t block_rows = maximum(16, round_up((shape.rows + 63) / 64, group_rows));
  const int64_t blocks = (shape.rows + block_rows - 1) / block_rows;
  const T* weight = nullptr;  // [F]
  T* sums = nullptr;          // [blocks][2][stride], of the weight and of the bias
  Barrier* barrier = nullptr;

  // What a row is computed with, in all lanes.
  struct Row {
    const T *grad_output, *grad_sum, *x;  // [F]
    T* target;                            // [F]
    const T *next_grad_output, *next_x;   // of the next group: asked for while this one lies in the first cache
    T mean, shift, scale;
    T mean_g, mean_gn;  // means of g and g n
  };

  int run() {
    if (features == 0 || (shape.rows == 0 && !wants_parameters)) return FASTSEQ_OK;
    expect_writes<T>(call.grad_x, shape.rows, shape.features);
    expect_writes<T>(call.grad_input, shape.rows, shape.features);
    int threads = (int)minimum(norm_threads(shape), maximum(blocks, 1));
    Arena arena{nullptr};
    lay_out(arena);
    arena = Arena{(char*)fastseq_workspace(arena.used)};
    if (!arena.base) return FASTSEQ_OUT_OF_MEMORY;
    lay_out(arena);
    RangeQueue queue;
    auto body = [this, &queue](int rank, int size) {
      enter_phase(Phase::rows);
      for (Range mine; (mine = queue.take(blocks, 1, 1, blocks, size)).count();)
        for (int64_t block = mine.begin; block < mine.end; ++block) run_block(block);
      if (!wants_parameters) return;
      barrier->wait(size);
      enter_phase(Phase::join);
      add_blocks(split((features + lanes<T> - 1) / lanes<T>, size, rank));
    };
    run_parallel(threads, body);
    return FASTSEQ_OK;
  }

  void lay_out(Arena& arena) {
    barrier = arena.take<Barrier>(1);
    T* ones = arena.take<T>(call.weight ? 0 : features);
    sums = arena.take<T>(wants_parameters ? blocks * 2 * stride : 0);
    if (!arena.base) return;
    *barrier = Barrier{};
    weight = or_constant<T>(call.weight, ones, T(1), features);
  }

  void run_block(int64_t block) {
    int64_t begin = block * block_rows, end = minimum(begin + block_rows, shape.rows);
    T* weight_sum = sums + block * 2 * stride;
    if (wants_parameters) memset(weight_sum, 0, 2 * stride * sizeof(T));
    for (int64_t row = begin; row < end; row += group_rows) {
      switch (minimum(group_rows, end - row)) {
        case 1:
          run_rows<1>(row, weight_sum);
          break;
        case 2:
          run_rows<2>(row, weight_sum);
          break;
        case 3:
          run_rows<3>(row, weight_sum);
          break;
        default:
          run_rows<group_rows>(row, weight_sum);
      }
    }
  }

  // The means of one row are awaited while the next one, or the sums over rows, go on.
  template <int Rows>
  void run_rows(int64_t first, T* weight_sum) {
    Row rows[Rows];
    for (int r = 0; r < Rows; ++r) {
      rows[r] = row_at(first + r);
      if (!wants_input) continue;
      find_means(rows[r]);
      if (rows[r].grad_sum) {
        write_row<true>(rows[r]);
      } else {
        write_row<false>(rows[r]);
      }
      if (call.grad_input.data) drop_row(first + r, rows[r].target);
    }
    if (wants_parameters) add_rows<Rows>(rows, weight_sum);
  }

  FS_INLINE Row row_at(int64_t index) {
    Row row;
    row.grad_output = row_of<T>(call.grad_output, index);
    row.grad_sum = row_of<T>(call.grad_sum, index);
    row.x = row_of<T>(call.x, index);
    row.target = row_of<T>(call.grad_x.data ? call.grad_x : call.grad_input, index);
    int64_t next = minimum(index + 1, shape.rows - 1);
    row.next_grad_output = row_of<T>(call.grad_output, next);
    row.next_x = row_of<T>(call.x, next);
    row.scale = ((const T*)call.statistics.inverse_deviation)[index];
    row.mean = row.shift = T(0);
    if (!Rms) {
      row.mean = ((const T*)call.statistics.mean)[index];
      row.shift = -((const T*)call.statistics.mean_correction)[index] * row.scale;
    }
    return row;
  }

  // The normalized values, as forward had them.
  static FS_INLINE Vec<T> normalized(Vec<T> x, Vec<T> mean, Vec<T> scale, Vec<T> shift) {
    return Rms ? x * scale : fused_multiply_add(x - mean, scale, shift);
  }

  FS_INLINE void find_means(Row& row) {
    const T *grad_output = row.grad_output, *x = row.x, *factors = weight;
    Vec<T> mean = broadcast<T>(row.mean), scale = broadcast<T>(row.scale), shift = broadcast<T>(row.shift);
    T totals[2];
    sum_along_row<T>(features, totals, [=](int64_t column, int64_t count, auto partial, Vec<T>* sum) FS_LAMBDA_INLINE {
      // Lanes past the end have a gradient of zero; the value beside it must not be infinite.
      Vec<T> g = load_some<partial.value>(grad_output + column, count) * load_some<partial.value>(factors + column, count);
      Vec<T> value = normalized(load_some<partial.value>(x + column, count), mean, scale, shift);
      if (partial.value) value = first_lanes<T>(value, count);
      if (!Rms) sum[0] = sum[0] + g;
      sum[1] = fused_multiply_add(g, value, sum[1]);
    });
    T inverse_count = T(1) / (T)features;
    row.mean_g = Rms ? T(0) : totals[0] * inverse_count;
    row.mean_gn = totals[1] * inverse_count;
  }

  template <int Rows>
  FS_INLINE void add_rows(const Row* rows, T* weight_sum) {
    struct Lanes {
      const T *grad_output, *x;
      Vec<T> mean, scale, shift;
    } row[Rows];
    for (int r = 0; r < Rows; ++r)
      row[r] = {rows[r].grad_output, rows[r].x, broadcast<T>(rows[r].mean), broadcast<T>(rows[r].scale),
                broadcast<T>(rows[r].shift)};
    T* bias_sum = weight_sum + stride;
    for_each_vector<T>(features, [=](int64_t column, int64_t count, auto partial) FS_LAMBDA_INLINE {
      // The sums are as long as whole vectors.
      Vec<T> for_weight = load(weight_sum + column), for_bias = load(bias_sum + column);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        Vec<T> gradient = load_some<partial.value>(row[r].grad_output + column, count);
        Vec<T> x = load_some<partial.value>(row[r].x + column, count);
        for_weight = fused_multiply_add(gradient, normalized(x, row[r].mean, row[r].scale, row[r].shift), for_weight);
        for_bias = for_bias + gradient;
      }
      store(weight_sum + column, for_weight);
      store(bias_sum + column, for_bias);
    });
  }

  template <bool Sum>
  FS_INLINE void write_row(const Row& row) {
    const T *grad_output = row.grad_output, *grad_sum = row.grad_sum, *x = row.x, *factors = weight;
    const T *next_grad_output = row.next_grad_output, *next_x = row.next_x;
    T* target = row.target;
    Vec<T> mean = broadcast<T>(row.mean), scale = broadcast<T>(row.scale), shift = broadcast<T>(row.shift);
    Vec<T> minus_mean_g = broadcast<T>(-row.mean_g), mean_gn = broadcast<T>(row.mean_gn);
    for_each_vector<T>(features, [=](int64_t column, int64_t count, auto partial) FS_LAMBDA_INLINE {
      __builtin_prefetch(next_grad_output + column);
      __builtin_prefetch(next_x + column);
      Vec<T> gradient = load_some<partial.value>(grad_output + column, count);
      Vec<T> value = normalized(load_some<partial.value>(x + column, count), mean, scale, shift);
      Vec<T> centred = fused_multiply_add(gradient, load_some<partial.value>(factors + column, count), minus_mean_g);
      Vec<T> result = fused_negate_multiply_add(value, mean_gn, centred) * scale;
      if (Sum) result = result + load_some<partial.value>(grad_sum + column, count);
      store_some<partial.value>(target + column, result, count);
    });
  }

  // The input's gradient from that of the sum, which may lie in the same place.
  void drop_row(int64_t index, const T* grad_x) {
    T* target = row_of<T>(call.grad_input, index);
    for_each_dropped<T>(dropout, index, features,
                        [=](int64_t column, int64_t count, auto partial, Vec<T> factor) FS_LAMBDA_INLINE {
                          Vec<T> gradient = load_some<partial.value>(grad_x + column, count);
                          store_some<partial.value>(target + column, apply_dropout<T>(gradient, factor), count);
                        });
  }

  void add_blocks(Range vectors) {
    for (int64_t vector = vectors.begin; vector < vectors.end; ++vector) {
      int64_t column = vector * lanes<T>;
      Vec<T> for_weight = {}, for_bias = {};
      for (int64_t block = 0; block < blocks; ++block) {
        for_weight = for_weight + load(sums + block * 2 * stride + column);
        for_bias = for_bias + load(sums + (block * 2 + 1) * stride + column);
      }
      if (call.grad_weight) store_partial((T*)call.grad_weight + column, for_weight, features - column);
      if (call.grad_bias) store_partial((T*)call.grad_bias + column, for_bias, features - column);
    }
  }
};

template <class T>
int norm_backward(const fastseq_norm_backward* call) {
  ProfiledCall profiled;
  if (profiled.begins<T>("norm_backward", norm_name(call->shape))) {
    profile_sizes(call->shape);
    profile_size("grad_sum", call->grad_sum.data != nullptr);
    profile_size("needs_x", call->grad_x.data || call->grad_input.data);
    profile_size("needs_input", call->grad_input.data && call->grad_input.data != call->grad_x.data);
    profile_size("needs_weight", call->grad_weight || call->grad_bias);
  }
  if (call->shape.rms) return NormBackward<T, true>{*call}.run();
  return NormBackward<T, false>{*call}.run();
}

}  // namespace
}  // namespace fastseq::FS_ISA
