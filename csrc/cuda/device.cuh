// What every kernel stands on: storage and sum types, lanes and warps, the functions the cells ask for.
//
// Everything goes through names of CUDA's own headers, so that a host compiler takes the same source with stand-ins for them
// (tests/cuda_emulation). Shared memory is declared with the two macros below for that reason.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "../fastseq_cuda.h"

#ifndef FS_SHARED
#define FS_SHARED(Type, name) __shared__ Type name
#define FS_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

#define FS_ISA cuda
#define FS_INLINE __device__ __forceinline__
#define FASTSEQ_PHILOX_FUNCTION __host__ __device__ __forceinline__

#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"

namespace fastseq::cuda {
namespace {

constexpr int warp_lanes = 32;
constexpr unsigned all_lanes = 0xffffffffu;

// S is what lies in memory, Sum<S> what is added up.
template <class S>
struct SumType {
  using Type = float;
};
template <>
struct SumType<double> {
  using Type = double;
};
template <class S>
using Sum = typename SumType<S>::Type;

FS_INLINE float widen(float value) { return value; }
FS_INLINE double widen(double value) { return value; }
FS_INLINE float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
FS_INLINE float widen(__half value) { return __half2float(value); }

template <class S>
struct Narrow {
  static FS_INLINE S from(S value) { return value; }
};
template <>
struct Narrow<__nv_bfloat16> {
  static FS_INLINE __nv_bfloat16 from(float value) { return __float2bfloat16(value); }
};
template <>
struct Narrow<__half> {
  static FS_INLINE __half from(float value) { return __float2half(value); }
};
template <class S>
FS_INLINE S narrow(Sum<S> value) {
  return Narrow<S>::from(value);
}

template <class S>
FS_INLINE Sum<S> zero_without(const void* data, int64_t index) {
  return data ? widen(((const S*)data)[index]) : Sum<S>(0);
}

__host__ __device__ constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
__host__ __device__ constexpr int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }
template <class N>
__host__ __device__ constexpr N smaller(N a, N b) {
  return b < a ? b : a;
}
template <class N>
__host__ __device__ constexpr N larger(N a, N b) {
  return a < b ? b : a;
}

// Past the first-level cache, which does not see what other multiprocessors wrote during the same launch.
FS_INLINE float load_fresh(const float* address) { return __ldcg(address); }
FS_INLINE double load_fresh(const double* address) { return __ldcg(address); }
template <class S>
FS_INLINE S load_fresh(const S* address) {
  static_assert(sizeof(S) == 2, "");
  unsigned short bits = __ldcg((const unsigned short*)address);
  S value;
  memcpy(&value, &bits, 2);
  return value;
}

template <class V>
FS_INLINE V sum_of_lanes(V value) {
#pragma unroll
  for (int mask = warp_lanes / 2; mask; mask /= 2) value += __shfl_xor_sync(all_lanes, value, mask);
  return value;
}

FS_INLINE float exponential(float x) { return expf(x); }
FS_INLINE double exponential(double x) { return exp(x); }
FS_INLINE float hyperbolic_tangent(float x) { return tanhf(x); }
FS_INLINE double hyperbolic_tangent(double x) { return tanh(x); }
FS_INLINE float logarithm(float x) { return logf(x); }
FS_INLINE double logarithm(double x) { return log(x); }
FS_INLINE float magnitude(float x) { return fabsf(x); }
FS_INLINE double magnitude(double x) { return fabs(x); }
FS_INLINE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
FS_INLINE double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// The function set that cells are templated on (csrc/cells/rnn.h), one value at a time.
template <class T>
struct Math {
  using Value = T;
  static FS_INLINE T constant(T value) { return value; }
  static FS_INLINE T fused_multiply_add(T a, T b, T c) { return multiply_add(a, b, c); }
  static FS_INLINE T fused_negate_multiply_add(T a, T b, T c) { return multiply_add(-a, b, c); }
  // From exp(-|x|), which never overflows and keeps the small side exact to the last digits.
  static FS_INLINE T sigmoid(T x) {
    T e = exponential(-magnitude(x));
    return (x < T(0) ? e : T(1)) / (T(1) + e);
  }
  static FS_INLINE T tanh(T x) { return hyperbolic_tangent(x); }
  // As in torch, NaN stays NaN in the value and lets the gradient pass.
  static FS_INLINE T relu(T x) { return x < T(0) ? T(0) : x; }
  static FS_INLINE T relu_gradient(T result, T gradient) { return result <= T(0) ? T(0) : gradient; }
};

}  // namespace
}  // namespace fastseq::cuda
