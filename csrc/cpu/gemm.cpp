// Matrix products in the manner of BLIS: panels are packed into the L2 cache, a micro-kernel keeps
// a tile of the product in registers, and bias and activation, or the gate, are applied to the
// tile.
#include "../gemm.h"

#include <utility>

#include "tile.h"
#include "transpose.h"

namespace fastdfa::FASTDFA_CPU {
namespace {

static_assert(gemm_rows % Tile<float>::rows == 0 && gemm_rows % Tile<double>::rows == 0);
static_assert(gemm_columns % Tile<float>::columns == 0);

template <class T> struct GemmBlock {
  using Tile = FASTDFA_CPU::Tile<T>;
  using V = Vec<T>;

  const GemmProblem& g;
  int64_t row, column, rows, columns;  // of the product
  T *panel_a, *panel_b, *product;      // scratch: see gemm_scratch

  const T* a(int64_t i, int64_t k) const {
    return static_cast<const T*>(g.a) + i * g.a_row + k * g.a_column;
  }
  const T* b(int64_t k, int64_t j) const {
    return static_cast<const T*>(g.b) + k * g.b_row + j * g.b_column;
  }

  // panel_b[tile][k][column of the tile], the columns after the last one filled with zeros.
  void pack_b(int64_t first, int64_t depth) {
    for (int64_t j = 0; j < columns; j += Tile::columns) {
      T* target = panel_b + j * depth;
      const int64_t count = min(Tile::columns, columns - j);
      if (g.b_column == 1) {
        for (int64_t k = 0; k < depth; ++k, target += Tile::columns) {
          const T* source = b(first + k, column + j);
          if (count == Tile::columns) {
            __builtin_memcpy(target, source, Tile::columns * sizeof(T));
          } else {
            clear(target, Tile::columns);
            __builtin_memcpy(target, source, count * sizeof(T));
          }
        }
      } else {
        for (int64_t i = 0; i < Tile::columns; i += V::size)
          transpose_strip(b(first, column + j + i), g.b_column, min(V::size, count - i), depth,
                          target + i, Tile::columns);
      }
    }
  }

  // Whether rows of `a` that lie side by side, as those of a weight gradient, are packed: where the
  // depth goes in steps of 2 KB or more, as its cache lines fall into few sets of the caches then.
  // On Zen 3 gradients from 512 wide on are 1.1 to 1.4 times as fast so, narrower ones 0.93. A tile
  // as wide as on Zen 4 reads `a` a quarter as often: there wide ones were within 5%.
  bool packs_a() const {
    return Tile::columns < gemm_columns && g.a_row == 1 && g.a_column * sizeof(T) >= 2048;
  }

  // panel_a[k][row of the packed ones]
  void pack_a(int64_t from, int64_t count, int64_t first, int64_t depth) {
    for (int64_t k = 0; k < depth; ++k)
      __builtin_memcpy(panel_a + k * gemm_packed_rows, a(row + from, first + k), count * sizeof(T));
  }

  // A tile of rows, which begin at `a_rows`, by all columns.
  template <Activation kind, bool gated>
  void multiply_rows(const T* const (&a_rows)[Tile::rows], int64_t a_column, int64_t from,
                     int64_t first, int64_t depth) {
    const int64_t height = min(Tile::rows, rows - from);
    const bool begin = first == 0, end = first + depth == g.depth;
    for (int64_t j = 0; j < columns; j += Tile::columns) {
      const int64_t width = min(Tile::columns, columns - j);
      if constexpr (gated)
        if (end) prefetch_saved(from, j, height);
      T* c = static_cast<T*>(g.c) + (row + from) * g.c_row + column + j;
      const T* bias = g.bias ? static_cast<const T*>(g.bias) + column + j : nullptr;
      // Straight into c, where nothing is left to do to a whole tile: 3 to 8% of a weight gradient.
      if (kind == Activation::identity && !bias && height == Tile::rows && width == Tile::columns) {
        multiply<tile_vectors>(a_rows, a_column, panel_b + j * depth, depth, c, g.c_row, !begin);
        if constexpr (gated)
          if (end) gate_tile(c, from, j, height, width);
        continue;
      }
      multiply_columns(a_rows, a_column, panel_b + j * depth, depth, ceil_div(width, V::size),
                       std::make_integer_sequence<int, tile_vectors>());
      if (end) {
        write_tile<kind, true>(c, bias, height, width, begin);
      } else {
        write_tile<Activation::identity, false>(c, nullptr, height, width, begin);
      }
      if constexpr (gated)
        if (end) gate_tile(c, from, j, height, width);
    }
  }

  // Fetched while the product of the tile is made: one core of Zen 5 takes 0.89 to 0.98 of the time
  // for 128 and 256 columns, and as much as without from 512 on.
  void prefetch_saved(int64_t from, int64_t j, int64_t height) const {
    const T* saved = static_cast<const T*>(g.saved) + (row + from) * g.saved_row + column + j;
    for (int64_t r = 0; r < height; ++r)
      for (int64_t k = 0; k < Tile::columns; k += 64 / sizeof(T))
        __builtin_prefetch(saved + r * g.saved_row + k);
  }

  // c = c * f'(saved), while the L1 cache has the tile, and its rows added to the sums of the
  // chunk.
  void gate_tile(T* c, int64_t from, int64_t j, int64_t height, int64_t width) {
    const int64_t first = row + from;
    T* sums = static_cast<T*>(g.sums) + first / gemm_chunk_rows * g.columns + column + j;
    if (first % gemm_chunk_rows == 0) clear(sums, width);
    const T* saved = static_cast<const T*>(g.saved) + first * g.saved_row + column + j;
    gate_rows(g.kind, GateBlock<T, T>{c, saved, c, sums, Tile::columns, g.c_row, g.saved_row,
                                      g.c_row, height, width, T(1), static_cast<T>(g.param)});
  }

  // Only so many vectors of a tile's columns as there are columns.
  template <int... v>
  void multiply_columns(const T* const (&a_rows)[Tile::rows], int64_t a_column, const T* b,
                        int64_t depth, int64_t vectors, std::integer_sequence<int, v...>) {
    ((vectors == v + 1 ? multiply<v + 1>(a_rows, a_column, b, depth, product, Tile::columns, false)
                       : void()),
     ...);
  }

  // c = f(c + product + bias), c left out where this is the first block of the depth.
  template <Activation kind, bool end>
  void write_tile(T* c, const T* bias, int64_t height, int64_t width, bool begin) {
    const auto write = [&](int64_t r, int64_t j, auto lanes) __attribute__((always_inline)) {
      V x = load(product + r * Tile::columns + j);
      T* p = c + r * g.c_row + j;
      if (!begin) x = x + load(p, lanes);
      if constexpr (end) {
        if (bias) x = x + load(bias + j, lanes);
        x = activate<kind>(x, V(static_cast<T>(g.param)));
      }
      store(p, x, lanes);
    };
    for (int64_t r = 0; r < height; ++r) {
      int64_t j = 0;
      for (; j + V::size <= width; j += V::size) write(r, j, AllLanes());
      if (j < width) write(r, j, FirstLanes{width - j});
    }
  }

  template <Activation kind, bool gated = false> void run() {
    const bool packs = packs_a();
    for (int64_t first = 0; first < max(g.depth, 1); first += gemm_depth) {
      const int64_t depth = min(gemm_depth, g.depth - first);
      pack_b(first, depth);
      for (int64_t r = 0; r < rows; r += Tile::rows) {
        const int64_t packed = r % gemm_packed_rows;
        if (packs && packed == 0) pack_a(r, min(gemm_packed_rows, rows - r), first, depth);
        const T* a_rows[Tile::rows];
        for (int64_t i = 0; i < Tile::rows; ++i)
          a_rows[i] = packs ? panel_a + packed + min(i, rows - 1 - r)
                            : a(row + min(r + i, rows - 1), first);
        multiply_rows<kind, gated>(a_rows, packs ? gemm_packed_rows : g.a_column, r, first, depth);
      }
    }
  }
};

}  // namespace

void gemm(const GemmParams& p, const GemmPlan& plan, int64_t begin, int64_t end, void* scratch) {
  const auto run = [&](auto type) {
    using T = decltype(type);
    for (int64_t index = begin; index < end; ++index) {
      const GemmTask task = find_gemm_task(p, plan, index);
      const GemmProblem& g = p.problems[task.problem];
      T* const panel_a = static_cast<T*>(scratch);
      GemmBlock<T> block{g,
                         task.row,
                         task.column,
                         min(plan.block_rows, g.rows - task.row),
                         min(plan.block_columns, g.columns - task.column),
                         panel_a,
                         panel_a + plan.panel_a,
                         panel_a + plan.panel_a + plan.panel_b};
      if (g.sums) {
        block.template run<Activation::identity, true>();
        continue;
      }
      dispatch_activation(g.kind, [&](auto kind) {
        if constexpr (derivative_from_output(kind.value)) block.template run<kind.value>();
      });
    }
  };
  p.dtype == DType::float64 ? run(double()) : run(float());
}

}  // namespace fastdfa::FASTDFA_CPU
