// A stand-in for CUDA's header with which the sources in csrc/cuda compile for the host, so that a test can run every kernel
// where there is no GPU: launches, threads, barriers and shared memory of one device, slowly and one thread at a time.
//
// It shows whether indices, formulas, barriers and the host code around the kernels are right. What it cannot show is in
// docs/cuda.md. Where CUDA would go on and be wrong it stops: a barrier that some threads of the block have left behind, a
// launch out of limits, threads that wait for each other for ever. Shared memory starts as NaN, and threads can be run in either
// order: kernels that lack a barrier then give other bits.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

#define FS_SHARED(Type, name) Type& name = *(Type*)fastseq_emulation::static_shared_memory(sizeof(Type))
#define FS_DYNAMIC_SHARED(name) unsigned char* name = fastseq_emulation::dynamic_shared_memory()

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Set anew whenever another thread is run.
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

// --- What threads say to each other

inline void __syncthreads() { fastseq_emulation::wait_for_block(); }
inline void __syncwarp(unsigned = 0xffffffffu) { fastseq_emulation::wait_for_warp(); }
inline void __threadfence() {}
inline void __nanosleep(unsigned) { fastseq_emulation::let_others_run(); }

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most eight bytes");
  return fastseq_emulation::shuffle(value, lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return fastseq_emulation::shuffle(value, fastseq_emulation::lane() ^ mask);
}

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  unsigned before = *address;
  *address += value;
  return before;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}

// --- The part of the runtime that csrc/cuda calls

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorLaunchFailure = 719
};
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
    default:
      return fastseq_emulation::failure();
  }
}

typedef struct CUstream_st* cudaStream_t;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative = 2 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const fastseq_emulation::Limits& limits = fastseq_emulation::limits;
  *value = attribute == cudaDevAttrMultiProcessorCount ? limits.multiprocessors : limits.shared_bytes;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int bytes) {
  return bytes <= fastseq_emulation::limits.shared_bytes ? cudaSuccess : cudaErrorInvalidValue;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t shared_bytes) {
  *blocks = (int64_t)shared_bytes <= fastseq_emulation::limits.shared_bytes ? 1 : 0;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  fastseq_emulation::Launch launch;
  launch.grid[0] = config->gridDim.x, launch.grid[1] = config->gridDim.y, launch.grid[2] = config->gridDim.z;
  launch.threads = (int)config->blockDim.x;
  launch.shared_bytes = config->dynamicSmemBytes;
  for (unsigned i = 0; i < config->numAttrs; ++i) launch.cooperative |= config->attrs[i].val.cooperative != 0;
  if (!config->gridDim.x || !config->gridDim.y || !config->gridDim.z || config->gridDim.y > 65535 ||
      config->gridDim.z > 65535 || !config->blockDim.x || config->blockDim.x > 1024 || config->blockDim.y != 1 ||
      config->blockDim.z != 1)
    return cudaErrorInvalidConfiguration;
  if ((int64_t)launch.shared_bytes > fastseq_emulation::limits.shared_bytes) return cudaErrorInvalidValue;
  if (launch.cooperative && launch.blocks() > fastseq_emulation::limits.multiprocessors)
    return cudaErrorCooperativeLaunchTooLarge;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  // Copied once, as a launch copies its arguments.
  std::tuple<Parameters...> copies(arguments...);
  launch.body = [&] { std::apply(kernel, copies); };
  launch.enter = [](int64_t block, int thread) {
    threadIdx = dim3((unsigned)thread, 0, 0);
    blockIdx = dim3((unsigned)(block % gridDim.x), (unsigned)(block / gridDim.x % gridDim.y),
                    (unsigned)(block / gridDim.x / gridDim.y));
  };
  return fastseq_emulation::run(launch) ? cudaSuccess : cudaErrorLaunchFailure;
}
