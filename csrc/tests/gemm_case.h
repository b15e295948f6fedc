// What the tests of the products multiply.
#pragma once

#include <cmath>

#include "activation.h"
#include "gemm.h"

namespace fastdfa {

struct Case {
  int64_t rows, columns, depth;
  bool a_transposed, b_transposed, bias;
  Activation kind;
  bool gated = false;
};

// f'(s) of the kinds of the gated cases, each the first of how its derivative is found.
inline double derivative_of(Activation kind, double s) {
  if (kind == Activation::tanh) return 1 - s * s;
  if (kind == Activation::silu) {
    const double y = 1 / (1 + std::exp(-s));
    return y * (1 + s * (1 - y));
  }
  return 1;
}

// Sizes and strides: rows of b and of the product lie further apart than they are long.
inline void lay_out(GemmProblem& g, const Case& c) {
  g.a_row = c.a_transposed ? 1 : c.depth, g.a_column = c.a_transposed ? c.rows : 1;
  g.b_row = c.b_transposed ? 1 : c.columns + 2, g.b_column = c.b_transposed ? c.depth + 2 : 1;
  g.c_row = c.columns + 1;
  g.rows = c.rows, g.columns = c.columns, g.depth = c.depth;
  g.kind = c.kind;
}

}  // namespace fastdfa
