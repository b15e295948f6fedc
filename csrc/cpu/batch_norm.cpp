// Batch norm with its activation, and the backward of the norm: of a block of columns the
// statistics, or the sums, then at once what follows from them, while the block is in the cache.
#include "../batch_norm.h"

#include "columns.h"

namespace fastdfa::FASTDFA_CPU {
namespace {

// The most columns of a block: what is kept of each is in the L1 cache.
constexpr int64_t block_columns = 1024;
// Rows that go through a tile of columns at a time: few streams, and short sums.
constexpr int64_t chunk_rows = 16;

// What is per column, from the first of a block on; null stays null.
template <class A> A* at(const void* p, int64_t column) {
  return p ? static_cast<A*>(const_cast<void*>(p)) + column : nullptr;
}
template <class A, class Lanes>
FASTDFA_INLINE Vec<A> load_or(const A* p, A otherwise, Lanes lanes) {
  return p ? load(p, lanes) : Vec<A>(otherwise);
}

// Of each column: a shift, and the mean and the sum of squared deviations of a - shift. So a mean
// that is large beside the deviation takes nothing of its precision.
template <class A> struct Statistics {
  A shift[block_columns], mean[block_columns], squares[block_columns];
};

// Adds `rows` rows of some columns to the statistics of the `before` ones (Chan, Golub and LeVeque
// 1979).
template <int vectors, class T, class A, class Lanes>
FASTDFA_INLINE void add_rows(Statistics<A>& s, int64_t j, const T* a, int64_t a_row, int64_t before,
                             int64_t rows, Lanes lanes) {
  using V = Vec<A>;
  V shift[vectors], mean[vectors], squares[vectors];
  for (int v = 0; v < vectors; ++v) {
    shift[v] = load(s.shift + j + v * V::size, lanes);
    mean[v] = squares[v] = V(A(0));
  }
  for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v)
      mean[v] = mean[v] + (load(a + r * a_row + v * V::size, lanes) - shift[v]);
  for (int v = 0; v < vectors; ++v) mean[v] = mean[v] * V(A(1) / static_cast<A>(rows));
  for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const V d = load(a + r * a_row + v * V::size, lanes) - shift[v] - mean[v];
      squares[v] = squares[v] + d * d;
    }
  const A part = static_cast<A>(rows) / static_cast<A>(before + rows);
  for (int v = 0; v < vectors; ++v) {
    const int64_t i = j + v * V::size;
    const V old = load(s.mean + i, lanes), step = mean[v] - old;
    store(s.mean + i, old + step * V(part), lanes);
    store(s.squares + i,
          load(s.squares + i, lanes) + squares[v] + step * step * V(static_cast<A>(before) * part),
          lanes);
  }
}

template <class T> struct ForwardBlock {
  using A = Accumulator<T>;
  using V = Vec<A>;

  const BatchNormParams& p;
  int64_t column, columns;
  Statistics<A> s;

  ForwardBlock(const BatchNormParams& p, int64_t column, int64_t columns)
      : p(p), column(column), columns(columns) {}

  const T* a(int64_t row) const { return static_cast<const T*>(p.a) + row * p.a_row + column; }

  void find_statistics() {
    each_tile<A>(columns, [&](int64_t j, auto vectors, auto lanes) __attribute__((always_inline)) {
      for (int v = 0; v < vectors.value; ++v) {
        const int64_t i = j + v * V::size;
        store(s.shift + i, load(a(0) + i, lanes), lanes);
        store(s.mean + i, V(A(0)), lanes), store(s.squares + i, V(A(0)), lanes);
      }
    });
    for (int64_t row = 0; row < p.rows; row += chunk_rows)
      each_tile<A>(columns,
                   [&](int64_t j, auto vectors, auto lanes) __attribute__((always_inline)) {
                     add_rows<vectors.value>(s, j, a(row) + j, p.a_row, row,
                                             min(chunk_rows, p.rows - row), lanes);
                   });
  }

  // Moves a running statistic towards this batch's.
  template <class Lanes> FASTDFA_INLINE void move(A* running, V found, Lanes lanes) const {
    const V momentum(static_cast<A>(p.momentum)), kept(static_cast<A>(1 - p.momentum));
    store(running, momentum * found + kept * load(running, lanes), lanes);
  }

  template <class Lanes> FASTDFA_INLINE void finish_statistics(int64_t j, Lanes lanes) const {
    A* const running_mean = at<A>(p.running_mean, column + j);
    A* const running_var = at<A>(p.running_var, column + j);
    V mean, variance;
    if (p.training) {
      mean = load(s.shift + j, lanes) + load(s.mean + j, lanes);
      const V squares = load(s.squares + j, lanes);
      variance = squares * V(A(1) / static_cast<A>(p.rows));
      if (running_mean) {
        move(running_mean, mean, lanes);
        move(running_var, squares * V(A(1) / static_cast<A>(p.rows - 1)), lanes);
      }
    } else {
      mean = load(running_mean, lanes), variance = load(running_var, lanes);
    }
    store(at<A>(p.mean, column + j), mean, lanes);
    store(at<A>(p.rstd, column + j), V(A(1)) / sqrt(variance + V(static_cast<A>(p.eps))), lanes);
  }

  template <Activation kind, int vectors, class Lanes>
  FASTDFA_INLINE void normalise(int64_t row, int64_t j, Lanes lanes) const {
    V mean[vectors], scale[vectors], bias[vectors];
    for (int v = 0; v < vectors; ++v) {
      const int64_t i = column + j + v * V::size;
      mean[v] = load(at<A>(p.mean, i), lanes);
      scale[v] = load(at<A>(p.rstd, i), lanes) * load_or(at<A>(p.weight, i), A(1), lanes);
      bias[v] = load_or(at<A>(p.bias, i), A(0), lanes);
    }
    const V param(static_cast<A>(p.param));
    const T* from = a(row) + j;
    T* to = static_cast<T*>(p.h) + row * p.columns + column + j;
    for (int64_t r = min(chunk_rows, p.rows - row); r > 0; --r, from += p.a_row, to += p.columns)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        const V x = (load(from + v * V::size, lanes) - mean[v]) * scale[v] + bias[v];
        store(to + v * V::size, activate<kind>(x, param), lanes);
      }
  }

  template <Activation kind> void normalise() const {
    for (int64_t row = 0; row < p.rows; row += chunk_rows)
      each_tile<A>(columns, [&](int64_t j, auto vectors, auto lanes) __attribute__((
                                always_inline)) { normalise<kind, vectors.value>(row, j, lanes); });
  }

  void run() {
    if (p.training) find_statistics();
    each_tile<A>(columns, [&](int64_t j, auto vectors, auto lanes) __attribute__((always_inline)) {
      for (int v = 0; v < vectors.value; ++v) finish_statistics(j + v * V::size, lanes);
    });
    dispatch_activation(p.kind, [&](auto kind) {
      if constexpr (derivative_from_output(kind.value)) normalise<kind.value>();
    });
  }
};

template <class T> struct BackwardBlock {
  using A = Accumulator<T>;
  using V = Vec<A>;

  const BatchNormBackwardParams& p;
  int64_t column, columns;
  A products[block_columns];  // sums over rows of delta (a - mean)

  BackwardBlock(const BatchNormBackwardParams& p, int64_t column, int64_t columns)
      : p(p), column(column), columns(columns) {}

  T* delta(int64_t row) const { return static_cast<T*>(p.delta) + row * p.delta_row + column; }
  const T* a(int64_t row) const { return static_cast<const T*>(p.a) + row * p.a_row + column; }

  template <int vectors, class Lanes>
  FASTDFA_INLINE void add_products(int64_t row, int64_t j, Lanes lanes) {
    V mean[vectors], sum[vectors];
    for (int v = 0; v < vectors; ++v) {
      mean[v] = load(at<A>(p.mean, column + j + v * V::size), lanes);
      sum[v] = V(A(0));
    }
    const T *d = delta(row) + j, *x = a(row) + j;
    for (int64_t r = min(chunk_rows, p.rows - row); r > 0; --r, d += p.delta_row, x += p.a_row)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v)
        sum[v] = sum[v] + load(d + v * V::size, lanes) * (load(x + v * V::size, lanes) - mean[v]);
    for (int v = 0; v < vectors; ++v) {
      A* const total = products + j + v * V::size;
      store(total, load(total, lanes) + sum[v], lanes);
    }
  }

  // delta = (delta - its mean - (a - mean) slope) scale, without the middle where the statistics
  // are not the batch's own.
  template <bool training, int vectors, class Lanes>
  FASTDFA_INLINE void write(int64_t row, int64_t j, Lanes lanes) {
    V mean[vectors], center[vectors], slope[vectors], scale[vectors], sum[vectors];
    const V inverse(A(1) / static_cast<A>(p.rows));
    for (int v = 0; v < vectors; ++v) {
      const int64_t i = column + j + v * V::size;
      const V rstd = load(at<A>(p.rstd, i), lanes);
      mean[v] = load(at<A>(p.mean, i), lanes);
      center[v] = load(at<A>(p.delta_sums, i), lanes) * inverse;
      slope[v] = load(products + j + v * V::size, lanes) * rstd * rstd * inverse;
      scale[v] = rstd * load_or(at<A>(p.weight, i), A(1), lanes);
      sum[v] = load(at<A>(p.a_sums, i), lanes);
    }
    T* d = delta(row) + j;
    const T* x = a(row) + j;
    for (int64_t r = min(chunk_rows, p.rows - row); r > 0; --r, d += p.delta_row, x += p.a_row)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        V g = load(d + v * V::size, lanes);
        if constexpr (training)
          g = g - center[v] - (load(x + v * V::size, lanes) - mean[v]) * slope[v];
        g = g * scale[v];
        store(d + v * V::size, g, lanes);
        sum[v] = sum[v] + g;
      }
    for (int v = 0; v < vectors; ++v)
      store(at<A>(p.a_sums, column + j + v * V::size), sum[v], lanes);
  }

  template <bool training> void write() {
    for (int64_t row = 0; row < p.rows; row += chunk_rows)
      each_tile<A>(columns, [&](int64_t j, auto vectors, auto lanes) __attribute__((
                                always_inline)) { write<training, vectors.value>(row, j, lanes); });
  }

  void run() {
    clear(products, columns);
    clear(at<A>(p.a_sums, column), columns);
    for (int64_t row = 0; row < p.rows; row += chunk_rows)
      each_tile<A>(columns, [&](int64_t j, auto vectors, auto lanes) __attribute__((
                                always_inline)) { add_products<vectors.value>(row, j, lanes); });
    const A* const rstd = at<A>(p.rstd, column);
    for (int64_t j = 0; j < columns; ++j) at<A>(p.weight_grad, column)[j] = products[j] * rstd[j];
    p.training ? write<true>() : write<false>();
  }
};

// Runs the columns of some tasks, block by block.
template <template <class> class Block, class Params>
void run_blocks(const Params& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto type) {
    const int64_t last = min(end * batch_norm_columns, p.columns);
    for (int64_t column = begin * batch_norm_columns; column < last; column += block_columns)
      Block<typename decltype(type)::type>(p, column, min(block_columns, last - column)).run();
  });
}

}  // namespace

void batch_norm(const BatchNormParams& p, int64_t begin, int64_t end) {
  run_blocks<ForwardBlock>(p, begin, end);
}

void batch_norm_backward(const BatchNormBackwardParams& p, int64_t begin, int64_t end) {
  run_blocks<BackwardBlock>(p, begin, end);
}

}  // namespace fastdfa::FASTDFA_CPU
