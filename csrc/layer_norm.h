// Statistics, weight, bias and sums are contiguous, in the accumulation type.
#pragma once

#include "activation.h"

namespace fastdfa {

struct LayerNormParams {
  const void* a;              // [rows, columns], unit column stride
  void* h;                    // [rows, columns], contiguous: f((a - mean) rstd weight + bias)
  const void *weight, *bias;  // [columns], or null
  void *mean, *rstd;          // [rows]
  int64_t a_row, rows, columns;
  double eps;
  DType dtype;
  Activation kind;  // one whose derivative is a function of the output
  double param;
};

struct LayerNormBackwardParams {
  void* delta;              // [rows, columns], unit column stride; overwritten by the gradient of a
  const void* a;            // [rows, columns], unit column stride
  const void *mean, *rstd;  // [rows]
  const void* weight;       // [columns], or null
  void *weight_partial, *a_partial;  // [chunks, columns]: of each chunk of rows, the gradient of
                                     // the weight and the sum of that of a
  void* row_means;                   // CUDA only, scratch: [2, rows]
  int64_t delta_row, a_row, rows, columns;
  DType dtype;
};

// On the CPU, a task of the backward is a chunk of rows, from the shape alone: the sums are the
// same on any number of threads.
constexpr int64_t layer_norm_chunk_rows = 64;

FASTDFA_INLINE int64_t layer_norm_chunks(int64_t rows) {
  return ceil_div(rows, layer_norm_chunk_rows);
}

}  // namespace fastdfa
