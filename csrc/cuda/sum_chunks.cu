// The second stage of bias gradients: the sums of chunks of rows, added up in a fixed order. A
// block takes 32 columns of one layer; each of its warps adds every eighth chunk.
#include "device.h"
#include "kernels.h"

namespace fastdfa::cuda {
namespace {

struct SumChunksLaunch {
  static constexpr int across = 32, down = 8;
  static constexpr int most_layers = 64;

  SumChunksParams layers[most_layers];
  int64_t first_block[most_layers];
  int64_t blocks;
  int count;
};

template <class A>
__device__ __forceinline__ void sum_columns(const SumChunksParams& layer, int64_t first) {
  using L = SumChunksLaunch;
  const int lane = threadIdx.x % L::across, line = threadIdx.x / L::across;
  A(*const sums)[L::across] = static_cast<A(*)[L::across]>(shared_memory());
  const int64_t column = first + lane;
  A sum = 0;
  if (column < layer.columns) {
    const A* partial = static_cast<const A*>(layer.partial) + column;
#pragma unroll 8
    for (int64_t chunk = line; chunk < layer.chunks; chunk += L::down)
      sum += partial[chunk * layer.columns];
  }
  sums[line][lane] = sum;
  __syncthreads();
  if (line == 0 && column < layer.columns) {
#pragma unroll
    for (int d = 1; d < L::down; ++d) sum += sums[d][lane];
    static_cast<A*>(layer.sum)[column] = sum;
  }
}

__global__ void __launch_bounds__(SumChunksLaunch::across* SumChunksLaunch::down)
    sum_chunks_kernel(FASTDFA_PARAMS SumChunksLaunch l) {
  int i = l.count - 1;
  while (l.first_block[i] > blockIdx.x) --i;
  const SumChunksParams& layer = l.layers[i];
  const int64_t first = (blockIdx.x - l.first_block[i]) * SumChunksLaunch::across;
  layer.dtype == DType::float64 ? sum_columns<double>(layer, first)
                                : sum_columns<float>(layer, first);
}

cudaError_t launch_sums(const SumChunksLaunch& l, Stream stream) {
  using L = SumChunksLaunch;
  if (l.blocks == 0) return cudaSuccess;
  return launch(sum_chunks_kernel, dim3(static_cast<unsigned>(l.blocks)), dim3(L::across * L::down),
                L::across * L::down * sizeof(double), stream, l);
}

}  // namespace

int sum_chunks(const SumChunksParams* list, int64_t count, Stream stream) {
  using L = SumChunksLaunch;
  for (int64_t done = 0; done < count;) {
    L l{};
    for (; l.count < L::most_layers && done < count; ++done) {
      l.layers[l.count] = list[done];
      l.first_block[l.count++] = l.blocks;
      l.blocks += ceil_div(list[done].columns, L::across);
    }
    const cudaError_t code = launch_sums(l, stream);
    if (code != cudaSuccess) return code;
  }
  return cudaSuccess;
}

}  // namespace fastdfa::cuda
