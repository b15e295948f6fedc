// A run of layers h = f(h W^T + b) for some rows, whose activations stay transposed in the cache
// from layer to layer: then the weights are read where they lie, instead of being packed.
#include <utility>

#include "../gemm.h"
#include "tile.h"
#include "transpose.h"

namespace fastdfa::FASTDFA_CPU {
namespace {

template <class T> struct ChainRows {
  using Tile = FASTDFA_CPU::Tile<T>;
  using V = Vec<T>;

  const GemmProblem* layers;
  int64_t count;
  int64_t row, rows;    // at most as many as a tile has columns
  T *inputs, *outputs;  // [features][Tile::columns]: of each feature these rows side by side
  T* product;           // a tile

  void run() {
    load_inputs(layers[0]);
    for (int64_t l = 0; l < count; ++l) {
      dispatch_activation(layers[l].kind, [&](auto kind) {
        if constexpr (derivative_from_output(kind.value)) multiply_layer<kind.value>(layers[l]);
      });
      store_outputs(layers[l]);
      std::swap(inputs, outputs);
    }
  }

  void load_inputs(const GemmProblem& g) {
    const T* source = static_cast<const T*>(g.a) + row * g.a_row;
    if (g.a_column == 1) {
      for (int64_t i = 0; i < rows; i += V::size)
        transpose_strip(source + i * g.a_row, g.a_row, min(V::size, rows - i), g.depth, inputs + i,
                        Tile::columns);
    } else {
      for (int64_t k = 0; k < g.depth; ++k)
        for (int64_t i = 0; i < Tile::columns; ++i)
          inputs[k * Tile::columns + i] = source[k * g.a_column + min(i, rows - 1) * g.a_row];
    }
  }

  template <Activation kind> void multiply_layer(const GemmProblem& g) {
    const T* weight = static_cast<const T*>(g.b);
    for (int64_t j = 0; j < g.columns; j += Tile::rows) {
      const int64_t height = min(Tile::rows, g.columns - j);
      // The depth in the same blocks as in other products, so that the bits are the same.
      for (int64_t first = 0; first < max(g.depth, 1); first += gemm_depth) {
        const T* w[Tile::rows];
        for (int r = 0; r < Tile::rows; ++r)
          w[r] = weight + (j + min(r, height - 1)) * g.b_column + first * g.b_row;
        multiply_columns(w, g.b_row, inputs + first * Tile::columns,
                         min(gemm_depth, g.depth - first), first > 0,
                         std::make_integer_sequence<int, tile_vectors>());
      }
      write_tile<kind>(g, j, height);
    }
  }

  // Only so many vectors of a tile's columns as there are rows.
  template <int... v>
  void multiply_columns(const T* const (&w)[Tile::rows], int64_t w_column, const T* in,
                        int64_t depth, bool accumulate, std::integer_sequence<int, v...>) {
    const int64_t vectors = ceil_div(rows, V::size);
    ((vectors == v + 1 ? multiply<v + 1>(w, w_column, in, depth, product, Tile::columns, accumulate)
                       : void()),
     ...);
  }

  template <Activation kind>
  void write_tile(const GemmProblem& g, int64_t feature, int64_t height) {
    for (int64_t r = 0; r < height; ++r) {
      const T* bias = g.bias ? static_cast<const T*>(g.bias) + feature + r : nullptr;
      for (int64_t i = 0; i < rows; i += V::size) {
        V x = load(product + r * Tile::columns + i);
        if (bias) x = x + V(*bias);
        store(outputs + (feature + r) * Tile::columns + i,
              activate<kind>(x, V(static_cast<T>(g.param))));
      }
    }
  }

  void store_outputs(const GemmProblem& g) {
    T* target = static_cast<T*>(g.c) + row * g.c_row;
    const auto store_strip = [&](int64_t j, int64_t features, auto lanes) {
      transpose_strip(outputs + j * Tile::columns, Tile::columns, features, rows, target + j,
                      g.c_row, lanes);
    };
    int64_t j = 0;
    for (; j + V::size <= g.columns; j += V::size) store_strip(j, V::size, AllLanes());
    if (j < g.columns) store_strip(j, g.columns - j, FirstLanes{g.columns - j});
  }
};

}  // namespace

void linear_chain(const GemmParams& p, int64_t begin, int64_t end, void* scratch) {
  const auto run = [&](auto type) {
    using T = decltype(type);
    T* const inputs = static_cast<T*>(scratch);
    T* const outputs = inputs + chain_features(p) * gemm_columns;
    for (int64_t row = begin; row < end; row += Tile<T>::columns) {
      const int64_t rows = min(Tile<T>::columns, end - row);
      ChainRows<T>{p.problems,
                   p.count,
                   row,
                   rows,
                   inputs,
                   outputs,
                   outputs + chain_features(p) * gemm_columns}
          .run();
    }
  };
  p.dtype == DType::float64 ? run(double()) : run(float());
}

}  // namespace fastdfa::FASTDFA_CPU
