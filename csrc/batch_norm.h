// Columns and what is per column below: statistics, weight, bias and sums are contiguous, in the
// accumulation type.
#pragma once

#include "activation.h"

namespace fastdfa {

struct BatchNormParams {
  const void* a;              // [rows, columns], unit column stride
  void* h;                    // [rows, columns], contiguous: f((a - mean) rstd weight + bias)
  const void *weight, *bias;  // [columns], or null
  void *running_mean, *running_var;  // [columns]; training: moved, or null; else read
  void *mean, *rstd;                 // [columns]: by which a was normalised
  int64_t a_row, rows, columns;
  bool training;
  double momentum, eps;
  DType dtype;
  Activation kind;  // one whose derivative is a function of the output
  double param;
};

struct BatchNormBackwardParams {
  void* delta;             // [rows, columns], unit column stride; overwritten by the gradient of a
  const void* delta_sums;  // [columns]: of the rows of delta
  const void* a;           // [rows, columns], unit column stride
  const void *mean, *rstd, *weight;  // [columns]; weight may be null
  void *weight_grad, *a_sums;        // [columns]; a_sums: of the rows of the gradient of a
  int64_t delta_row, a_row, rows, columns;
  bool training;
  DType dtype;
};

// On the CPU, a task has all rows of so many columns. A column's sums are made in one order, so
// they are the same on any number of threads.
constexpr int64_t batch_norm_columns = 16;

FASTDFA_INLINE int64_t batch_norm_tasks(int64_t columns) {
  return ceil_div(columns, batch_norm_columns);
}

}  // namespace fastdfa
