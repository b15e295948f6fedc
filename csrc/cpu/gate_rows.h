// The gate, the last stage of project_gate and the whole of gate:
//   delta = scale * signal * f'(saved),   bias += column sums of delta.
#pragma once

#include "../activation.h"
#include "columns.h"

namespace fastdfa::FASTDFA_CPU {

template <class S, class T> struct GateBlock {  // S: element type of signal, T or its accumulator
  const S* signal;                              // tiles of [rows, tile_columns]
  const T* saved;                               // [rows, columns]; not read for identity
  T* delta;                                     // [rows, columns]
  Accumulator<T>* bias;                         // [columns]
  int64_t signal_tile;  // distance of the tiles of signal, in elements, as the row strides:
  int64_t signal_row, saved_row, delta_row;
  int64_t rows, columns;
  Accumulator<T> scale, param;
};

// `vectors` vectors of columns from column j. Rows run inside columns, so that the column sums stay
// in registers. The block comes by value: the stores could alias one in memory, and each of its
// fields would be read again for every vector.
template <Activation kind, int vectors, class S, class T, class Lanes>
FASTDFA_INLINE void gate_columns(const GateBlock<S, T> b, int64_t j, Lanes lanes) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const S* signal = b.signal + j / tile_columns<A> * b.signal_tile + j % tile_columns<A>;
  const T* saved = b.saved + j;
  T* delta = b.delta + j;
  V sum[vectors];
  for (int v = 0; v < vectors; ++v) sum[v] = load(b.bias + j + v * V::size, lanes);
  for (int64_t row = 0; row < b.rows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      V d = load(signal + v * V::size, lanes) * V(b.scale);
      if constexpr (kind != Activation::identity)
        d = d * derivative<kind>(load(saved + v * V::size, lanes), V(b.param));
      store(delta + v * V::size, d, lanes);
      sum[v] = sum[v] + d;
    }
    signal += b.signal_row, saved += b.saved_row, delta += b.delta_row;
  }
  for (int v = 0; v < vectors; ++v) store(b.bias + j + v * V::size, sum[v], lanes);
}

template <Activation kind, class S, class T> void gate_rows(const GateBlock<S, T> b) {
  each_tile<Accumulator<T>>(
      b.columns, [&](int64_t j, auto vectors, auto lanes) __attribute__((always_inline)) {
        gate_columns<kind, vectors.value>(b, j, lanes);
      });
}

template <class S, class T>
FASTDFA_INLINE void gate_rows(Activation kind, const GateBlock<S, T>& b) {
  dispatch_activation(kind, [&](auto k) { gate_rows<k.value>(b); });
}

}  // namespace fastdfa::FASTDFA_CPU
