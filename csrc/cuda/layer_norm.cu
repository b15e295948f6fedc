// Layer norm with its activation, and the backward of the norm. Forward, some threads of a block
// share a row. Backward, a first launch finds the two means that each row needs; a second one, by
// tiles of columns as in gate.cu, writes the gradient of a and sums columns over chunks of rows.
#include "kernels.h"
#include "norm.h"

namespace fastdfa::cuda {
namespace {

template <class Params> struct RowsLaunch {
  static constexpr int threads = 256;

  Params p;
  int across_bits;  // the 2^across_bits threads of a row
  int64_t tiles;    // of rows

  FASTDFA_INLINE int down() const { return threads >> across_bits; }
};

template <class Params> RowsLaunch<Params> plan_rows(const Params& p) {
  RowsLaunch<Params> plan{p, 5, 0};
  while (plan.down() > 1 && int64_t{4} << plan.across_bits < p.columns) ++plan.across_bits;
  plan.tiles = ceil_div(p.rows, plan.down());
  return plan;
}

template <class Params> __device__ __forceinline__ Team team_of_row(const RowsLaunch<Params>& l) {
  const int across = 1 << l.across_bits, lane = threadIdx.x & (across - 1);
  return {static_cast<int>(threadIdx.x) - lane, 1, lane, across};
}

template <class Params>
__device__ __forceinline__ int64_t row_of(const RowsLaunch<Params>& l, int64_t tile) {
  return tile * l.down() + (threadIdx.x >> l.across_bits);
}

template <class T>
__global__ void __launch_bounds__(RowsLaunch<LayerNormParams>::threads, 2)
    layer_norm_kernel(FASTDFA_PARAMS RowsLaunch<LayerNormParams> l) {
  using A = Accumulator<T>;
  const LayerNormParams& p = l.p;
  const Team team = team_of_row(l);
  for (int64_t tile = blockIdx.x; tile < l.tiles; tile += gridDim.x) {
    const int64_t row = row_of(l, tile), columns = row < p.rows ? p.columns : 0;
    const T* const a = static_cast<const T*>(p.a) + row * p.a_row;
    T* const h = static_cast<T*>(p.h) + row * p.columns;
    const Statistics<A> s =
        find_statistics<A>(team, columns, [&](int64_t j) { return static_cast<A>(widen(a[j])); });
    const A rstd = A(1) / fastdfa::sqrt(s.variance + static_cast<A>(p.eps));
    if (columns == 0) continue;  // the threads behind the last row, of the last tile
    if (team.index == 0) static_cast<A*>(p.mean)[row] = s.mean, static_cast<A*>(p.rstd)[row] = rstd;
    dispatch_activation(p.kind, [&](auto kind) {
      if constexpr (derivative_from_output(decltype(kind)::value)) {
#pragma unroll 4
        for (int64_t j = team.index; j < columns; j += team.size) {
          const A x = (static_cast<A>(widen(a[j])) - s.mean) * rstd;
          const A y = x * value_or(p.weight, j, A(1)) + value_or(p.bias, j, A(0));
          narrow(fastdfa::activate<decltype(kind)::value>(y, static_cast<A>(p.param)), h[j]);
        }
      }
    });
  }
}

// row_means [2, rows]: of the gradient of the normalised row, and of that times the row.
template <class T>
__global__ void __launch_bounds__(RowsLaunch<LayerNormBackwardParams>::threads, 2)
    row_means_kernel(FASTDFA_PARAMS RowsLaunch<LayerNormBackwardParams> l) {
  using A = Accumulator<T>;
  const LayerNormBackwardParams& p = l.p;
  const Team team = team_of_row(l);
  for (int64_t tile = blockIdx.x; tile < l.tiles; tile += gridDim.x) {
    const int64_t row = row_of(l, tile), columns = row < p.rows ? p.columns : 0;
    const T* const delta = static_cast<const T*>(p.delta) + row * p.delta_row;
    const T* const a = static_cast<const T*>(p.a) + row * p.a_row;
    const A mean = columns ? static_cast<const A*>(p.mean)[row] : A(0);
    A center = 0, slope = 0;
#pragma unroll 4
    for (int64_t j = team.index; j < columns; j += team.size) {
      const A g = static_cast<A>(widen(delta[j])) * value_or(p.weight, j, A(1));
      center += g, slope += g * (static_cast<A>(widen(a[j])) - mean);
    }
    center = sum_of_team(team, center), slope = sum_of_team(team, slope);
    if (columns == 0 || team.index > 0) continue;
    A* const means = static_cast<A*>(p.row_means) + row;
    means[0] = center / static_cast<A>(columns);
    means[p.rows] = slope * static_cast<const A*>(p.rstd)[row] / static_cast<A>(columns);
  }
}

struct GradientLaunch {
  static constexpr int threads = 256, across = 32, down = threads / across;

  LayerNormBackwardParams p;
  int64_t tiles;  // of columns, side by side
  int64_t chunk_rows, chunks;
};

// From the shapes alone, so that the sums are the same everywhere.
GradientLaunch plan_gradient(const LayerNormBackwardParams& p) {
  using L = GradientLaunch;
  L plan{p, ceil_div(p.columns, L::across), 512, 0};
  while (plan.chunk_rows > 4 * L::down && plan.tiles * ceil_div(p.rows, plan.chunk_rows) < 1024)
    plan.chunk_rows /= 2;
  plan.chunks = ceil_div(p.rows, plan.chunk_rows);
  return plan;
}

template <class T>
__global__ void __launch_bounds__(GradientLaunch::threads, 2)
    layer_norm_gradient_kernel(FASTDFA_PARAMS GradientLaunch l) {
  using A = Accumulator<T>;
  using L = GradientLaunch;
  const LayerNormBackwardParams& p = l.p;
  const int lane = threadIdx.x % L::across, line = threadIdx.x / L::across;
  const Team team{lane, L::across, line, L::down};
  const A* const means = static_cast<const A*>(p.row_means);
  for (int64_t item = blockIdx.x; item < l.tiles * l.chunks; item += gridDim.x) {
    const int64_t column = item % l.tiles * L::across + lane, chunk = item / l.tiles;
    const int64_t first = chunk * l.chunk_rows;
    const int64_t rows = column < p.columns ? min(l.chunk_rows, p.rows - first) : 0;
    const A weight = rows ? value_or(p.weight, column, A(1)) : A(0);
    A weight_grad = 0, a_sum = 0;
#pragma unroll 4
    for (int64_t r = line; r < rows; r += L::down) {
      const int64_t row = first + r;
      T& delta = static_cast<T*>(p.delta)[row * p.delta_row + column];
      const A d = widen(delta), rstd = static_cast<const A*>(p.rstd)[row];
      const A a = widen(static_cast<const T*>(p.a)[row * p.a_row + column]);
      const A x = (a - static_cast<const A*>(p.mean)[row]) * rstd;
      const A g = (d * weight - means[row] - x * means[p.rows + row]) * rstd;
      weight_grad += d * x, a_sum += g;
      narrow(g, delta);
    }
    weight_grad = sum_of_team(team, weight_grad), a_sum = sum_of_team(team, a_sum);
    if (rows && line == 0) {
      static_cast<A*>(p.weight_partial)[chunk * p.columns + column] = weight_grad;
      static_cast<A*>(p.a_partial)[chunk * p.columns + column] = a_sum;
    }
  }
}

template <class Launch, class F>
cudaError_t run(DType dtype, int64_t blocks, Stream stream, const Launch& plan, F&& kernel_of) {
  const dim3 grid(static_cast<unsigned>(min(blocks, most_blocks)));
  cudaError_t code = cudaSuccess;
  dispatch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    code = launch(kernel_of(type), grid, dim3(Launch::threads),
                  Launch::threads * sizeof(Accumulator<T>), stream, plan);
  });
  return code;
}

}  // namespace

int layer_norm(const LayerNormParams& p, Stream stream) {
  if (p.rows == 0) return cudaSuccess;
  const auto plan = plan_rows(p);
  return run(p.dtype, plan.tiles, stream, plan,
             [](auto type) { return layer_norm_kernel<typename decltype(type)::type>; });
}

int64_t layer_norm_backward_chunks(const LayerNormBackwardParams& p) {
  return plan_gradient(p).chunks;
}

int layer_norm_backward(const LayerNormBackwardParams& p, Stream stream) {
  if (p.rows == 0) return cudaSuccess;
  const auto rows = plan_rows(p);
  const cudaError_t code = run(p.dtype, rows.tiles, stream, rows, [](auto type) {
    return row_means_kernel<typename decltype(type)::type>;
  });
  if (code != cudaSuccess) return code;
  const GradientLaunch plan = plan_gradient(p);
  return run(p.dtype, plan.tiles * plan.chunks, stream, plan,
             [](auto type) { return layer_norm_gradient_kernel<typename decltype(type)::type>; });
}

}  // namespace fastdfa::cuda
