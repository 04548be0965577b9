// What users' cells may compute beyond Math (math.h): the rest of fastseq/cells/vocabulary.py. At ties, kinks and NaN they are
// torch's functions.
#pragma once

#include "math.h"

namespace fastseq::FS_ISA {
namespace {

template <class T>
struct LogarithmConstants;
template <>
struct LogarithmConstants<float> {
  static constexpr int log_terms = 5, softplus_terms = 7;
  // ln 2 in two parts, the first of few digits, so that a whole number times it is exact.
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float smallest = 0x1p-126f;
};
template <>
struct LogarithmConstants<double> {
  static constexpr int log_terms = 10, softplus_terms = 16;
  static constexpr double ln2_high = 6.93147180369123816490e-1, ln2_low = 1.90821492927058770002e-10;
  static constexpr double smallest = 0x1p-1022;
};

template <class Math>
struct CellMath;

template <class T>
struct CellMath<Math<T>> {
  using Value = Vec<T>;
  using Integer = IntVec<T>;
  using C = LogarithmConstants<T>;

  static FS_INLINE Value absolute(Value x) { return (Value)((Integer)x & ~(Integer)broadcast<T>(T(-0.0))); }

  static FS_INLINE Value maximum(Value a, Value b) {
    Value larger = b < a ? a : b;
    return a != a ? a : larger;
  }
  static FS_INLINE Value minimum(Value a, Value b) {
    Value smaller = a < b ? a : b;
    return a != a ? a : smaller;
  }

  static FS_INLINE Value sqrt(Value x) {
    for (int i = 0; i < lanes<T>; ++i) x[i] = sizeof(T) == 4 ? (T)__builtin_sqrtf((float)x[i]) : (T)__builtin_sqrt(x[i]);
    return x;
  }

  // 2 atanh(s) = 2s (1 + s^2/3 + s^4/5 + ...).
  template <int terms>
  static FS_INLINE Value twice_atanh(Value s) {
    Value square = s * s, series = broadcast<T>(T(1.0 / (2 * terms + 1)));
#pragma GCC unroll 16
    for (int i = terms - 2; i >= 0; --i) series = fused_multiply_add(series, square, broadcast<T>(T(1.0 / (2 * i + 3))));
    Value twice = s + s;
    return fused_multiply_add(twice * square, series, twice);
  }

  // n ln 2 + 2 atanh((m - 1) / (m + 1)), x = 2^n m with m between sqrt(1/2) and sqrt(2). Denormal numbers count as zero.
  static FS_INLINE Value log(Value x) {
    constexpr int mantissa_bits = ExpConstants<T>::mantissa_bits;
    Value one = broadcast<T>(1);
    Integer bits = (Integer)x;
    // The exponent after moving the mantissa's wrap-around from 1 down to sqrt(1/2).
    Integer exponent = (bits - (Integer)broadcast<T>(T(0.7071067811865476))) >> mantissa_bits;
    Value m = (Value)(bits - (exponent << mantissa_bits)), n;
    for (int i = 0; i < lanes<T>; ++i) n[i] = (T)exponent[i];
    Value logarithm = twice_atanh<C::log_terms>((m - one) / (m + one));
    Value result = fused_multiply_add(n, broadcast<T>(C::ln2_low), logarithm);
    result = fused_multiply_add(n, broadcast<T>(C::ln2_high), result);
    result = x < broadcast<T>(T(__builtin_inf())) ? result : x;  // Inf and NaN stay
    result = x < broadcast<T>(C::smallest) ? broadcast<T>(T(-__builtin_inf())) : result;
    return x < broadcast<T>(0) ? broadcast<T>(T(__builtin_nan(""))) : result;
  }

  // log(1 + exp(x)) = max(x, 0) + log1p(u) with u = exp(-|x|), and log1p(u) = 2 atanh(u / (2 + u)), whose argument is at most 1/3.
  static FS_INLINE Value softplus(Value x) {
    Value u = Math<T>::exp_minus_magnitude(x);
    return Math<T>::relu(x) + twice_atanh<C::softplus_terms>(u / (u + broadcast<T>(2)));
  }
};

}  // namespace
}  // namespace fastseq::FS_ISA
