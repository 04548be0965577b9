// float16 of CUDA's header of this name, as far as csrc/cuda uses it: storage, and conversion with rounding to nearest even.
#pragma once

#include <math.h>
#include <stdint.h>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half value) {
  int exponent = value.bits >> 10 & 31, mantissa = value.bits & 1023;
  float magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                    : exponent == 0 ? ldexpf((float)mantissa, -24)
                                    : ldexpf((float)(mantissa + 1024), exponent - 25);
  return value.bits & 0x8000 ? -magnitude : magnitude;
}

inline __half __float2half(float value) {
  uint16_t sign = signbit(value) ? 0x8000 : 0;
  float magnitude = fabsf(value);
  if (value != value) return {0x7fff};
  if (magnitude >= 65520.0f) return {(uint16_t)(sign | 0x7c00)};
  int exponent = magnitude < 0x1p-14f ? -14 : ilogbf(magnitude);
  // A unit of the result is 2^(exponent - 10); rintf rounds halves to even.
  uint32_t units = (uint32_t)rintf(ldexpf(magnitude, 10 - exponent));
  return {(uint16_t)(sign | (units + ((uint32_t)(exponent + 14) << 10)))};
}
