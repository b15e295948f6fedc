// Transposition in registers, for the packing of a matrix whose columns are wanted side by side.
#pragma once

#include <utility>

#include "vec.h"

namespace fastdfa::FASTDFA_CPU {

// Lanes of the concatenation of a and b: low, where `block` lanes of a and of b alternate beginning
// with the even blocks of each, or high, with the odd ones.
template <int block, int odd, class T, int... lane>
FASTDFA_INLINE Vec<T> alternate(Vec<T> a, Vec<T> b, std::integer_sequence<int, lane...>) {
  constexpr int size = Vec<T>::size;
  return __builtin_shufflevector(
      a.raw, b.raw,
      ((lane / block) % 2 * size + (lane / (2 * block) * 2 + odd) * block + lane % block)...);
}

template <int block, class T> FASTDFA_INLINE void transpose_stage(Vec<T> (&rows)[Vec<T>::size]) {
  constexpr int size = Vec<T>::size;
  using Lanes = std::make_integer_sequence<int, size>;
#pragma GCC unroll 16
  for (int i = 0; i < size; ++i) {
    if (i & block) continue;
    const Vec<T> a = rows[i], b = rows[i + block];
    rows[i] = alternate<block, 0>(a, b, Lanes());
    rows[i + block] = alternate<block, 1>(a, b, Lanes());
  }
}

// rows[i][j] <-> rows[j][i], in as many stages as a vector's size has bits.
template <class T> FASTDFA_INLINE void transpose(Vec<T> (&rows)[Vec<T>::size]) {
  transpose_stage<1>(rows);
  if constexpr (Vec<T>::size > 2) transpose_stage<2>(rows);
  if constexpr (Vec<T>::size > 4) transpose_stage<4>(rows);
  if constexpr (Vec<T>::size > 8) transpose_stage<8>(rows);
}

// target[k * target_row + j] = source[j * source_row + k] for k < depth and j in the lanes that are
// written; zero for j >= count, which may be negative.
template <class T, class Lanes = AllLanes>
FASTDFA_INLINE void transpose_strip(const T* source, int64_t source_row, int64_t count,
                                    int64_t depth, T* target, int64_t target_row,
                                    Lanes written = {}) {
  using V = Vec<T>;
  for (int64_t k = 0; k < depth; k += V::size) {
    const FirstLanes lanes{min(V::size, depth - k)};
    V rows[V::size];
#pragma GCC unroll 16
    for (int j = 0; j < V::size; ++j) {
      rows[j] = V(T(0));
      if (j < count)
        rows[j] = lanes.count == V::size ? load(source + j * source_row + k)
                                         : load(source + j * source_row + k, lanes);
    }
    transpose(rows);
    for (int64_t i = 0; i < lanes.count; ++i)
      store(target + (k + i) * target_row, rows[i], written);
  }
}

}  // namespace fastdfa::FASTDFA_CPU
