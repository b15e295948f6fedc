// x = f(x + bias) in place. x is contiguous, so it is read as a matrix whose rows are several of
// its own, as long as makes them a whole number of 16-byte packs: whatever the width, every access
// is aligned, and a thread that walks down a column of packs reads its part of the bias once.
#include <numeric>

#include "device.h"
#include "kernels.h"

namespace fastdfa::cuda {
namespace {

struct ActivateLaunch {
  static constexpr int threads = 256;
  static constexpr int rows = 4;  // of a thread: packs whose loads are in flight at once

  ActivateParams p;
  int64_t columns;  // of the folded matrix
  int64_t strips, tiles;
  bool whole;  // x is aligned to 16 bytes
};

// Bias entries of the thread's columns, which go round in the folded row.
template <class T>
__device__ __forceinline__ void load_bias(const ActivateParams& p, int64_t column,
                                          Accumulator<T> (&bias)[Pack<T>::size]) {
  using A = Accumulator<T>;
  if (p.bias == nullptr) return;
  int64_t j = column % p.columns;
#pragma unroll
  for (int i = 0; i < Pack<T>::size; ++i) {
    bias[i] = p.bias_dtype == p.dtype ? static_cast<A>(widen(static_cast<const T*>(p.bias)[j]))
                                      : static_cast<const A*>(p.bias)[j];
    if (++j == p.columns) j = 0;
  }
}

template <class T, Activation kind>
__device__ __forceinline__ void activate_tiles(const ActivateLaunch& launch) {
  using A = Accumulator<T>;
  constexpr int width = Pack<T>::size, rows = ActivateLaunch::rows;
  const ActivateParams& p = launch.p;
  T* const x = static_cast<T*>(p.x);
  for (int64_t tile = blockIdx.x; tile < launch.tiles; tile += gridDim.x) {
    const int64_t strip = tile % launch.strips;
    const int64_t column = (strip * ActivateLaunch::threads + threadIdx.x) * width;
    const int64_t first = tile / launch.strips * rows * launch.columns + column;
    if (column >= launch.columns) continue;
    A bias[width] = {};
    load_bias<T>(p, column, bias);
    Pack<T> pack[rows];
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      const int64_t at = first + r * launch.columns;
      pack[r] = load_pack(x, at, p.elements, launch.whole && at + width <= p.elements);
    }
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      const int64_t at = first + r * launch.columns;
#pragma unroll
      for (int i = 0; i < width; ++i)
        narrow(fastdfa::activate<kind>(widen(pack[r].v[i]) + bias[i], static_cast<A>(p.param)),
               pack[r].v[i]);
      store_pack(x, at, p.elements, launch.whole && at + width <= p.elements, pack[r]);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(ActivateLaunch::threads)
    activate_kernel(FASTDFA_PARAMS ActivateLaunch l) {
  dispatch_activation(l.p.kind, [&](auto kind) {
    if constexpr (derivative_from_output(decltype(kind)::value))
      activate_tiles<T, decltype(kind)::value>(l);
  });
}

}  // namespace

int activate(const ActivateParams& p, Stream stream) {
  if (p.elements == 0) return cudaSuccess;
  const int64_t width = 16 / bytes_of(p.dtype), tile_columns = ActivateLaunch::threads * width;
  const int64_t period = p.bias ? std::lcm(p.columns, width) : width;
  ActivateLaunch plan{p, period * ceil_div(tile_columns, period), 0, 0, false};
  plan.strips = ceil_div(plan.columns, tile_columns);
  plan.tiles = plan.strips * ceil_div(p.elements, plan.columns * ActivateLaunch::rows);
  plan.whole = reinterpret_cast<uintptr_t>(p.x) % 16 == 0;
  const dim3 grid(static_cast<unsigned>(min(plan.tiles, most_blocks)));
  cudaError_t code = cudaSuccess;
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    code = launch(activate_kernel<T>, grid, dim3(ActivateLaunch::threads), 0, stream, plan);
  });
  return code;
}

}  // namespace fastdfa::cuda
