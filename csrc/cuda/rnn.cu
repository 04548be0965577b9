// The recurrent kernels of one storage type: compiled once for each, FS_STORAGE and FS_STORAGE_NAME say which.
#include "launch.h"
#include "rnn_backward.cuh"
#include "rnn_forward.cuh"

#define FS_STRING_OF(x) #x
#define FS_STRING(x) FS_STRING_OF(x)
#define FS_JOIN_OF(a, b) a##b
#define FS_JOIN(a, b) FS_JOIN_OF(a, b)

namespace fastseq::cuda {
namespace {

using S = FS_STORAGE;

// Calls body(Cell{}, "name of the cell").
template <class Body>
int with_cell(int cell, Body body) {
  switch (cell) {
#define FASTSEQ_CELL(name, Struct) \
  case FASTSEQ_CELL_##name:        \
    return body(Struct{}, #name);
#include "../cells/cells.def"
#undef FASTSEQ_CELL
  }
  return report(cudaErrorInvalidValue, "cell must be one of cells.def, got %d", cell);
}

struct Text {
  char name[64], shape[160];
  Text(const char* kernel, const char* cell, const fastseq_cuda_rnn_shape& shape) {
    snprintf(name, sizeof name, "%s<%s, %s>", kernel, cell, FS_STRING(FS_STORAGE_NAME));
    snprintf(this->shape, sizeof this->shape, "T %lld, B %lld, H %lld, D %lld, rows %lld", (long long)shape.steps,
             (long long)shape.batch, (long long)shape.hidden_size, (long long)shape.directions, (long long)shape.rows);
  }
};

// Shared memory of a block: rows of `length` elements, `per_unit` of them for each unit, and those of the tile.
int64_t shared_bytes(int64_t length, int64_t per_unit, int64_t units, int64_t tile_rows) {
  return (per_unit * units + tile_rows) * round_up(length, chunk_elements<S>) * (int64_t)sizeof(S);
}

template <class Kernel>
int make_plan(Kernel kernel, const Text& text, int mode, const fastseq_cuda_rnn_shape& shape, int64_t length, int64_t per_unit,
              fastseq_cuda_plan* plan) {
  Device device;
  if (device.status) return device.status;
  int64_t H = shape.hidden_size, B = shape.batch, D = shape.directions;
  int64_t units = 0, block_rows = 0, tile = 0;
  // The widest tile that fits beside the weights of `count` units.
  auto fits = [&](int64_t count, int64_t rows) {
    for (int64_t tile_rows = smaller<int64_t>(round_up(rows, rows_at_once), 16); tile_rows > 0; tile_rows -= rows_at_once)
      if (shared_bytes(length, per_unit, count, tile_rows) <= device.shared_bytes) {
        units = count, block_rows = rows, tile = tile_rows;
        return true;
      }
    return false;
  };
  auto fill = [&](int chosen) {
    *plan = fastseq_cuda_plan{};
    plan->mode = chosen;
    plan->units_per_block = (int32_t)units;
    plan->rows_per_block = (int32_t)block_rows;
    plan->tile_rows = (int32_t)tile;
    plan->grid[0] = (int32_t)divide_up(H, units);
    plan->grid[1] = (int32_t)divide_up(B, block_rows);
    plan->grid[2] = (int32_t)D;
    plan->shared_bytes = chosen == FASTSEQ_CUDA_DIRECT ? 0 : (int32_t)shared_bytes(length, per_unit, units, tile);
    bool shares_rows = chosen == FASTSEQ_CUDA_PERSISTENT && plan->grid[0] > 1;
    plan->barriers = shares_rows ? words_per_barrier * plan->grid[1] * plan->grid[2] : 0;
    return 0;
  };
  if (mode == FASTSEQ_CUDA_AUTO || mode == FASTSEQ_CUDA_PERSISTENT) {
    // All weights in one multiprocessor, sequences over the others: nobody waits. Else units over all of them.
    int64_t per_direction = larger<int64_t>(1, device.multiprocessors / D);
    if (fits(H, divide_up(B, per_direction))) return fill(FASTSEQ_CUDA_PERSISTENT);
    if (device.multiprocessors >= D && fits(divide_up(H, per_direction), B)) {
      int resident = 0;
      int64_t bytes = shared_bytes(length, per_unit, units, tile), blocks = divide_up(H, units) * D;
      if (bytes > 48 << 10) {
        cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
        if (status != cudaSuccess)
          return report(status, "%s(%s): preparation: %s", text.name, text.shape, cudaGetErrorString(status));
      }
      cudaError_t status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, rnn_threads, (size_t)bytes);
      if (status != cudaSuccess)
        return report(status, "%s(%s): occupancy: %s", text.name, text.shape, cudaGetErrorString(status));
      if ((int64_t)resident * device.multiprocessors >= blocks) return fill(FASTSEQ_CUDA_PERSISTENT);
    }
    if (mode == FASTSEQ_CUDA_PERSISTENT)
      return report(cudaErrorInvalidValue, "%s(%s): the recurrent weights do not fit %d multiprocessors with %d bytes each",
                    text.name, text.shape, device.multiprocessors, device.shared_bytes);
  }
  if (mode != FASTSEQ_CUDA_DIRECT)
    for (int64_t count = 8; count > 0; count /= 2)
      if (fits(smaller(count, H), smaller<int64_t>(B, 64))) return fill(FASTSEQ_CUDA_STEPWISE);
  if (mode == FASTSEQ_CUDA_STEPWISE)
    return report(cudaErrorInvalidValue, "%s(%s): the weights of one unit do not fit %d bytes of shared memory", text.name,
                  text.shape, device.shared_bytes);
  units = smaller<int64_t>(8, H), block_rows = tile = rows_at_once;
  return fill(FASTSEQ_CUDA_DIRECT);
}

int plan(int cell, bool backward, int mode, const fastseq_cuda_rnn_shape& shape, fastseq_cuda_plan* plan) {
  return with_cell(cell, [&](auto kind, const char* name) {
    using Cell = decltype(kind);
    constexpr int J = Cell::hidden_count;
    if (backward)
      return make_plan(rnn_backward_kernel<Cell, S>, Text("rnn_backward", name, shape), mode, shape, J * shape.hidden_size, 1,
                       plan);
    return make_plan(rnn_forward_kernel<Cell, S>, Text("rnn_forward", name, shape), mode, shape, shape.hidden_size, J, plan);
  });
}

template <class Call>
int run(void (*kernel)(Call, fastseq_cuda_plan, int64_t, int64_t, uint32_t*), const Text& text, const Call& call,
        const fastseq_cuda_plan& plan, uint32_t* barriers, cudaStream_t stream) {
  Grid grid{plan.grid[0], plan.grid[1], plan.grid[2]};
  bool persistent = plan.mode == FASTSEQ_CUDA_PERSISTENT;
  int64_t steps = call.shape.steps, stride = persistent ? larger<int64_t>(steps, 1) : 1;
  for (int64_t first = 0; first < steps; first += stride) {
    int status = launch(text.name, text.shape, kernel, grid, rnn_threads, plan.shared_bytes, plan.barriers > 0, stream, call,
                        plan, first, first + stride, barriers);
    if (status) return status;
  }
  return 0;
}

int forward(int cell, const fastseq_cuda_rnn_forward& call, const fastseq_cuda_plan& plan, uint32_t* barriers,
            cudaStream_t stream) {
  return with_cell(cell, [&](auto kind, const char* name) {
    return run(rnn_forward_kernel<decltype(kind), S>, Text("rnn_forward", name, call.shape), call, plan, barriers, stream);
  });
}

int backward(int cell, const fastseq_cuda_rnn_backward& call, const fastseq_cuda_plan& plan, uint32_t* barriers,
             cudaStream_t stream) {
  return with_cell(cell, [&](auto kind, const char* name) {
    return run(rnn_backward_kernel<decltype(kind), S>, Text("rnn_backward", name, call.shape), call, plan, barriers, stream);
  });
}

}  // namespace

const RnnTable FS_JOIN(rnn_, FS_STORAGE_NAME) = {plan, forward, backward};

}  // namespace fastseq::cuda
