// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3" (SC 2011), and the feedback matrix as a function of it:
//
//   B[c, j] = D(word j mod 4 of philox(counter = (j div 4, c, stream, 0), key = seed)),
//
// with D one of three distributions of mean 0 and variance 1.
#pragma once

#include "scalar.h"

namespace fastdfa {

// 32 x 32 -> 64 bits; the upper half of `a` is ignored.
FASTDFA_INLINE uint64_t wide_multiply(uint64_t a, uint32_t b) {
  return static_cast<uint64_t>(static_cast<uint32_t>(a)) * b;
}

// Replaces the counter by four random words. A Word is 64 bits wide (or a vector of such) and holds
// a 32-bit value in its lower half; the upper half of the result is undefined. That way the low
// word of a product needs no masking: 12 instructions a round for 16 AVX-512 counters.
template <class Word>
FASTDFA_INLINE void philox4x32_10(Word (&c)[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const Word p0 = wide_multiply(c[0], 0xD2511F53u);
    const Word p1 = wide_multiply(c[2], 0xCD9E8D57u);
    c[0] = (p1 >> 32) ^ c[1] ^ Word(uint64_t{key0});
    c[1] = p1;
    c[2] = (p0 >> 32) ^ c[3] ^ Word(uint64_t{key1});
    c[3] = p0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

enum class Distribution : int { normal, uniform, rademacher };
constexpr int distribution_count = 3;

// What generates one matrix B.
struct FeedbackKey {
  uint64_t seed;
  uint32_t stream;
  Distribution distribution;
};

// A uniform number in (0, 1): the middle of one of 2^23 intervals, exact in float.
template <class Real, class Word> FASTDFA_INLINE Real unit_interval(Word word) {
  return (to_real(word >> 9, Real()) + Real(0.5)) * Real(0x1p-23);
}

// Box-Muller: two independent normal numbers.
template <class Real, class Word>
FASTDFA_INLINE void normal_pair(Word even, Word odd, Real& x, Real& y) {
  const Real radius = sqrt(Real(-2) * log(unit_interval<Real>(even)));
  Real sine, cosine;
  sincos_2pi(unit_interval<Real>(odd), sine, cosine);
  x = radius * cosine;
  y = radius * sine;
}

template <class Real, class Word> FASTDFA_INLINE Real uniform(Word word) {
  const Real u = unit_interval<Real>(word);
  return Real(1.7320508075688773) * (u + u - Real(1));
}

template <class Real, class Word> FASTDFA_INLINE Real rademacher(Word word) {
  return Real(1) - to_real(word >> 31, Real()) * Real(2);
}

// The entries of columns 2i and 2i+1 from their two words.
template <Distribution distribution, class Real, class Word>
FASTDFA_INLINE void feedback_pair(Word even, Word odd, Real& x, Real& y) {
  if constexpr (distribution == Distribution::normal) {
    normal_pair(even, odd, x, y);
  } else if constexpr (distribution == Distribution::uniform) {
    x = uniform<Real>(even), y = uniform<Real>(odd);
  } else {
    x = rademacher<Real>(even), y = rademacher<Real>(odd);
  }
}

}  // namespace fastdfa
