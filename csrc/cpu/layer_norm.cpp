// Layer norm with its activation, and the backward of the norm, row by row: a row is read for its
// statistics, or its sums, and again, from the cache, for what follows from them.
#include "../layer_norm.h"

#include "columns.h"

namespace fastdfa::FASTDFA_CPU {
namespace {

// The lanes that a load touches, the others zero.
template <class A> FASTDFA_INLINE Vec<A> only(Vec<A> v, AllLanes) { return v; }
template <class A> FASTDFA_INLINE Vec<A> only(Vec<A> v, FirstLanes lanes) {
  A buffer[Vec<A>::size];
  store(buffer, v);
  return load(static_cast<const A*>(buffer), lanes);
}

template <class A> FASTDFA_INLINE A sum_of_lanes(Vec<A> v) {
  A sum = 0;
  for (int i = 0; i < v.size; ++i) sum += v.raw[i];
  return sum;
}

// The sum over a row's columns of f(j, lanes), a vector from column j on.
template <class A, class F> FASTDFA_INLINE A sum_over(int64_t columns, F&& f) {
  using V = Vec<A>;
  V sum[tile_vectors] = {};
  each_tile<A>(columns, [&](int64_t j, auto vectors, auto lanes) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors.value; ++v) sum[v] = sum[v] + f(j + v * V::size, lanes);
  });
  for (int v = 1; v < tile_vectors; ++v) sum[0] = sum[0] + sum[v];
  return sum_of_lanes(sum[0]);
}

template <class A> FASTDFA_INLINE const A* values(const void* p) {
  return static_cast<const A*>(p);
}

template <Activation kind, class T> void normalise_row(const LayerNormParams& p, int64_t row) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const T* const a = static_cast<const T*>(p.a) + row * p.a_row;
  T* const h = static_cast<T*>(p.h) + row * p.columns;
  const A *const weight = values<A>(p.weight), *const bias = values<A>(p.bias);
  const A inverse = A(1) / static_cast<A>(p.columns);
  // Of what is left without the first: a large mean takes nothing of the deviations' precision.
  const A first = load(a, FirstLanes{1}).raw[0];
  const A shifted = inverse * sum_over<A>(p.columns, [&](int64_t j, auto lanes) {
                      return only(load(a + j, lanes) - V(first), lanes);
                    });
  const A variance = inverse * sum_over<A>(p.columns, [&](int64_t j, auto lanes) {
                       const V d = only(load(a + j, lanes) - V(first) - V(shifted), lanes);
                       return d * d;
                     });
  const A mean = first + shifted, rstd = A(1) / fastdfa::sqrt(variance + static_cast<A>(p.eps));
  static_cast<A*>(p.mean)[row] = mean, static_cast<A*>(p.rstd)[row] = rstd;
  each_tile<A>(p.columns, [&](int64_t j, auto vectors, auto lanes) __attribute__((always_inline)) {
    for (int v = 0; v < vectors.value; ++v) {
      const int64_t i = j + v * V::size;
      V x = (load(a + i, lanes) - V(mean)) * V(rstd);
      if (weight) x = x * load(weight + i, lanes);
      if (bias) x = x + load(bias + i, lanes);
      store(h + i, activate<kind>(x, V(static_cast<A>(p.param))), lanes);
    }
  });
}

template <class T>
void backward_row(const LayerNormBackwardParams& p, int64_t row, Accumulator<T>* weight_grad,
                  Accumulator<T>* a_sums) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  T* const delta = static_cast<T*>(p.delta) + row * p.delta_row;
  const T* const a = static_cast<const T*>(p.a) + row * p.a_row;
  const A* const weight = values<A>(p.weight);
  const V mean(values<A>(p.mean)[row]), rstd(values<A>(p.rstd)[row]);
  const auto weighted = [&](int64_t j, auto lanes) __attribute__((always_inline)) {
    const V d = load(delta + j, lanes);
    return weight ? d * load(weight + j, lanes) : d;
  };
  const auto normalised = [&](int64_t j, auto lanes) __attribute__((always_inline)) {
    return (load(a + j, lanes) - mean) * rstd;
  };
  const A inverse = A(1) / static_cast<A>(p.columns);
  const V center(inverse * sum_over<A>(p.columns, weighted));
  const V slope(inverse * sum_over<A>(p.columns, [&](int64_t j, auto lanes) {
                  return weighted(j, lanes) * normalised(j, lanes);
                }));
  each_tile<A>(p.columns, [&](int64_t j, auto vectors, auto lanes) __attribute__((always_inline)) {
    for (int v = 0; v < vectors.value; ++v) {
      const int64_t i = j + v * V::size;
      const V x = normalised(i, lanes), g = (weighted(i, lanes) - center - x * slope) * rstd;
      store(weight_grad + i, load(weight_grad + i, lanes) + load(delta + i, lanes) * x, lanes);
      store(a_sums + i, load(a_sums + i, lanes) + g, lanes);
      store(delta + i, g, lanes);
    }
  });
}

}  // namespace

void layer_norm(const LayerNormParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto type) {
    dispatch_activation(p.kind, [&](auto kind) {
      if constexpr (derivative_from_output(kind.value))
        for (int64_t row = begin; row < end; ++row)
          normalise_row<kind.value, typename decltype(type)::type>(p, row);
    });
  });
}

void layer_norm_backward(const LayerNormBackwardParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulator<T>;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      A* const weight_grad = static_cast<A*>(p.weight_partial) + chunk * p.columns;
      A* const a_sums = static_cast<A*>(p.a_partial) + chunk * p.columns;
      clear(weight_grad, p.columns);
      clear(a_sums, p.columns);
      const int64_t first = chunk * layer_norm_chunk_rows;
      for (int64_t row = first; row < min(first + layer_norm_chunk_rows, p.rows); ++row)
        backward_row<T>(p, row, weight_grad, a_sums);
    }
  });
}

}  // namespace fastdfa::FASTDFA_CPU
