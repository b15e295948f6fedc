// delta = grad * f'(saved) and its column sums. A block takes a chunk of rows of a tile of columns;
// a thread owns 16 bytes of columns and walks down its rows, with the sums in registers.
#include "device.h"
#include "kernels.h"

namespace fastdfa::cuda {
namespace {

struct GateLaunch {
  static constexpr int threads = 256;
  static constexpr int batch = 4;  // rows of a thread whose loads are in flight at once

  GateParams p;
  int across_bits;  // the 2^across_bits threads side by side: 32, or fewer where a row is short
  int64_t tiles;    // side by side
  int64_t chunk_rows, chunks;

  FASTDFA_INLINE int across() const { return 1 << across_bits; }
  FASTDFA_INLINE int down() const { return threads >> across_bits; }
};

// From the shapes alone, so that the bias gradient is the same everywhere.
GateLaunch plan_gate(const GateParams& p) {
  GateLaunch plan{p, 0, 0, 0, 0};
  const int64_t width = 16 / bytes_of(p.dtype);
  while (plan.across_bits < 5 && width * plan.across() < p.columns) ++plan.across_bits;
  plan.tiles = ceil_div(p.columns, width * plan.across());
  // Longer chunks have fewer partial sums, shorter ones make enough blocks: 2048 are 5 waves of
  // three blocks on each of 132 multiprocessors.
  const int64_t fewest_rows = GateLaunch::batch * plan.down();
  plan.chunk_rows = max(512, fewest_rows);
  while (plan.chunk_rows > fewest_rows && plan.tiles * ceil_div(p.rows, plan.chunk_rows) < 2048)
    plan.chunk_rows /= 2;
  plan.chunks = ceil_div(p.rows, plan.chunk_rows);
  return plan;
}

// whole: rows are aligned and made of whole packs, of which a thread takes one. Else it takes
// single columns that lie `across` apart, so that neighbouring threads access neighbouring columns.
template <class T, bool whole> struct GateKernel {
  using A = Accumulator<T>;
  static constexpr int width = Pack<T>::size, batch = GateLaunch::batch;

  const GateLaunch& launch;
  const int lane, line;  // of the thread: across and down

  __device__ int place(int i) const {
    return whole ? lane * width + i : i * launch.across() + lane;
  }

  // `row` begins at the tile's first column, of `columns` to the end of the matrix.
  __device__ __forceinline__ Pack<T> load(const T* row, int64_t columns) const {
    if constexpr (whole) {
      return load_pack(row, lane * width, columns, true);
    } else {
      Pack<T> pack{};
#pragma unroll
      for (int i = 0; i < width; ++i)
        if (place(i) < columns) pack.v[i] = row[place(i)];
      return pack;
    }
  }
  __device__ __forceinline__ void store(T* row, int64_t columns, const Pack<T>& pack) const {
    if constexpr (whole) {
      store_pack(row, lane * width, columns, true, pack);
    } else {
#pragma unroll
      for (int i = 0; i < width; ++i)
        if (place(i) < columns) row[place(i)] = pack.v[i];
    }
  }

  // pack = pack * f'(saved), added to the sums.
  template <Activation kind>
  __device__ __forceinline__ void gate_pack(Pack<T>& pack, const Pack<T>& saved,
                                            A (&sum)[width]) const {
#pragma unroll
    for (int i = 0; i < width; ++i) {
      A d = widen(pack.v[i]);
      if constexpr (kind != Activation::identity)
        d *= derivative<kind>(static_cast<A>(widen(saved.v[i])), static_cast<A>(launch.p.param));
      sum[i] += d;
      narrow(d, pack.v[i]);
    }
  }

  // Rows row, row + down, ... of the tile that begins at column `first`.
  __device__ __forceinline__ void gate_batch(int64_t first, int64_t row, int64_t end,
                                             A (&sum)[width]) const {
    const GateParams& p = launch.p;
    const int64_t columns = p.columns - first;
    const T* const grad = static_cast<const T*>(p.grad) + first;
    const T* const saved = static_cast<const T*>(p.saved) + first;
    T* const delta = static_cast<T*>(p.delta) + first;
    Pack<T> packs[batch], states[batch];
#pragma unroll
    for (int r = 0; r < batch; ++r) {
      const int64_t i = row + r * launch.down();
      if (i >= end) continue;
      packs[r] = load(grad + i * p.grad_row, columns);
      if (p.kind != Activation::identity) states[r] = load(saved + i * p.saved_row, columns);
    }
    dispatch_activation(p.kind, [&](auto kind) {
#pragma unroll
      for (int r = 0; r < batch; ++r)  // the branch keeps rows apart: mixed, they spill registers
        if (row + r * launch.down() < end)
          gate_pack<decltype(kind)::value>(packs[r], states[r], sum);
    });
#pragma unroll
    for (int r = 0; r < batch; ++r) {
      const int64_t i = row + r * launch.down();
      if (i < end) store(delta + i * p.columns, columns, packs[r]);
    }
  }

  // The sums of the threads above each other, in order.
  __device__ __forceinline__ void store_sums(int64_t first, int64_t chunk,
                                             const A (&sum)[width]) const {
    A* const sums = static_cast<A*>(shared_memory());  // [down, across * width]
    const int columns = launch.across() * width;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < width; ++i) sums[line * columns + place(i)] = sum[i];
    __syncthreads();
    A* const partial = static_cast<A*>(launch.p.bias_partial) + chunk * launch.p.columns + first;
    for (int j = threadIdx.x; j < columns && first + j < launch.p.columns;
         j += GateLaunch::threads) {
      A total = 0;
      for (int d = 0; d < launch.down(); ++d) total += sums[d * columns + j];
      partial[j] = total;
    }
  }

  __device__ __forceinline__ void run() const {
    for (int64_t item = blockIdx.x; item < launch.tiles * launch.chunks; item += gridDim.x) {
      const int64_t first = item % launch.tiles * launch.across() * width;
      const int64_t chunk = item / launch.tiles, begin = chunk * launch.chunk_rows;
      const int64_t end = min(begin + launch.chunk_rows, launch.p.rows);
      A sum[width] = {};
      for (int64_t row = begin + line; row < end; row += batch * launch.down())
        gate_batch(first, row, end, sum);
      store_sums(first, chunk, sum);
    }
  }
};

template <class T, bool whole>
__global__ void __launch_bounds__(GateLaunch::threads, 2) gate_kernel(FASTDFA_PARAMS GateLaunch l) {
  const int lane = threadIdx.x & (l.across() - 1), line = threadIdx.x >> l.across_bits;
  GateKernel<T, whole>{l, lane, line}.run();
}

}  // namespace

int64_t gate_chunks(const GateParams& p) { return plan_gate(p).chunks; }

int gate(const GateParams& p, Stream stream) {
  if (p.rows == 0 || p.columns == 0) return cudaSuccess;
  const GateLaunch plan = plan_gate(p);
  const dim3 grid(static_cast<unsigned>(min(plan.tiles * plan.chunks, most_blocks)));
  cudaError_t code = cudaSuccess;
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const bool whole =
        whole_packs<T>(p.grad, p.grad_row, p.columns) &&
        whole_packs<T>(p.delta, p.columns, p.columns) &&
        (p.kind == Activation::identity || whole_packs<T>(p.saved, p.saved_row, p.columns));
    const size_t shared_bytes = GateLaunch::threads * Pack<T>::size * sizeof(Accumulator<T>);
    code = launch(whole ? gate_kernel<T, true> : gate_kernel<T, false>, grid,
                  dim3(GateLaunch::threads), shared_bytes, stream, plan);
  });
  return code;
}

}  // namespace fastdfa::cuda
