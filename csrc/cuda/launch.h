// Host side of a launch: errors in words, attributes of the device, and the tables of kernels that the objects export.
#pragma once

#include <cuda_runtime.h>
#include <stdarg.h>
#include <stdio.h>

#include "../fastseq_cuda.h"

namespace fastseq::cuda {

// Keeps the text for fastseq_cuda_error() and hands the code on.
__attribute__((format(printf, 2, 3))) int report(int status, const char* format, ...);

// The current device's count of multiprocessors and shared memory that a block may ask for.
struct Device {
  int multiprocessors = 0, shared_bytes = 0;
  int status = 0;
  Device();
};

struct Grid {
  int64_t x = 1, y = 1, z = 1;
};

// `name` is the kernel's with cell and type, `shape` the call's sizes: both go into the error's text.
template <class... Parameters, class... Arguments>
int launch(const char* name, const char* shape, void (*kernel)(Parameters...), Grid grid, int threads, int64_t shared_bytes,
           bool cooperative, cudaStream_t stream, Arguments... arguments) {
  auto failed = [&](cudaError_t status, const char* what) {
    return report((int)status, "%s(%s): %s of %lld x %lld x %lld blocks of %d threads with %lld bytes of shared memory: %s",
                  name, shape, what, (long long)grid.x, (long long)grid.y, (long long)grid.z, threads, (long long)shared_bytes,
                  cudaGetErrorString(status));
  };
  if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) return failed(cudaErrorInvalidConfiguration, "launch");
  if (shared_bytes > 48 << 10) {  // more has to be asked for
    cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes);
    if (status != cudaSuccess) return failed(status, "preparation");
  }
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3((unsigned)grid.x, (unsigned)grid.y, (unsigned)grid.z);
  config.blockDim = dim3((unsigned)threads);
  config.dynamicSmemBytes = (size_t)shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  cudaError_t status = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  return status == cudaSuccess ? 0 : failed(status, "launch");
}

struct RnnTable {
  int (*plan)(int cell, bool backward, int mode, const fastseq_cuda_rnn_shape&, fastseq_cuda_plan*);
  int (*forward)(int cell, const fastseq_cuda_rnn_forward&, const fastseq_cuda_plan&, uint32_t* barriers, cudaStream_t);
  int (*backward)(int cell, const fastseq_cuda_rnn_backward&, const fastseq_cuda_plan&, uint32_t* barriers, cudaStream_t);
};
struct AttentionTable {
  int (*forward)(const fastseq_attention_forward&, cudaStream_t);
  int (*backward)(const fastseq_attention_backward&, const fastseq_rows& delta, cudaStream_t);
};

extern const RnnTable rnn_float32, rnn_float64, rnn_bfloat16, rnn_float16;
extern const AttentionTable attention_float32, attention_float64, attention_bfloat16, attention_float16;

}  // namespace fastseq::cuda
