// Kernels with faults that the emulator must not let pass; tests/test_cuda_emulation.py runs them.
#include <cuda_runtime.h>

namespace {

struct Values {
  float value[64];
};

// Every thread reads its neighbour's value; `waits` 0 leaves the barrier out.
void read_neighbour(float* result /* [64] */, int waits) {
  FS_SHARED(Values, shared);
  shared.value[threadIdx.x] = (float)threadIdx.x;
  if (waits) __syncthreads();
  result[threadIdx.x] = shared.value[(threadIdx.x + 1) % 64];
}

// Half of the threads leave a barrier out.
void leave_out_barrier(float*, int) {
  if (threadIdx.x < 32) __syncthreads();
}

// A flag that nobody sets.
void wait_for_ever(float* result, int) {
  while (*(volatile float*)result == 0) __nanosleep(20);
}

int launch(void (*kernel)(float*, int), float* result, int argument, unsigned threads) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1);
  config.blockDim = dim3(threads);
  return cudaLaunchKernelEx(&config, kernel, result, argument);
}

}  // namespace

#define FS_EXPORT extern "C" __attribute__((visibility("default")))

FS_EXPORT int run_read_neighbour(float* result, int waits) { return launch(read_neighbour, result, waits, 64); }
FS_EXPORT int run_leave_out_barrier() { return launch(leave_out_barrier, nullptr, 0, 64); }
FS_EXPORT int run_wait_for_ever() {
  float flag = 0;
  return launch(wait_for_ever, &flag, 0, 1);
}
FS_EXPORT int run_too_many_threads() { return launch(leave_out_barrier, nullptr, 0, 2048); }
FS_EXPORT const char* last_failure() { return fastseq_emulation::failure(); }
