// Entries of one row of the feedback matrix, generated.
#pragma once

#include "../philox.h"
#include "vec_math.h"

namespace fastdfa::FASTDFA_CPU {

FASTDFA_INLINE Vec<uint64_t> lane_numbers() {
  Vec<uint64_t> v;
  for (int i = 0; i < v.size; ++i) v.raw[i] = i;
  return v;
}

// out[0 .. count) = B[row, column ...], unit variance; column is a multiple of 4.
// float: each vector of counters makes two vectors of numbers.
template <Distribution distribution>
void feedback_row(float* out, const FeedbackKey& key, int64_t row, int64_t column, int64_t count) {
  using W = Vec<uint64_t>;
  using V = Vec<float>;
  const uint32_t key0 = static_cast<uint32_t>(key.seed);
  const uint32_t key1 = static_cast<uint32_t>(key.seed >> 32);
  for (int64_t j = 0; j < count; j += 2 * V::size) {
    W c[4] = {W(static_cast<uint64_t>(column + j) / 4) + lane_numbers(),
              W(static_cast<uint64_t>(row)), W(uint64_t{key.stream}), W(uint64_t{0})};
    philox4x32_10(c, key0, key1);
    V x, y, low, high;
    feedback_pair<distribution>(interleave_words(c[0], c[2]), interleave_words(c[1], c[3]), x, y);
    interleave(x, y, low, high);
    if (j + 2 * V::size <= count) {
      store(out + j, low);
      store(out + j + V::size, high);
    } else {
      float last[2 * V::size];
      store(last, low);
      store(last + V::size, high);
      __builtin_memcpy(out + j, last, (count - j) * sizeof(float));
    }
  }
}

// double: one counter at a time, from the same words.
template <Distribution distribution>
void feedback_row(double* out, const FeedbackKey& key, int64_t row, int64_t column, int64_t count) {
  for (int64_t j = 0; j < count; j += 4) {
    uint64_t c[4] = {static_cast<uint64_t>(column + j) / 4, static_cast<uint64_t>(row), key.stream,
                     0};
    philox4x32_10(c, static_cast<uint32_t>(key.seed), static_cast<uint32_t>(key.seed >> 32));
    double b[4];
    for (int i = 0; i < 4; i += 2)
      feedback_pair<distribution>(static_cast<uint32_t>(c[i]), static_cast<uint32_t>(c[i + 1]),
                                  b[i], b[i + 1]);
    for (int64_t i = 0; i < min(4, count - j); ++i) out[j + i] = b[i];
  }
}

template <class Real>
FASTDFA_INLINE void feedback_row(Real* out, const FeedbackKey& key, int64_t row, int64_t column,
                                 int64_t count) {
  switch (key.distribution) {
    case Distribution::normal:
      return feedback_row<Distribution::normal>(out, key, row, column, count);
    case Distribution::uniform:
      return feedback_row<Distribution::uniform>(out, key, row, column, count);
    case Distribution::rademacher:
      return feedback_row<Distribution::rademacher>(out, key, row, column, count);
  }
}

}  // namespace fastdfa::FASTDFA_CPU
