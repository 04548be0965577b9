// What the library exports: each call goes to the table of its storage type.
#include "launch.h"
#include "rnn_shape.cuh"

#ifndef FASTSEQ_CUDA_ARCHITECTURES
#define FASTSEQ_CUDA_ARCHITECTURES "unknown"
#endif

namespace fastseq::cuda {

static thread_local char error_text[512] = "";

int report(int status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(error_text, sizeof error_text, format, arguments);
  va_end(arguments);
  return status;
}

Device::Device() {
  int device = 0;
  cudaError_t result = cudaGetDevice(&device);
  if (result == cudaSuccess) result = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (result == cudaSuccess) result = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (result != cudaSuccess) status = report(result, "attributes of the device: %s", cudaGetErrorString(result));
}

namespace {

const RnnTable* const rnn_tables[] = {&rnn_float32, &rnn_float64, &rnn_bfloat16, &rnn_float16};
const AttentionTable* const attention_tables[] = {&attention_float32, &attention_float64, &attention_bfloat16,
                                                  &attention_float16};

bool known(int dtype) { return dtype >= 0 && dtype < FASTSEQ_CUDA_DTYPE_COUNT; }
int unknown(int dtype) {
  return report(cudaErrorInvalidValue, "dtype must be 0 to %d, got %d", FASTSEQ_CUDA_DTYPE_COUNT - 1, dtype);
}

template <class Cell>
int hidden_column(int gate) {
  for (int i = 0; i < Cell::hidden_count; ++i)
    if (Cell::gate_of_hidden(i) == gate) return place_of_slot<Cell>(Cell::hidden_first + i);
  return -1;
}

}  // namespace
}  // namespace fastseq::cuda

using namespace fastseq::cuda;

#define FS_EXPORT extern "C" __attribute__((visibility("default")))

FS_EXPORT const char* fastseq_cuda_error(void) { return error_text; }

FS_EXPORT const char* fastseq_cuda_architectures(void) { return FASTSEQ_CUDA_ARCHITECTURES; }

FS_EXPORT int fastseq_cuda_device_count(int32_t* count) {
  int found = 0;
  cudaError_t status = cudaGetDeviceCount(&found);
  *count = found;
  return status == cudaSuccess ? 0 : report(status, "%s", cudaGetErrorString(status));
}

FS_EXPORT int fastseq_cuda_use_device(int32_t device) {
  cudaError_t status = cudaSetDevice(device);
  return status == cudaSuccess ? 0 : report(status, "device %d: %s", (int)device, cudaGetErrorString(status));
}

FS_EXPORT int64_t fastseq_cuda_struct_bytes(int32_t index) {
  constexpr int64_t bytes[] = {sizeof(fastseq_cuda_rnn_forward), sizeof(fastseq_cuda_rnn_backward), sizeof(fastseq_cuda_plan),
                               sizeof(fastseq_attention_forward), sizeof(fastseq_attention_backward)};
  return index >= 0 && index < (int)(sizeof bytes / sizeof *bytes) ? bytes[index] : -1;
}

FS_EXPORT int32_t fastseq_cuda_hidden_column(int32_t cell, int32_t gate) {
#define FASTSEQ_CELL(name, Struct) \
  if (cell == FASTSEQ_CELL_##name) return hidden_column<fastseq::cuda::Struct>(gate);
#include "../cells/cells.def"
#undef FASTSEQ_CELL
  return -1;
}

FS_EXPORT int32_t fastseq_cuda_slot_count(int32_t cell) {
#define FASTSEQ_CELL(name, Struct) \
  if (cell == FASTSEQ_CELL_##name) return fastseq::cuda::Struct::slots;
#include "../cells/cells.def"
#undef FASTSEQ_CELL
  return -1;
}

FS_EXPORT int fastseq_cuda_rnn_plan(int32_t cell, int32_t dtype, int32_t backward, int32_t mode,
                                    const fastseq_cuda_rnn_shape* shape, fastseq_cuda_plan* plan) {
  return known(dtype) ? rnn_tables[dtype]->plan(cell, backward != 0, mode, *shape, plan) : unknown(dtype);
}

FS_EXPORT int fastseq_cuda_run_rnn_forward(int32_t cell, int32_t dtype, const fastseq_cuda_rnn_forward* call,
                                           const fastseq_cuda_plan* plan, uint32_t* barriers, void* stream) {
  return known(dtype) ? rnn_tables[dtype]->forward(cell, *call, *plan, barriers, (cudaStream_t)stream) : unknown(dtype);
}

FS_EXPORT int fastseq_cuda_run_rnn_backward(int32_t cell, int32_t dtype, const fastseq_cuda_rnn_backward* call,
                                            const fastseq_cuda_plan* plan, uint32_t* barriers, void* stream) {
  return known(dtype) ? rnn_tables[dtype]->backward(cell, *call, *plan, barriers, (cudaStream_t)stream) : unknown(dtype);
}

FS_EXPORT int fastseq_cuda_run_attention_forward(int32_t dtype, const fastseq_attention_forward* call, void* stream) {
  return known(dtype) ? attention_tables[dtype]->forward(*call, (cudaStream_t)stream) : unknown(dtype);
}

FS_EXPORT int fastseq_cuda_run_attention_backward(int32_t dtype, const fastseq_attention_backward* call,
                                                  const fastseq_rows* delta, void* stream) {
  return known(dtype) ? attention_tables[dtype]->backward(*call, *delta, (cudaStream_t)stream) : unknown(dtype);
}
