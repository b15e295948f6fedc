#pragma once

#include "activation.h"

namespace fastdfa {

struct GateParams {
  const void* grad;    // [rows, columns], unit column stride
  const void* saved;   // [rows, columns], unit column stride; not read for identity
  void* delta;         // [rows, columns], contiguous
  void* bias_partial;  // [chunks, columns], accumulation type: column sums of each chunk of rows
  int64_t grad_row, saved_row;
  int64_t rows, columns;
  DType dtype;
  Activation kind;
  double param;
};

// On the CPU, tasks are blocks of columns x chunks of rows, from the shapes alone: the bias
// gradient is the same on any number of threads. 64 rows: partial sums are 1/64 of the traffic.
constexpr int64_t gate_chunk_rows = 64, gate_block_columns = 1024;

FASTDFA_INLINE int64_t gate_chunks(const GateParams& p) {
  return ceil_div(p.rows, gate_chunk_rows);
}
FASTDFA_INLINE int64_t gate_tasks(const GateParams& p) {
  return gate_chunks(p) * ceil_div(p.columns, gate_block_columns);
}

// Second stage of a bias gradient: the sum of partial[0, j], partial[1, j], ..., in a fixed order.
struct SumChunksParams {
  const void* partial;  // [chunks, columns]
  void* sum;            // [columns]
  int64_t chunks, columns;
  DType dtype;  // float32 or float64
};

}  // namespace fastdfa
