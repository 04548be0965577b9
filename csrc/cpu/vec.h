// Vectors of one register, by the compiler's vector extensions: + - * / and comparisons are operators, so one text serves
// SSE, AVX2, AVX-512 and NEON. Intrinsics only where no operator exists: the fused multiply-add. It is always explicit and
// contraction is off in this library, so that an expression has the same bits wherever it is inlined.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define FS_INLINE inline __attribute__((always_inline))
#define FS_NOINLINE __attribute__((noinline))
#define FS_LAMBDA_INLINE __attribute__((always_inline))

#if defined(__AVX512F__)
#define FS_VECTOR_BYTES 64
#define FS_TILE_ROWS 14
#elif defined(__AVX2__)
#define FS_VECTOR_BYTES 32
#define FS_TILE_ROWS 6
#elif defined(__aarch64__)
#define FS_VECTOR_BYTES 16
#define FS_TILE_ROWS 12
#else
#define FS_VECTOR_BYTES 16
#define FS_TILE_ROWS 6
#endif

#if defined(__AMX_BF16__) || defined(__AMXBF16__)  // Clang before 16 has the second name
#define FS_MATRIX_UNIT 1
#else
#define FS_MATRIX_UNIT 0
#endif

namespace fastseq::FS_ISA {
namespace {

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float Value __attribute__((vector_size(FS_VECTOR_BYTES)));
  typedef int32_t Integer __attribute__((vector_size(FS_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double Value __attribute__((vector_size(FS_VECTOR_BYTES)));
  typedef int64_t Integer __attribute__((vector_size(FS_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VectorOf<T>::Value;
template <class T>
using IntVec = typename VectorOf<T>::Integer;

template <class T>
inline constexpr int lanes = FS_VECTOR_BYTES / sizeof(T);

template <class T>
FS_INLINE Vec<T> load(const T* pointer) {
  Vec<T> value;
  memcpy(&value, pointer, sizeof(value));
  return value;
}
template <class T>
FS_INLINE void store(T* pointer, Vec<T> value) {
  memcpy(pointer, &value, sizeof(value));
}
template <class T>
FS_INLINE Vec<T> broadcast(T value) {
  return value - Vec<T>{};  // x - 0 keeps -0, Inf and NaN, and compiles to one broadcast
}

// The first `count` lanes; the others read as zero and are not written. 0 <= count <= lanes.
template <class T>
FS_INLINE Vec<T> load_partial(const T* pointer, int64_t count) {
  if (count >= lanes<T>) return load(pointer);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), pointer);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_maskz_loadu_pd((__mmask8)((1u << count) - 1), pointer);
#elif defined(__AVX2__)
  // A masked load costs what a load costs; store_partial does without its counterpart, which is slow on some processors.
  alignas(64) static constexpr int32_t masks[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  __m256i mask = _mm256_loadu_si256((const __m256i*)(masks + 8 - count * (int64_t)(sizeof(T) / 4)));
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_maskload_ps((const float*)pointer, mask);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm256_maskload_pd((const double*)pointer, mask);
#endif
  alignas(FS_VECTOR_BYTES) T buffer[lanes<T>] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = pointer[i];
  return load(buffer);
}
template <class T>
FS_INLINE void store_partial(T* pointer, Vec<T> value, int64_t count) {
  if (count >= lanes<T>) return store(pointer, value);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(pointer, (__mmask16)((1u << count) - 1), (__m512)value);
  if constexpr (sizeof(T) == 8) return _mm512_mask_storeu_pd(pointer, (__mmask8)((1u << count) - 1), (__m512d)value);
#endif
  alignas(FS_VECTOR_BYTES) T buffer[lanes<T>];
  store(buffer, value);
  for (int64_t i = 0; i < count; ++i) pointer[i] = buffer[i];
}

// a * b + c and c - a * b, rounded once where the instruction set has it.
FS_INLINE Vec<float> fused_multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vec<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
FS_INLINE Vec<double> fused_multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
  return (Vec<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}
// sum += a * b. With 16 registers, which a tile fills, the compiler would choose forms of the instruction that leave sums in other
// registers than they came in, and copy them back: hence the assembler.
template <class T>
FS_INLINE void accumulate(Vec<T>& sum, Vec<T> a, Vec<T> b) {
#if defined(__FMA__) && !defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  else
    asm("vfmadd231pd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
#else
  sum = fused_multiply_add(a, b, sum);
#endif
}
// sum + *scalar * b with the scalar broadcast inside the multiply-add itself: one instruction fewer through the decoder, one
// more load. The compiler would merge several such loads of one scalar into a broadcast, hence the assembler.
#if defined(__AVX512F__)
inline constexpr bool broadcasts_in_multiply_add = true;
FS_INLINE Vec<float> multiply_add_scalar(const float* scalar, Vec<float> b, Vec<float> sum) {
  asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(b), "m"(*scalar));
  return sum;
}
FS_INLINE Vec<double> multiply_add_scalar(const double* scalar, Vec<double> b, Vec<double> sum) {
  asm("vfmadd231pd %2%{1to8%}, %1, %0" : "+v"(sum) : "v"(b), "m"(*scalar));
  return sum;
}
#else
inline constexpr bool broadcasts_in_multiply_add = false;
template <class T>
FS_INLINE Vec<T> multiply_add_scalar(const T* scalar, Vec<T> b, Vec<T> sum) {
  return fused_multiply_add(broadcast(*scalar), b, sum);
}
#endif

FS_INLINE Vec<float> fused_negate_multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_fnmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vec<float>)_mm256_fnmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return fused_multiply_add(-a, b, c);
#endif
}
FS_INLINE Vec<double> fused_negate_multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_fnmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  return (Vec<double>)_mm256_fnmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return fused_multiply_add(-a, b, c);
#endif
}

// a * b - product, exactly, for product = a * b as rounded: what rounding took. Without a fused multiply-add both factors are
// split into halves whose products are exact (Dekker, "A floating-point technique for extending the available precision", 1971).
template <class T>
FS_INLINE Vec<T> product_error(Vec<T> a, Vec<T> b, Vec<T> product) {
#if defined(__FMA__) || defined(__AVX512F__) || defined(__aarch64__)
  return fused_multiply_add(a, b, -product);
#else
  IntVec<T> low_half = IntVec<T>{} + (sizeof(T) == 4 ? 0xFFF : 0x7FFFFFF);
  Vec<T> a_high = (Vec<T>)((IntVec<T>)a & ~low_half), a_low = a - a_high;
  Vec<T> b_high = (Vec<T>)((IntVec<T>)b & ~low_half), b_low = b - b_high;
  return ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low;
#endif
}

// whole - a * b for a product that is nearly the whole, exactly.
template <class T>
FS_INLINE Vec<T> remainder_of_product(Vec<T> whole, Vec<T> a, Vec<T> b) {
#if defined(__FMA__) || defined(__AVX512F__) || defined(__aarch64__)
  return fused_negate_multiply_add(a, b, whole);
#else
  Vec<T> product = a * b;
  return (whole - product) - product_error<T>(a, b, product);
#endif
}

// value < floor ? floor : value; a NaN in value stays. On x86 that is the maximum with the operands in this order. (Masked with
// all lanes, because GCC 12 warns of its own header's plain form.)
FS_INLINE Vec<float> at_least(Vec<float> value, Vec<float> floor) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_mask_max_ps((__m512)value, 0xffff, (__m512)floor, (__m512)value);
#elif defined(__AVX__)
  return (Vec<float>)_mm256_max_ps((__m256)floor, (__m256)value);
#elif defined(__SSE2__)
  return (Vec<float>)_mm_max_ps((__m128)floor, (__m128)value);
#else
  return value < floor ? floor : value;
#endif
}
FS_INLINE Vec<double> at_least(Vec<double> value, Vec<double> floor) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_mask_max_pd((__m512d)value, 0xff, (__m512d)floor, (__m512d)value);
#elif defined(__AVX__)
  return (Vec<double>)_mm256_max_pd((__m256d)floor, (__m256d)value);
#elif defined(__SSE2__)
  return (Vec<double>)_mm_max_pd((__m128d)floor, (__m128d)value);
#else
  return value < floor ? floor : value;
#endif
}

// ceiling < value ? ceiling : value; likewise.
FS_INLINE Vec<float> at_most(Vec<float> value, Vec<float> ceiling) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_mask_min_ps((__m512)value, 0xffff, (__m512)ceiling, (__m512)value);
#elif defined(__AVX__)
  return (Vec<float>)_mm256_min_ps((__m256)ceiling, (__m256)value);
#elif defined(__SSE2__)
  return (Vec<float>)_mm_min_ps((__m128)ceiling, (__m128)value);
#else
  return ceiling < value ? ceiling : value;
#endif
}
FS_INLINE Vec<double> at_most(Vec<double> value, Vec<double> ceiling) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_mask_min_pd((__m512d)value, 0xff, (__m512d)ceiling, (__m512d)value);
#elif defined(__AVX__)
  return (Vec<double>)_mm256_min_pd((__m256d)ceiling, (__m256d)value);
#elif defined(__SSE2__)
  return (Vec<double>)_mm_min_pd((__m128d)ceiling, (__m128d)value);
#else
  return ceiling < value ? ceiling : value;
#endif
}

// Lane i of the result is lane Source::at(i) of `a` followed by `b`. GCC before version 12 has one of the two builtins, Clang the
// other.
template <class T, class Source, class V, int Count = lanes<T>, int... Lanes>
FS_INLINE V shuffle(V a, V b) {
  if constexpr (Count > 0) {
    return shuffle<T, Source, V, Count - 1, Count - 1, Lanes...>(a, b);
  } else {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, Source::at(Lanes)...);
#else
    return __builtin_shuffle(a, b, IntVec<T>{Source::at(Lanes)...});
#endif
  }
}

// Of every group of 2 * Stride lanes the first Stride (Half 0) or the others (Half 1): those of `a`, then those of `b`.
template <class T, int Stride, int Half>
struct HalfGroups {
  static constexpr int at(int i) {
    int group = i / (2 * Stride), place = i % (2 * Stride);
    return (place < Stride ? 0 : lanes<T>)+group * 2 * Stride + place % Stride + Half * Stride;
  }
};

// Lane i of the result is the sum of the lanes of rows[i]: log2(lanes) rounds of pairwise adds, a fixed order.
template <class T, int Stride, int Count>
FS_INLINE Vec<T> transpose_add(Vec<T>* rows) {
  if constexpr (Count == 1) {
    return rows[0];
  } else {
    for (int i = 0; i < Count / 2; ++i)
      rows[i] = shuffle<T, HalfGroups<T, Stride, 0>>(rows[2 * i], rows[2 * i + 1]) +
                shuffle<T, HalfGroups<T, Stride, 1>>(rows[2 * i], rows[2 * i + 1]);
    return transpose_add<T, Stride * 2, Count / 2>(rows);
  }
}

// Transposes a lanes x lanes block held in registers.
template <class T, int Stride = 1>
FS_INLINE void transpose(Vec<T>* rows) {
  if constexpr (Stride < lanes<T>) {
    for (int i = 0; i < lanes<T>; ++i) {
      if ((i / Stride) % 2) continue;
      Vec<T> first = rows[i], other = rows[i + Stride];
      rows[i] = shuffle<T, HalfGroups<T, Stride, 0>>(first, other);
      rows[i + Stride] = shuffle<T, HalfGroups<T, Stride, 1>>(first, other);
    }
    transpose<T, Stride * 2>(rows);
  }
}

// 0, 1, 2, ...
template <class T>
FS_INLINE IntVec<T> lane_index() {
  IntVec<T> index;
  for (int i = 0; i < lanes<T>; ++i) index[i] = i;
  return index;
}

// Every lane gets the one Step away, to and fro.
template <int Step>
struct Partner {
  static constexpr int at(int i) { return i ^ Step; }
};

// The sum and the largest of all lanes, in a fixed order; NaN lanes do not take part in the largest.
template <class T, int Step = lanes<T> / 2>
FS_INLINE T sum_of_lanes(Vec<T> value) {
  if constexpr (Step == 0)
    return value[0];
  else
    return sum_of_lanes<T, Step / 2>(value + shuffle<T, Partner<Step>>(value, value));
}
template <class T, int Step = lanes<T> / 2>
FS_INLINE T largest_lane(Vec<T> value) {
  if constexpr (Step == 0) {
    return value[0];
  } else {
    Vec<T> other = shuffle<T, Partner<Step>>(value, value);
    return largest_lane<T, Step / 2>(other > value ? other : value);
  }
}

}  // namespace
}  // namespace fastseq::FS_ISA
