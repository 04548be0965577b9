// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3, SC 2011): the generator behind
// dropout. A weight's fate depends on its place and the seed alone, so backward draws it again instead of reading it.
//
// Counter words: (key / 4, query, sequence * heads + head, offset). The four words of the result belong to keys
// 4 * (key / 4) ... + 3. A weight is dropped when its word is below round(p * 2^32).
#pragma once

#include <stdint.h>

// How these functions are declared where a compiler for another processor reads them, too.
#ifndef FASTSEQ_PHILOX_FUNCTION
#define FASTSEQ_PHILOX_FUNCTION inline __attribute__((always_inline))
#endif

namespace fastseq {
namespace {

struct PhiloxConstants {
  static constexpr int rounds = 10;
  static constexpr uint32_t multiplier0 = 0xD2511F53, multiplier1 = 0xCD9E8D57;
  static constexpr uint32_t weyl0 = 0x9E3779B9, weyl1 = 0xBB67AE85;
};

// The two words that round `round` adds to.
FASTSEQ_PHILOX_FUNCTION uint32_t philox_key(uint64_t seed, int round, int word) {
  using C = PhiloxConstants;
  return (uint32_t)(seed >> (32 * word)) + (uint32_t)round * (word ? C::weyl1 : C::weyl0);
}

// Wide: an integer, or a vector of integers, of 64 bits; every word lies in the low half of one, and what is in the other half
// does not matter until the end. multiply(word, constant) is the product of the low halves, broadcast(word) the constant in
// every lane, key(round, word) a round's key in every lane. The words may be those after `first_round` rounds.
template <class Wide, class Multiply, class Broadcast, class Key>
FASTSEQ_PHILOX_FUNCTION void philox(Wide (&word)[4], Multiply multiply, Broadcast broadcast, Key key, int first_round = 0) {
  using C = PhiloxConstants;
  for (int round = first_round; round < C::rounds; ++round) {
    Wide product0 = multiply(word[0], broadcast(C::multiplier0));
    Wide product1 = multiply(word[2], broadcast(C::multiplier1));
    word[0] = (product1 >> 32) ^ word[1] ^ key(round, 0);
    word[1] = product1;
    word[2] = (product0 >> 32) ^ word[3] ^ key(round, 1);
    word[3] = product0;
  }
  Wide low = broadcast(0xFFFFFFFFu);
  for (Wide& result : word) result = result & low;
}

// Words below this are dropped; 2^32 drops all of them.
FASTSEQ_PHILOX_FUNCTION uint64_t dropout_threshold(double probability) { return (uint64_t)(probability * 4294967296.0 + 0.5); }

}  // namespace
}  // namespace fastseq
