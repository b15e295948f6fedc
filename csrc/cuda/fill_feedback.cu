// The feedback matrix as a function of its key: a thread makes four columns of a row, the numbers
// of one block of the generator, and so in four rows.
#include "device.h"
#include "kernels.h"

namespace fastdfa::cuda {
namespace {

struct FillFeedbackLaunch {
  static constexpr int across = 32, down = 8, rows = 4;  // threads of a tile; rows of a thread
  static constexpr int64_t tile_columns = 4 * across, tile_rows = down * rows;

  FillFeedbackParams p;
  int64_t strips, tiles;  // tiles side by side; in all
  bool whole;             // every row is aligned to the access of a thread
};

// What a thread writes of a row: 8 bytes, or 16 at a time.
template <class T> struct alignas(sizeof(T) == 2 ? 8 : 16) Four {
  T v[4];
};

template <class T, Distribution distribution>
__device__ __forceinline__ Four<T> four_entries(const FeedbackKey& key, int64_t row,
                                                int64_t column) {
  using A = Accumulator<T>;
  uint64_t c[4] = {static_cast<uint64_t>(column) / 4, static_cast<uint64_t>(row), key.stream, 0};
  philox4x32_10(c, static_cast<uint32_t>(key.seed), static_cast<uint32_t>(key.seed >> 32));
  Four<T> entries;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    A x, y;
    feedback_pair<distribution>(static_cast<uint32_t>(c[i]), static_cast<uint32_t>(c[i + 1]), x, y);
    narrow(x, entries.v[i]);
    narrow(y, entries.v[i + 1]);
  }
  return entries;
}

template <class T>
__device__ __forceinline__ void store_four(T* row, int64_t column, int64_t columns, bool whole,
                                           const Four<T>& entries) {
  if (whole && column + 4 <= columns) {
    *reinterpret_cast<Four<T>*>(row + column) = entries;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (column + i < columns) row[column + i] = entries.v[i];
  }
}

template <class T, Distribution distribution>
__device__ __forceinline__ void fill_tiles(const FillFeedbackLaunch& launch) {
  using L = FillFeedbackLaunch;
  const FillFeedbackParams& p = launch.p;
  for (int64_t tile = blockIdx.x; tile < launch.tiles; tile += gridDim.x) {
    const int64_t column = tile % launch.strips * L::tile_columns + threadIdx.x % L::across * 4;
    const int64_t first = tile / launch.strips * L::tile_rows + threadIdx.x / L::across;
    if (column >= p.columns) continue;
#pragma unroll
    for (int r = 0; r < L::rows; ++r) {
      const int64_t row = first + r * L::down;
      if (row < p.classes)
        store_four(static_cast<T*>(p.out) + row * p.out_row, column, p.columns, launch.whole,
                   four_entries<T, distribution>(p.key, row, p.first_column + column));
    }
  }
}

template <class T>
__global__ void __launch_bounds__(256) fill_feedback_kernel(FASTDFA_PARAMS FillFeedbackLaunch l) {
  switch (l.p.key.distribution) {
    case Distribution::normal:
      return fill_tiles<T, Distribution::normal>(l);
    case Distribution::uniform:
      return fill_tiles<T, Distribution::uniform>(l);
    case Distribution::rademacher:
      return fill_tiles<T, Distribution::rademacher>(l);
  }
}

}  // namespace

int fill_feedback(const FillFeedbackParams& p, Stream stream) {
  using L = FillFeedbackLaunch;
  L l{p, ceil_div(p.columns, L::tile_columns), 0, false};
  l.tiles = l.strips * ceil_div(p.classes, L::tile_rows);
  if (l.tiles == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(min(l.tiles, most_blocks)));
  cudaError_t code = cudaSuccess;
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int64_t alignment = alignof(Four<T>);
    l.whole = reinterpret_cast<uintptr_t>(p.out) % alignment == 0 &&
              p.out_row * static_cast<int64_t>(sizeof(T)) % alignment == 0;
    code = launch(fill_feedback_kernel<T>, grid, dim3(L::across * L::down), 0, stream, l);
  });
  return code;
}

}  // namespace fastdfa::cuda
