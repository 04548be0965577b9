// Dropout's random words, drawn where they are used: Philox on the lanes of a vector, and which elements of a matrix it takes.
#pragma once

#include "../attention/philox.h"
#include "parallel.h"
#include "vec.h"

namespace fastseq::FS_ISA {
namespace {

typedef uint64_t WideVector __attribute__((vector_size(FS_VECTOR_BYTES)));

FS_INLINE WideVector multiply_words(WideVector a, WideVector b) {
#if defined(__AVX512F__)
  return (WideVector)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);  // GCC 12 warns of its header's plain form
#elif defined(__AVX2__)
  return (WideVector)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (WideVector)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xFFFFFFFFu) * b;
#endif
}

FS_INLINE WideVector wide_word(uint32_t value) { return WideVector{} + (uint64_t)value; }

// A seed's keys in every lane. In memory they are operands; made on the spot they would take a sixth of the instructions.
struct WideKeys {
  WideVector key[PhiloxConstants::rounds][2];

  explicit WideKeys(uint64_t seed) {
    for (int round = 0; round < PhiloxConstants::rounds; ++round)
      for (int word = 0; word < 2; ++word) key[round][word] = wide_word(philox_key(seed, round, word));
  }
  FS_INLINE void run(WideVector (&word)[4], int first_round = 0) const {
    philox(word, multiply_words, wide_word, [this](int round, int i) FS_LAMBDA_INLINE { return key[round][i]; }, first_round);
  }
};

struct EvenLanes {
  static constexpr int at(int i) { return 2 * i; }
};

// Dropout of a matrix's elements. Columns go in groups of dropout_group; element (row, column) has word (column % 32) / 8 of
// the counter (8 * (column / 32) + column % 8, row's low word, row's high word, offset): whatever the vector, the counters of
// a group fill whole vectors, and its words come out in the order of the columns.
inline constexpr int64_t dropout_group = 32;

template <class T>
struct ElementDropout {
  static constexpr int L = lanes<T>, wide_lanes = FS_VECTOR_BYTES / 8;
  static constexpr int vectors = dropout_group / L;  // of one group
  uint64_t threshold;
  WideKeys keys;
  uint32_t offset;
  T scale;  // of what stays

  ElementDropout(double probability, uint64_t seed, uint64_t offset)
      : threshold(dropout_threshold(probability)),
        keys(seed),
        offset((uint32_t)offset),
        scale(probability < 1 ? (T)(1 / (1 - probability)) : T(0)) {}

  bool active() const { return threshold != 0; }

  // factor of columns [32 * group, 32 * group + 32) of a row: scale, or 0 where the element is dropped.
  FS_INLINE void draw(int64_t row, int64_t group, Vec<T>* factor /* [vectors] */) const {
    WideVector kept[dropout_group / wide_lanes];  // in the order of the columns
    WideVector lane{};
    for (int i = 0; i < wide_lanes; ++i) lane[i] = (uint64_t)i;
#pragma GCC unroll 4
    for (int first = 0; first < 8; first += wide_lanes) {
      WideVector word[4] = {(wide_word((uint32_t)(8 * group + first)) + lane) & 0xFFFFFFFFu, wide_word((uint32_t)row),
                            wide_word((uint32_t)((uint64_t)row >> 32)), wide_word(offset)};
      keys.run(word);
#pragma GCC unroll 4
      for (int w = 0; w < 4; ++w) kept[(8 * w + first) / wide_lanes] = (WideVector)(word[w] >= threshold);
    }
    IntVec<T> bits = (IntVec<T>)broadcast<T>(scale);
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) {
      if constexpr (sizeof(T) == 8) {
        factor[v] = (Vec<T>)((IntVec<T>)kept[v] & bits);
      } else {
        // The low halves of two vectors of 64-bit lanes.
        IntVec<T> low = shuffle<T, EvenLanes>((IntVec<T>)kept[2 * v], (IntVec<T>)kept[2 * v + 1]);
        factor[v] = (Vec<T>)(low & bits);
      }
    }
  }
};

// What the kernels draw, written out: keep[rows, columns].
inline void element_dropout_mask(int64_t rows, int64_t columns, double probability, uint64_t seed, uint64_t offset,
                                 uint8_t* keep) {
  ElementDropout<float> dropout(probability < 1 ? probability : 1, seed, offset);
  dropout.scale = 1;
  for (int64_t row = 0; row < rows; ++row, keep += columns)
    for (int64_t group = 0; group * dropout_group < columns; ++group) {
      alignas(64) float factor[dropout_group];
      Vec<float> drawn[ElementDropout<float>::vectors];
      dropout.draw(row, group, drawn);
      for (int v = 0; v < ElementDropout<float>::vectors; ++v) store(factor + v * lanes<float>, drawn[v]);
      int64_t count = minimum(dropout_group, columns - group * dropout_group);
      for (int64_t i = 0; i < count; ++i) keep[group * dropout_group + i] = factor[i] != 0;
    }
}

}  // namespace
}  // namespace fastseq::FS_ISA
