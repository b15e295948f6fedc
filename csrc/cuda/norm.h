// What the norms share: sums over a line, which is a column of a batch norm and a row of a layer
// norm, by the threads of a block that have it together.
#pragma once

#include "device.h"

namespace fastdfa::cuda {

// The kernels' launch bounds name a least number of blocks: without one, ptxas of CUDA 13.0 takes
// fewer registers than there are, and spills.

// The threads that share a line. Their entries in shared memory lie `stride` apart from `first` on.
struct Team {
  int first, stride;
  int index, size;  // of the thread; size: a power of two, the same for all teams of a block
};

// The sum of what the threads of each team have, in a fixed order. All threads of the block call
// it.
template <class A> __device__ __forceinline__ A sum_of_team(const Team& team, A value) {
  A* const sums = static_cast<A*>(shared_memory()) + team.first;
  __syncthreads();  // the sum before has been read
  sums[team.index * team.stride] = value;
  for (int half = team.size / 2; half > 0; half /= 2) {
    __syncthreads();
    if (team.index < half)
      sums[team.index * team.stride] += sums[(team.index + half) * team.stride];
  }
  __syncthreads();
  return sums[0];
}

// The sum of f(i) over a line of that length; it may be 0 for teams without a line.
template <class A, class F>
__device__ __forceinline__ A sum_over(const Team& team, int64_t length, F&& f) {
  A sum = 0;
#pragma unroll 4
  for (int64_t i = team.index; i < length; i += team.size) sum += f(i);
  return sum_of_team(team, sum);
}

template <class A> struct Statistics {
  A mean, variance;
};

// Of a(0), a(1), ...: of what is left of them without the first, so that a mean that is large
// beside the deviation takes nothing of its precision.
template <class A, class F>
__device__ __forceinline__ Statistics<A> find_statistics(const Team& team, int64_t length, F&& a) {
  const A first = length > 0 ? a(0) : A(0), inverse = A(1) / static_cast<A>(max(length, 1));
  const A shifted = inverse * sum_over<A>(team, length, [&](int64_t i) { return a(i) - first; });
  const A variance = inverse * sum_over<A>(team, length, [&](int64_t i) {
                       const A d = a(i) - first - shifted;
                       return d * d;
                     });
  return {first + shifted, variance};
}

// What is per column or row, or `otherwise` where there is none.
template <class A> __device__ __forceinline__ A value_or(const void* p, int64_t i, A otherwise) {
  return p ? static_cast<const A*>(p)[i] : otherwise;
}

}  // namespace fastdfa::cuda
