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

  // Outputs that all tiles of rows make in turn. So their weights come from beyond the L2 cache
  // once, and a block of a tile's inputs stays in the L1 cache: 1.1 to 1.3 times as fast on Zen 3
  // as all outputs for one tile after the other, with 48 or 192 too.
  static constexpr int64_t block_features = Tile::columns < gemm_columns ? 96 : Tile::rows;
  static_assert(block_features % Tile::rows == 0, "a tile of outputs is made in one block");

  const GemmProblem* layers;
  int64_t count;
  int64_t row, rows;    // at most gemm_columns
  int64_t features;     // room for so many
  T *inputs, *outputs;  // for each tile [features][Tile::columns]: of each feature its rows

  void run() {
    for (int64_t i = 0; i < rows; i += Tile::columns) load_inputs(layers[0], i);
    for (int64_t l = 0; l < count; ++l) {
      dispatch_activation(layers[l].kind, [&](auto kind) {
        if constexpr (derivative_from_output(kind.value)) multiply_layer<kind.value>(layers[l]);
      });
      for (int64_t i = 0; i < rows; i += Tile::columns) store_outputs(layers[l], i);
      std::swap(inputs, outputs);
    }
  }

  // Of the tile that begins with row i.
  T* inputs_of(int64_t i) const { return inputs + i * features; }
  T* outputs_of(int64_t i) const { return outputs + i * features; }
  int64_t rows_of(int64_t i) const { return min(Tile::columns, rows - i); }

  void load_inputs(const GemmProblem& g, int64_t i) {
    const T* source = static_cast<const T*>(g.a) + (row + i) * g.a_row;
    T* target = inputs_of(i);
    const int64_t height = rows_of(i);
    if (g.a_column == 1) {
      for (int64_t r = 0; r < height; r += V::size)
        transpose_strip(source + r * g.a_row, g.a_row, min(V::size, height - r), g.depth,
                        target + r, Tile::columns);
    } else {
      for (int64_t k = 0; k < g.depth; ++k)
        for (int64_t r = 0; r < Tile::columns; ++r)
          target[k * Tile::columns + r] = source[k * g.a_column + min(r, height - 1) * g.a_row];
    }
  }

  template <Activation kind> void multiply_layer(const GemmProblem& g) {
    for (int64_t block = 0; block < g.columns; block += block_features) {
      const int64_t end = min(block + block_features, g.columns);
      // The depth in the same blocks as in other products, so that the bits are the same.
      for (int64_t first = 0; first < max(g.depth, 1); first += gemm_depth)
        for (int64_t i = 0; i < rows; i += Tile::columns)
          for (int64_t j = block; j < end; j += Tile::rows) multiply_tile<kind>(g, i, j, first);
    }
  }

  // Rows from i and outputs from j, by the block of the depth from `first`.
  template <Activation kind>
  void multiply_tile(const GemmProblem& g, int64_t i, int64_t j, int64_t first) {
    const int64_t height = min(Tile::rows, g.columns - j), depth = min(gemm_depth, g.depth - first);
    const T* weight = static_cast<const T*>(g.b) + j * g.b_column + first * g.b_row;
    const T* w[Tile::rows];
    for (int r = 0; r < Tile::rows; ++r) w[r] = weight + min(r, height - 1) * g.b_column;
    T* product = outputs_of(i) + j * Tile::columns;
    multiply_columns(w, g.b_row, inputs_of(i) + first * Tile::columns, depth, product, first > 0,
                     ceil_div(rows_of(i), V::size),
                     std::make_integer_sequence<int, tile_vectors>());
    if (first + depth == g.depth) activate_tile<kind>(g, i, j, height);
  }

  // Only so many vectors of a tile's columns as there are rows.
  template <int... v>
  void multiply_columns(const T* const (&w)[Tile::rows], int64_t w_column, const T* in,
                        int64_t depth, T* product, bool accumulate, int64_t vectors,
                        std::integer_sequence<int, v...>) {
    ((vectors == v + 1 ? multiply<v + 1>(w, w_column, in, depth, product, Tile::columns, accumulate)
                       : void()),
     ...);
  }

  template <Activation kind>
  void activate_tile(const GemmProblem& g, int64_t i, int64_t j, int64_t height) {
    for (int64_t r = 0; r < height; ++r) {
      const T* bias = g.bias ? static_cast<const T*>(g.bias) + j + r : nullptr;
      T* output = outputs_of(i) + (j + r) * Tile::columns;
      for (int64_t v = 0; v < rows_of(i); v += V::size) {
        V x = load(output + v);
        if (bias) x = x + V(*bias);
        store(output + v, activate<kind>(x, V(static_cast<T>(g.param))));
      }
    }
  }

  void store_outputs(const GemmProblem& g, int64_t i) {
    T* target = static_cast<T*>(g.c) + (row + i) * g.c_row;
    const auto store_strip = [&](int64_t j, int64_t count, auto lanes) {
      transpose_strip(outputs_of(i) + j * Tile::columns, Tile::columns, count, rows_of(i),
                      target + j, g.c_row, lanes);
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
    const int64_t features = round_up(chain_features(p), gemm_rows);
    T* const inputs = static_cast<T*>(scratch);
    T* const outputs = inputs + features * gemm_columns;
    for (int64_t row = begin; row < end; row += gemm_columns) {
      const int64_t rows = min(gemm_columns, end - row);
      ChainRows<T>{p.problems, p.count, row, rows, features, inputs, outputs}.run();
    }
  };
  p.dtype == DType::float64 ? run(double()) : run(float());
}

}  // namespace fastdfa::FASTDFA_CPU
