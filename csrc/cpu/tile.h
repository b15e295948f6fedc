// The micro-kernel of the matrix products: a tile of the product in registers.
#pragma once

#include "gate_rows.h"

namespace fastdfa::FASTDFA_CPU {

// Accumulators fill the registers (24 of 32, or 12 of 16) and leave room for one row of b and one
// entry of a.
template <class A> struct Tile {
  static constexpr int rows = vector_bytes > 16 ? 6 : 4, columns = tile_columns<A>;
};

// product[rows, columns of the tile] (+)= a[rows, depth] b[depth, columns of the tile], of which
// the first `vectors` vectors are made. `a` holds a pointer to each row; rows of b are a
// tile wide.
template <int vectors, class A>
FASTDFA_INLINE void multiply(const A* const (&a)[Tile<A>::rows], int64_t a_column, const A* b,
                             int64_t depth, A* product, int64_t product_row, bool accumulate) {
  using V = Vec<A>;
  constexpr int rows = Tile<A>::rows;
  V sum[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sum[r][v] = V(A(0));
  for (int64_t c = 0; c < depth; ++c) {
    V row[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) row[v] = load(b + c * Tile<A>::columns + v * V::size);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const V e(a[r][c * a_column]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[r][v] = sum[r][v] + e * row[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      A* p = product + r * product_row + v * V::size;
      store(p, accumulate ? load(p) + sum[r][v] : sum[r][v]);
    }
}

}  // namespace fastdfa::FASTDFA_CPU
