// Walks along the columns of a matrix, by several vectors at a time.
#pragma once

#include "vec_math.h"

namespace fastdfa::FASTDFA_CPU {

// Columns that are worked on together: tile_vectors vectors of the accumulation type.
#if defined(__AVX512F__)
constexpr int tile_vectors = 4;
#else
constexpr int tile_vectors = 2;
#endif
template <class A> constexpr int64_t tile_columns = tile_vectors * Vec<A>::size;

template <int n> struct Vectors {
  static constexpr int value = n;
};

// Calls f(j, Vectors<v>(), lanes) for v vectors from column j on: tiles, then single vectors, of
// which the last may have fewer lanes.
template <class A, class F> FASTDFA_INLINE void each_tile(int64_t columns, F&& f) {
  constexpr int64_t width = Vec<A>::size, tile = tile_columns<A>;
  int64_t j = 0;
  for (; j + tile <= columns; j += tile) f(j, Vectors<tile_vectors>(), AllLanes());
  for (; j + width <= columns; j += width) f(j, Vectors<1>(), AllLanes());
  if (j < columns) f(j, Vectors<1>(), FirstLanes{columns - j});
}

}  // namespace fastdfa::FASTDFA_CPU
