// exp, tanh, sigmoid. All three stand on exp(x) = 2^n (1 + p): n = round(x / ln 2), r = x - n ln 2, |r| <= ln2 / 2, and
// p = expm1(r) = r + r^2 q(r), q the polynomial that interpolates at Chebyshev nodes (relative error of p: 6e-10 in fp32,
// 8e-21 in fp64, both below half an ULP). Keeping p apart from the 1 is what lets tanh stay accurate near 0.
// Results below the smallest normal number are flushed to zero, as the workers run with denormals off. NaN passes through:
// every clamp is written so that a false comparison keeps x.
#pragma once

#include "vec.h"

namespace fastseq::FS_ISA {
namespace {

template <class T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr int degree = 5, mantissa_bits = 23, exponent_bias = 127;
  static constexpr float q[] = {0.5000000014276589f,    0.16666666682523657f,   0.041666456904062641f,
                                0.0083333100347067069f, 0.0013934531655088020f, 0.00019891969905683137f};
  // ln 2 in two parts, the first short enough that n * ln2_high is exact.
  static constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
  static constexpr float inverse_ln2 = 1.44269504088896341f;
  static constexpr float round_magic = 0x1.8p23f;
  static constexpr float overflow = 88.722839f;     // exp rounds to Inf above
  static constexpr float underflow = -87.3365402f;  // exp falls below the smallest normal number under it
};
template <>
struct ExpConstants<double> {
  static constexpr int degree = 11, mantissa_bits = 52, exponent_bias = 1023;
  static constexpr double q[] = {0.5,
                                 0.16666666666666666667,
                                 0.04166666666666667780798,
                                 0.008333333333333334075955,
                                 0.001388888888887827849893,
                                 0.0001984126984126276891421,
                                 0.0000248015873385404143966,
                                 0.000002755731924861720845224,
                                 2.75572610555081036412e-7,
                                 2.505206961223467670407e-8,
                                 2.091895234599852527658e-9,
                                 1.608717090794062639622e-10};
  static constexpr double ln2_high = 0x1.62e42fefa3800p-1, ln2_low = 0x1.ef35793c76730p-45;
  static constexpr double inverse_ln2 = 1.44269504088896340735992468100189214;
  static constexpr double round_magic = 0x1.8p52;
  static constexpr double overflow = 709.782712893384;
  static constexpr double underflow = -708.39641853226408;
};

// 2^r - 1 = r (c0 + c1 r + ...) for |r| <= 1/2, interpolated at Chebyshev nodes (relative error of 2^r: 5e-9 in fp32, 1e-19 in
// fp64).
template <class T>
struct Exp2Constants;
template <>
struct Exp2Constants<float> {
  static constexpr int degree = 5;
  static constexpr float c[] = {0.6931471880262287810581f,   0.2402265076056812694459f,   0.05550357114219077818607f,
                                0.009618082557277851491269f, 0.001339086336467123438118f, 0.00015453162945120690177f};
};
template <>
struct Exp2Constants<double> {
  static constexpr int degree = 11;
  static constexpr double c[] = {0.6931471805599453092537,     0.2402265069591007123255,     0.05550410866482162703949,
                                 0.009618129107628479492751,   0.001333355814640647069706,   0.0001540353039337073341113,
                                 0.00001525273384155677258925, 0.00000132154868087055627901, 1.017805708773394110462e-7,
                                 7.054897304155499277399e-9,   4.45581790833606449298e-10,   2.57293241773623042139e-11};
};

// exp(x) or exp(x + low), low a rounding error of x, is scale * (1 + p); x must lie in [underflow, overflow] or be NaN.
template <class T>
struct ReducedExp {
  Vec<T> scale, p;
};

template <class T, class... Low>
FS_INLINE ReducedExp<T> reduce_exp(Vec<T> x, Low... low) {
  using C = ExpConstants<T>;
  Vec<T> shifted = fused_multiply_add(x, broadcast<T>(C::inverse_ln2), broadcast<T>(C::round_magic));
  Vec<T> n = shifted - broadcast<T>(C::round_magic);
  Vec<T> r = fused_negate_multiply_add(n, broadcast<T>(C::ln2_high), x);
  r = (fused_negate_multiply_add(n, broadcast<T>(C::ln2_low), r) + ... + low);
  // In pairs of coefficients: half as long a chain as one by one, and a cell update waits for chains.
  static_assert(C::degree % 2 == 1);
  auto pair = [r](int i) { return fused_multiply_add(broadcast<T>(C::q[i + 1]), r, broadcast<T>(C::q[i])); };
  Vec<T> square = r * r, q = pair(C::degree - 1);
#pragma GCC unroll 8
  for (int i = C::degree - 3; i >= 0; i -= 2) q = fused_multiply_add(q, square, pair(i));
  Vec<T> p = fused_multiply_add(square, q, r);
  // The low mantissa bits of `shifted` hold n; moved up into the exponent they make 2^n.
  IntVec<T> exponent = (IntVec<T>)shifted << C::mantissa_bits;
  IntVec<T> one = (IntVec<T>)broadcast<T>(1);
  return {(Vec<T>)(exponent + one), p};
}

template <class T>
struct Math {
  using Value = Vec<T>;
  using C = ExpConstants<T>;

  static FS_INLINE Value constant(T value) { return broadcast<T>(value); }
  static FS_INLINE Value fused_multiply_add(Value a, Value b, Value c) { return FS_ISA::fused_multiply_add(a, b, c); }
  static FS_INLINE Value fused_negate_multiply_add(Value a, Value b, Value c) {
    return FS_ISA::fused_negate_multiply_add(a, b, c);
  }
  static FS_INLINE Value minus_magnitude(Value x) { return (Value)((IntVec<T>)x | (IntVec<T>)broadcast<T>(T(-0.0))); }

  static FS_INLINE Value exp(Value x) {
    Value overflow = broadcast<T>(C::overflow), underflow = broadcast<T>(C::underflow);
    Value clamped = x > overflow ? overflow : x;
    clamped = clamped < underflow ? underflow : clamped;
    ReducedExp<T> reduced = reduce_exp<T>(clamped);
    // 2^128 itself is no float: above zero take half of the scale and double at the end.
    auto positive = x > broadcast<T>(0);
    IntVec<T> half_step = (IntVec<T>)positive & (IntVec<T>{} + 1) << C::mantissa_bits;
    Value scale = (Value)((IntVec<T>)reduced.scale - half_step);
    Value result = FS_ISA::fused_multiply_add(scale, reduced.p, scale) * (positive ? broadcast<T>(2) : broadcast<T>(1));
    result = x > overflow ? broadcast<T>(T(__builtin_inff())) : result;
    return x < underflow ? broadcast<T>(0) : result;
  }

  // 2^x for x <= 0 (a softmax subtracts the maximum first); 0 where the result would not be normal.
  static FS_INLINE Value exp2_nonpositive(Value x) {
    using E = Exp2Constants<T>;
    Value floor = broadcast<T>(T(-C::exponent_bias));
    x = at_least(x, floor);
    Value shifted = x + broadcast<T>(C::round_magic);
    Value r = x - (shifted - broadcast<T>(C::round_magic));
    Value p = broadcast<T>(E::c[E::degree]);
    for (int i = E::degree - 1; i >= 0; --i) p = FS_ISA::fused_multiply_add(p, r, broadcast<T>(E::c[i]));
    // The bias moves the integer in the low mantissa bits into an exponent field; -127 makes it the field of zero.
    Value scale = (Value)(((IntVec<T>)shifted + (IntVec<T>{} + C::exponent_bias)) << C::mantissa_bits);
    return FS_ISA::fused_multiply_add(scale * r, p, scale);
  }

  // sigmoid(x) and what it lacks to 1, either to the last digits: the subtraction would cancel.
  struct Sigmoid {
    Value value, rest;
  };
  static FS_INLINE Sigmoid sigmoid_and_rest(Value x) {
    Value e = exp_minus_magnitude(x), one = broadcast<T>(1), large = one / (one + e), small = e * large;
    auto negative = x < broadcast<T>(0);
    return {negative ? small : large, negative ? large : small};
  }

  // 1 / (1 + exp(-x)) from exp(-|x|), which never overflows and keeps the small side exact to the last digits.
  static FS_INLINE Value sigmoid(Value x) {
    Value e = exp_minus_magnitude(x), one = broadcast<T>(1);
    return (x < broadcast<T>(0) ? e : one) / (one + e);
  }

  static FS_INLINE Value exp_minus_magnitude(Value x) {
    Value negative = minus_magnitude(x);
    Value underflow = broadcast<T>(C::underflow);
    ReducedExp<T> reduced = reduce_exp<T>(at_least(negative, underflow));
    Value e = FS_ISA::fused_multiply_add(reduced.scale, reduced.p, reduced.scale);
    return negative < underflow ? broadcast<T>(0) : e;
  }

  // -expm1(-2|x|) / (2 + expm1(-2|x|)), with the sign of x put back.
  static FS_INLINE Value tanh(Value x) {
    // tanh rounds to 1 long before this; the clamp keeps 2^n normal.
    ReducedExp<T> reduced = reduce_exp<T>(at_least(minus_magnitude(x + x), broadcast<T>(-64)));
    Value one = broadcast<T>(1);
    Value expm1 = FS_ISA::fused_multiply_add(reduced.scale, reduced.p, reduced.scale - one);
    Value magnitude = expm1 / (expm1 + broadcast<T>(2));
    IntVec<T> sign = (IntVec<T>)broadcast<T>(T(-0.0));
    return (Value)(((IntVec<T>)magnitude & ~sign) | ((IntVec<T>)x & sign));
  }

  // As in torch, NaN stays NaN in the value and lets the gradient pass.
  static FS_INLINE Value relu(Value x) { return x < broadcast<T>(0) ? broadcast<T>(0) : x; }
  static FS_INLINE Value relu_gradient(Value result, Value gradient) {
    return result <= broadcast<T>(0) ? broadcast<T>(0) : gradient;
  }
};

}  // namespace
}  // namespace fastseq::FS_ISA
