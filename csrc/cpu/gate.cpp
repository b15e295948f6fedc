#include "../gate.h"

#include "gate_rows.h"

namespace fastdfa::FASTDFA_CPU {
namespace {

template <class T> void gate_task(const GateParams& p, int64_t chunk, int64_t column) {
  using A = Accumulator<T>;
  const int64_t first = chunk * gate_chunk_rows,
                columns = min(gate_block_columns, p.columns - column);
  A* bias = static_cast<A*>(p.bias_partial) + chunk * p.columns + column;
  clear(bias, columns);
  // Eight rows at a time: a few streams that the prefetcher can follow.
  for (int64_t row = first; row < min(first + gate_chunk_rows, p.rows); row += 8) {
    gate_rows(p.kind, GateBlock<T, T>{static_cast<const T*>(p.grad) + row * p.grad_row + column,
                                      static_cast<const T*>(p.saved) + row * p.saved_row + column,
                                      static_cast<T*>(p.delta) + row * p.columns + column, bias,
                                      tile_columns<A>, p.grad_row, p.saved_row, p.columns,
                                      min(8, min(first + gate_chunk_rows, p.rows) - row), columns,
                                      A(1), static_cast<A>(p.param)});
  }
}

template <class A> void sum_chunks_as(const SumChunksParams& p) {
  const A* partial = static_cast<const A*>(p.partial);
  A* sum = static_cast<A*>(p.sum);
  clear(sum, p.columns);
  for (int64_t chunk = 0; chunk < p.chunks; ++chunk)
    for (int64_t j = 0; j < p.columns; ++j) sum[j] += partial[chunk * p.columns + j];
}

}  // namespace

void gate(const GateParams& p, int64_t begin, int64_t end) {
  const int64_t chunks = gate_chunks(p);
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for (int64_t task = begin; task < end; ++task)
      gate_task<T>(p, task % chunks, task / chunks * gate_block_columns);
  });
}

void sum_chunks(const SumChunksParams& p) {
  p.dtype == DType::float64 ? sum_chunks_as<double>(p) : sum_chunks_as<float>(p);
}

}  // namespace fastdfa::FASTDFA_CPU
