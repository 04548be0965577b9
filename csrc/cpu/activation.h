// The activations of a linear layer: values and derivatives.
//
// gelu(x) = x Phi(x). With t = |x|, the tail Q(t) = 1 - Phi(t) is exp(-t^2 / 2) R(t), and R(t) = S(q) / (t + 4) for
// q = (t - 4) / (t + 4), S a polynomial interpolated at Chebyshev nodes (relative error of R: 1.3e-8 in fp32, 4e-18 in fp64).
// Taking the tail first keeps negative x exact to the last digits, where 1 + erf(x) cancels. The rounding error of t^2 would
// be magnified by the exponential, so it is put back (one more multiply-add).
#pragma once

#include "../fastseq.h"
#include "math.h"

namespace fastseq::FS_ISA {
namespace {

template <class T>
struct NormalTailConstants;
template <>
struct NormalTailConstants<float> {
  static constexpr int degree = 9;
  // From here on the exponent's field of exp(-t^2 / 2) is that of zero. t Q(t) is no normal number a little earlier.
  static constexpr float farthest = 13.25f;
  static constexpr float s[] = {0.75528513851037054915f,    -0.60789660607380915129f,  0.38713667979470662525f,
                                -0.18652300589738765002f,   0.060406469748303641168f,  -0.0075272129116798546121f,
                                -0.0035235740563519058035f, 0.0015693136450922463476f, 0.00019480185114246544231f,
                                -0.00012298315700526608201f};
};
template <>
struct NormalTailConstants<double> {
  static constexpr int degree = 23;
  static constexpr double farthest = 37.66;
  static constexpr double s[] = {
      0.755285130415751493228592,       -0.607896641971892108307564,      0.387137400742214553487811,
      -0.186521857959657157364294,      0.0603965748909359632586843,      -0.00754018896673002695632745,
      -0.00347969236738303537209689,    0.00163081845764180205626964,     0.000133344312322563538547706,
      -0.000231094935642826922945405,   -0.00000190825813990124395491567, 0.0000351446885540592168367764,
      0.000000716665992531441726566004, -0.0000059201814537800671520483,  -0.000000629698802811453928162304,
      0.0000010215702576925550404099,   0.000000271814210230698867475509, -0.000000154983673383584936359667,
      -8.5425500494554694143632e-8,     1.32910841878879816365161e-8,     1.96343411045979349619102e-8,
      1.91810460291164154426981e-9,     -2.52719129724418558653835e-9,    -7.27842162373484311216839e-10};
};

// exp(-t^2 / 2) and the ratio R(t) of the tail to it, for t = |x| as far as t times the tail is a normal number: Inf times no
// tail would be NaN.
template <class T>
struct NormalDistribution {
  Vec<T> t;
  ReducedExp<T> exponential;
  Vec<T> ratio;
};

template <class T>
FS_INLINE NormalDistribution<T> normal_distribution(Vec<T> x) {
  using C = NormalTailConstants<T>;
  Vec<T> farthest = broadcast<T>(C::farthest), one = broadcast<T>(1), four = broadcast<T>(4);
  Vec<T> t = (Vec<T>)((IntVec<T>)x & ~(IntVec<T>)broadcast<T>(T(-0.0)));
  t = at_most(t, farthest);  // a NaN stays
  Vec<T> square = t * t;
  Vec<T> square_error = product_error<T>(t, t, square);
  Vec<T> half = broadcast<T>(T(-0.5));
  ReducedExp<T> exponential = reduce_exp<T>(square * half, square_error * half);

  // 1 / (t + 4) = inverse (1 + residual), with the rounding error of the sum as well: sum - 4 is exact, and so is what t lacks to it.
  Vec<T> sum = t + four, sum_error = t - (sum - four);
  Vec<T> inverse = one / sum;
  Vec<T> residual = fused_negate_multiply_add(sum_error, inverse, remainder_of_product<T>(one, sum, inverse));
  // q = 1 - 8 / (t + 4), and what its rounding takes from S: the slope times that, from the first terms.
  Vec<T> eight = broadcast<T>(8), eighth = eight * inverse;
  Vec<T> q = one - eighth;
  Vec<T> q_low = fused_negate_multiply_add(eighth, residual, (one - q) - eighth);
  auto coefficient = [](int i) FS_LAMBDA_INLINE { return broadcast<T>(C::s[i]); };
  Vec<T> slope = fused_multiply_add(coefficient(4) * four, q, coefficient(3) * broadcast<T>(3));
  slope = fused_multiply_add(slope, q, coefficient(2) + coefficient(2));
  slope = fused_multiply_add(slope, q, coefficient(1));
  // Four coefficients at a time: the whole epilogue of a tile waits for this chain, which one by one would be twice as long.
  static_assert(C::degree % 4 == 1 || C::degree % 4 == 3);
  Vec<T> q2 = q * q, q4 = q2 * q2;
  auto pair = [&](int i) FS_LAMBDA_INLINE { return fused_multiply_add(coefficient(i + 1), q, coefficient(i)); };
  Vec<T> s = C::degree % 4 == 1 ? coefficient(C::degree) : fused_multiply_add(coefficient(C::degree), q2, pair(C::degree - 2));
#pragma GCC unroll 8
  for (int i = (C::degree - 1) / 4 * 4 - 3; i >= 1; i -= 4)
    s = fused_multiply_add(s, q4, fused_multiply_add(pair(i + 2), q2, pair(i)));
  s = fused_multiply_add(s, q, fused_multiply_add(slope, q_low, coefficient(0)));
  inverse = fused_multiply_add(inverse, residual, inverse);
  return {t, exponential, s * inverse};
}

// sqrt(2 / pi) (x + 0.044715 x^3), doubled: gelu_tanh(x) = x (1 + tanh(u)) / 2 = x sigmoid(2u).
template <class T>
struct TanhArgument {
  static constexpr double linear = 1.5957691216057307117597842397375274738, cubic = 0.044715 * linear;
  static FS_INLINE Vec<T> value(Vec<T> x) { return x * fused_multiply_add(broadcast((T)cubic), x * x, broadcast((T)linear)); }
  static FS_INLINE Vec<T> derivative(Vec<T> x) {
    return fused_multiply_add(broadcast((T)(3 * cubic)), x * x, broadcast((T)linear));
  }
};

template <class T, int activation>
struct Activation {
  using V = Vec<T>;
  using M = Math<T>;

  static FS_INLINE V value(V x) {
    if constexpr (activation == FASTSEQ_RELU) return M::relu(x);
    if constexpr (activation == FASTSEQ_GELU) {
      // x Phi(x) = max(x, 0) - t Q(t)
      NormalDistribution<T> normal = normal_distribution<T>(x);
      V part = normal.t * normal.ratio;
      V tail = fused_multiply_add(part, normal.exponential.p, part) * normal.exponential.scale;  // a power of two
      return at_least(x, broadcast<T>(0)) - tail;
    }
    if constexpr (activation == FASTSEQ_GELU_TANH) return x * M::sigmoid(TanhArgument<T>::value(x));
    if constexpr (activation == FASTSEQ_SILU) return x * M::sigmoid(x);
    return x;
  }

  // d value / dx, times a gradient.
  static FS_INLINE V gradient(V x, V grad) {
    V one = broadcast<T>(1);
    if constexpr (activation == FASTSEQ_RELU) return M::relu_gradient(x, grad);
    if constexpr (activation == FASTSEQ_GELU) {
      NormalDistribution<T> normal = normal_distribution<T>(x);
      V exponential = fused_multiply_add(normal.exponential.scale, normal.exponential.p, normal.exponential.scale);
      V tail = exponential * normal.ratio, cumulative = x < broadcast<T>(0) ? tail : one - tail;
      V density = exponential * broadcast((T)0.39894228040143267793994605993438187);  // 1 / sqrt(2 pi)
      V signed_t = (V)((IntVec<T>)normal.t | ((IntVec<T>)x & (IntVec<T>)broadcast<T>(T(-0.0))));
      return grad * fused_multiply_add(signed_t, density, cumulative);
    }
    if constexpr (activation == FASTSEQ_GELU_TANH) {
      auto s = M::sigmoid_and_rest(TanhArgument<T>::value(x));
      return grad * (s.value * fused_multiply_add(x * s.rest, TanhArgument<T>::derivative(x), one));
    }
    if constexpr (activation == FASTSEQ_SILU) {
      auto s = M::sigmoid_and_rest(x);
      return grad * (s.value * fused_multiply_add(x, s.rest, one));
    }
    return grad;
  }
};

template <class T, int Function>
void unary(const void* input, void* output, int64_t count) {
  const T* source = (const T*)input;  // [count]
  T* target = (T*)output;             // [count]
  for (int64_t i = 0; i < count; i += lanes<T>) {
    Vec<T> x = load_partial(source + i, count - i);
    if constexpr (Function == FASTSEQ_EXP) x = Math<T>::exp(x);
    if constexpr (Function == FASTSEQ_TANH) x = Math<T>::tanh(x);
    if constexpr (Function == FASTSEQ_SIGMOID) x = Math<T>::sigmoid(x);
    if constexpr (Function == FASTSEQ_UNARY_GELU) x = Activation<T, FASTSEQ_GELU>::value(x);
    if constexpr (Function == FASTSEQ_UNARY_GELU_TANH) x = Activation<T, FASTSEQ_GELU_TANH>::value(x);
    if constexpr (Function == FASTSEQ_UNARY_SILU) x = Activation<T, FASTSEQ_SILU>::value(x);
    store_partial(target + i, x, count - i);
  }
}

}  // namespace
}  // namespace fastseq::FS_ISA
