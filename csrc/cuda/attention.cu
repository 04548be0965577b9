// The attention kernels of one storage type: compiled once for each, FS_STORAGE and FS_STORAGE_NAME say which.
#include "attention_backward.cuh"
#include "attention_forward.cuh"
#include "launch.h"

#define FS_STRING_OF(x) #x
#define FS_STRING(x) FS_STRING_OF(x)
#define FS_JOIN_OF(a, b) a##b
#define FS_JOIN(a, b) FS_JOIN_OF(a, b)

namespace fastseq::cuda {
namespace {

using S = FS_STORAGE;

// Launches kernels of a call until one fails.
struct Launcher {
  const fastseq_attention_shape& shape;
  cudaStream_t stream;
  char text[160];
  int status = 0;

  Launcher(const fastseq_attention_shape& shape, cudaStream_t stream) : shape(shape), stream(stream) {
    snprintf(text, sizeof text, "B %lld, Hq %lld, Hkv %lld, Sq %lld, Skv %lld, E %lld, Ev %lld", (long long)shape.batch,
             (long long)shape.heads, (long long)shape.kv_heads, (long long)shape.queries, (long long)shape.keys,
             (long long)shape.key_size, (long long)shape.value_size);
  }
  template <class... Parameters, class... Arguments>
  void operator()(const char* kernel_name, void (*kernel)(Parameters...), int64_t blocks, Arguments... arguments) {
    if (status || blocks == 0) return;
    char name[64];
    snprintf(name, sizeof name, "%s<%s>", kernel_name, FS_STRING(FS_STORAGE_NAME));
    status = launch(name, text, kernel, Grid{blocks}, attention_threads, 0, false, stream, arguments...);
  }
  int64_t tiles(int64_t rows, int64_t heads, int64_t per_tile) const { return divide_up(rows, per_tile) * heads * shape.batch; }
};

// Calls body with the columns a lane owns for heads of this size, as a type.
template <int N>
struct Columns {
  static constexpr int count = N;
};
template <class Body>
void with_columns(int64_t size, Body body) {
  // At most 32 KiB of values in a tile.
  constexpr int most = sizeof(Sum<S>) == 8 ? 4 : 8;
  if (size <= 2 * warp_lanes)
    body(Columns<2>{});
  else if (most == 4 || size <= 4 * warp_lanes)
    body(Columns<4>{});
  else
    body(Columns<most>{});
}

int forward(const fastseq_attention_forward& call, cudaStream_t stream) {
  const fastseq_attention_shape& shape = call.shape;
  Launcher launcher(shape, stream);
  with_columns(shape.value_size, [&](auto columns) {
    launcher("attention_forward", attention_forward_kernel<S, decltype(columns)::count>,
             launcher.tiles(shape.queries, shape.heads, tile_rows), call);
  });
  if (call.weights.data)
    launcher(
        "attention_weights", attention_weights_kernel<S>,
        launcher.tiles(shape.queries, call.average_weights ? 1 : shape.heads, tile_rows) * divide_up(shape.keys, tile_lanes),
        call);
  return launcher.status;
}

int backward(const fastseq_attention_backward& call, const fastseq_rows& delta, cudaStream_t stream) {
  const fastseq_attention_shape& shape = call.shape;
  Launcher launcher(shape, stream);
  launcher("attention_delta", attention_delta_kernel<S>, launcher.tiles(shape.queries, shape.heads, attention_warps), call,
           delta);
  if (call.grad_query.data)
    with_columns(shape.key_size, [&](auto columns) {
      launcher("attention_query", attention_query_kernel<S, decltype(columns)::count>,
               launcher.tiles(shape.queries, shape.heads, tile_rows), call, delta);
    });
  if (call.grad_key.data || call.grad_value.data)
    with_columns(larger(shape.key_size, shape.value_size), [&](auto columns) {
      launcher("attention_key", attention_key_kernel<S, decltype(columns)::count>,
               launcher.tiles(shape.keys, shape.kv_heads, tile_rows), call, delta);
    });
  if (call.grad_bias.data) {
    const fastseq_scores& target = call.grad_bias;
    int64_t row_tiles = target.query_stride ? divide_up(shape.queries, tile_rows) : 1;
    int64_t key_tiles = target.key_stride ? divide_up(shape.keys, tile_lanes) : 1;
    int64_t heads = target.head_stride ? shape.heads : 1, batch = target.batch_stride ? shape.batch : 1;
    launcher("attention_bias", attention_bias_kernel<S>, row_tiles * key_tiles * heads * batch, call, delta);
  }
  if (call.grad_sinks) launcher("attention_sink", attention_sink_kernel<S>, shape.heads, call, delta);
  return launcher.status;
}

}  // namespace

const AttentionTable FS_JOIN(attention_, FS_STORAGE_NAME) = {forward, backward};

}  // namespace fastseq::cuda
