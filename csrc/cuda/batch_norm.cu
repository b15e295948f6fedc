// Batch norm with its activation, and the backward of the norm. A block has all rows of a few
// columns: it reads them for the statistics, or for the sum, and again, from the cache, for what
// follows from them. One launch, and nothing is shared between blocks.
#include "kernels.h"
#include "norm.h"

namespace fastdfa::cuda {
namespace {

template <class Params> struct ColumnsLaunch {
  static constexpr int threads = 512;

  Params p;
  int across_bits;  // 2^across_bits columns of a block side by side
  int64_t tiles;

  FASTDFA_INLINE int across() const { return 1 << across_bits; }
};

// As many columns side by side as give every multiprocessor a block (an H100 has 132), but whole
// sectors of 32 bytes.
template <class Params> ColumnsLaunch<Params> plan_columns(const Params& p) {
  ColumnsLaunch<Params> plan{p, 5, 0};
  const int64_t fewest = 32 / bytes_of(p.dtype);
  while (plan.across() > fewest && ceil_div(p.columns, plan.across()) < 128) --plan.across_bits;
  plan.tiles = ceil_div(p.columns, plan.across());
  return plan;
}

// A thread's part of a tile: every so many rows of one column.
template <class Params> struct Part {
  Team team;
  int64_t column, rows;  // no rows behind the last column

  __device__ __forceinline__ Part(const ColumnsLaunch<Params>& l, int64_t tile) {
    const int lane = threadIdx.x & (l.across() - 1);
    team = {lane, l.across(), static_cast<int>(threadIdx.x) >> l.across_bits,
            ColumnsLaunch<Params>::threads >> l.across_bits};
    column = tile * l.across() + lane;
    rows = column < l.p.columns ? l.p.rows : 0;
  }

  // Whether this thread writes what is per column.
  __device__ __forceinline__ bool writes(int64_t columns) const {
    return team.index == 0 && column < columns;
  }
};

template <class A> __device__ __forceinline__ void move(void* running, int64_t i, A by, A found) {
  A& value = static_cast<A*>(running)[i];
  value = by * found + (A(1) - by) * value;
}

template <class T>
__global__ void __launch_bounds__(ColumnsLaunch<BatchNormParams>::threads, 1)
    batch_norm_kernel(FASTDFA_PARAMS ColumnsLaunch<BatchNormParams> l) {
  using A = Accumulator<T>;
  const BatchNormParams& p = l.p;
  for (int64_t tile = blockIdx.x; tile < l.tiles; tile += gridDim.x) {
    const Part<BatchNormParams> part(l, tile);
    const int64_t column = part.column;
    const T* const a = static_cast<const T*>(p.a) + column;
    Statistics<A> s{};
    if (p.training) {
      s = find_statistics<A>(part.team, part.rows,
                             [&](int64_t row) { return static_cast<A>(widen(a[row * p.a_row])); });
    } else if (column < p.columns) {
      s = {static_cast<const A*>(p.running_mean)[column],
           static_cast<const A*>(p.running_var)[column]};
    }
    const A rstd = A(1) / fastdfa::sqrt(s.variance + static_cast<A>(p.eps));
    if (part.writes(p.columns)) {
      static_cast<A*>(p.mean)[column] = s.mean, static_cast<A*>(p.rstd)[column] = rstd;
      if (p.training && p.running_mean) {
        const A by = static_cast<A>(p.momentum), rows = static_cast<A>(p.rows);
        move(p.running_mean, column, by, s.mean);
        move(p.running_var, column, by, s.variance * (rows / (rows - A(1))));
      }
    }
    if (part.rows == 0) continue;  // the threads behind the last column, of the last tile
    const A scale = rstd * value_or(p.weight, column, A(1)), bias = value_or(p.bias, column, A(0));
    T* const h = static_cast<T*>(p.h) + column;
    dispatch_activation(p.kind, [&](auto kind) {
      if constexpr (derivative_from_output(decltype(kind)::value)) {
#pragma unroll 4
        for (int64_t row = part.team.index; row < part.rows; row += part.team.size) {
          const A x = (static_cast<A>(widen(a[row * p.a_row])) - s.mean) * scale + bias;
          narrow(fastdfa::activate<decltype(kind)::value>(x, static_cast<A>(p.param)),
                 h[row * p.columns]);
        }
      }
    });
  }
}

template <class T>
__global__ void __launch_bounds__(ColumnsLaunch<BatchNormBackwardParams>::threads, 1)
    batch_norm_backward_kernel(FASTDFA_PARAMS ColumnsLaunch<BatchNormBackwardParams> l) {
  using A = Accumulator<T>;
  const BatchNormBackwardParams& p = l.p;
  for (int64_t tile = blockIdx.x; tile < l.tiles; tile += gridDim.x) {
    const Part<BatchNormBackwardParams> part(l, tile);
    const int64_t column = part.column;
    const bool inside = column < p.columns;
    T* const delta = static_cast<T*>(p.delta) + column;
    const T* const a = static_cast<const T*>(p.a) + column;
    const A mean = inside ? static_cast<const A*>(p.mean)[column] : A(0);
    const A rstd = inside ? static_cast<const A*>(p.rstd)[column] : A(0);
    const A products = sum_over<A>(part.team, part.rows, [&](int64_t row) {
      const A d = widen(delta[row * p.delta_row]), x = widen(a[row * p.a_row]);
      return d * (x - mean);
    });
    A center = 0, slope = 0;
    if (p.training && inside) {
      const A inverse = A(1) / static_cast<A>(p.rows);
      center = static_cast<const A*>(p.delta_sums)[column] * inverse;
      slope = products * rstd * rstd * inverse;
    }
    const A scale = inside ? rstd * value_or(p.weight, column, A(1)) : A(0);
    const A sum = sum_over<A>(part.team, part.rows, [&](int64_t row) {
      A g = widen(delta[row * p.delta_row]);
      if (p.training) g = g - center - (static_cast<A>(widen(a[row * p.a_row])) - mean) * slope;
      g *= scale;
      narrow(g, delta[row * p.delta_row]);
      return g;
    });
    if (part.writes(p.columns)) {
      static_cast<A*>(p.weight_grad)[column] = products * rstd;
      static_cast<A*>(p.a_sums)[column] = sum;
    }
  }
}

template <class Params, class F> int run(const Params& p, Stream stream, F&& kernel_of) {
  if (p.columns == 0) return cudaSuccess;
  const ColumnsLaunch<Params> plan = plan_columns(p);
  const dim3 grid(static_cast<unsigned>(min(plan.tiles, most_blocks)));
  cudaError_t code = cudaSuccess;
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const size_t shared_bytes = ColumnsLaunch<Params>::threads * sizeof(Accumulator<T>);
    code = launch(kernel_of(type), grid, dim3(ColumnsLaunch<Params>::threads), shared_bytes, stream,
                  plan);
  });
  return code;
}

}  // namespace

int batch_norm(const BatchNormParams& p, Stream stream) {
  return run(p, stream, [](auto type) { return batch_norm_kernel<typename decltype(type)::type>; });
}

int batch_norm_backward(const BatchNormBackwardParams& p, Stream stream) {
  return run(p, stream,
             [](auto type) { return batch_norm_backward_kernel<typename decltype(type)::type>; });
}

}  // namespace fastdfa::cuda
