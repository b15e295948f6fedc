// What the kernels use of CUDA, in one place: conversions, 16-byte packs, asynchronous copies,
// matrix instructions, launches. A plain C++ compiler takes csrc/tests/cuda_emulator.h in CUDA's
// place, which runs the same source on the CPU, thread by thread, for tests.
#pragma once

#include "../common.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "../tests/cuda_emulator.h"
#endif

namespace fastdfa::cuda {

// Kernel parameters by value, read from constant memory: up to 32 KB from CUDA 12.1 on.
#define FASTDFA_PARAMS const __grid_constant__

#ifdef __CUDACC__

FASTDFA_INLINE void* shared_memory() {
#ifdef __CUDA_ARCH__
  extern __shared__ __align__(128) unsigned char fastdfa_shared[];
  return fastdfa_shared;
#else
  return nullptr;
#endif
}

// Makes the compiler forget how x came about: what depends on it is computed again where it is next
// needed, instead of being kept in registers.
__device__ __forceinline__ void forget(int64_t& x) { asm volatile("" : "+l"(x)); }

// -- conversions
// -----------------------------------------------------------------------------------

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(bfloat16 x) {
  return __uint_as_float(uint32_t{x.bits} << 16);
}
__device__ __forceinline__ float widen(float16 x) { return __half2float(__ushort_as_half(x.bits)); }

// Rounds to nearest even.
__device__ __forceinline__ void narrow(float x, float& y) { y = x; }
__device__ __forceinline__ void narrow(double x, double& y) { y = x; }
__device__ __forceinline__ void narrow(float x, bfloat16& y) {
  y.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
__device__ __forceinline__ void narrow(float x, float16& y) {
  y.bits = __half_as_ushort(__float2half_rn(x));
}

// -- asynchronous copies into shared memory
// ---------------------------------------------------------

// Copies 16 bytes, or fills them with zeros where !valid (`from` is then not read).
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }
// Waits until at most `pending` of this thread's commits are outstanding.
template <int pending> __device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// -- matrix instructions of a warp
// -------------------------------------------------------------------

// Four 8x8 matrices of 16-bit elements; lane i names row i mod 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}

#define FASTDFA_MMA(shape, types)                                                     \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." types                        \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
// d [16, 8] += a [16, k] b [k, 8]; k = 16 for the 16-bit types, 8 for float, rounded to tf32.
template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void multiply_add<bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                       const uint32_t (&b)[2]) {
  FASTDFA_MMA("m16n8k16", "bf16.bf16");
}
template <>
__device__ __forceinline__ void multiply_add<float16>(float (&d)[4], const uint32_t (&a)[4],
                                                      const uint32_t (&b)[2]) {
  FASTDFA_MMA("m16n8k16", "f16.f16");
}
template <>
__device__ __forceinline__ void multiply_add<float>(float (&d)[4], const uint32_t (&a)[4],
                                                    const uint32_t (&b)[2]) {
  FASTDFA_MMA("m16n8k8", "tf32.tf32");
}
#undef FASTDFA_MMA

__device__ __forceinline__ uint32_t round_to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// -- launches
// ----------------------------------------------------------------------------------------

// What every processor from sm_80 on lends a block: sm_86 has no more. The limit of a kernel is one
// for all threads of the process, and so the same for all its launches.
constexpr size_t most_shared_bytes = 99 * 1024;

template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, const std::type_identity_t<Params>& params) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t code = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most_shared_bytes));
    if (code != cudaSuccess) return code;
  }
  kernel<<<grid, block, shared_bytes, stream>>>(params);
  return cudaGetLastError();
}

#endif  // __CUDACC__

// -- packs of 16 bytes
// --------------------------------------------------------------------------------

template <class T> struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(T);
  T v[size];
};

// The columns [column, column + Pack::size) of a row, those from `columns` on as zero. `whole`: the
// row is aligned to 16 bytes and ends with a whole pack.
template <class T>
__device__ __forceinline__ Pack<T> load_pack(const T* row, int64_t column, int64_t columns,
                                             bool whole) {
  Pack<T> pack{};
  if (whole) {
    if (column < columns) pack = *reinterpret_cast<const Pack<T>*>(row + column);
  } else {
#pragma unroll
    for (int i = 0; i < Pack<T>::size; ++i)
      if (column + i < columns) pack.v[i] = row[column + i];
  }
  return pack;
}

template <class T>
__device__ __forceinline__ void store_pack(T* row, int64_t column, int64_t columns, bool whole,
                                           const Pack<T>& pack) {
  if (whole) {
    if (column < columns) *reinterpret_cast<Pack<T>*>(row + column) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < Pack<T>::size; ++i)
      if (column + i < columns) row[column + i] = pack.v[i];
  }
}

// Whether a matrix of rows of `columns` elements may be accessed by whole packs.
template <class T>
FASTDFA_INLINE bool whole_packs(const void* data, int64_t row_stride, int64_t columns) {
  constexpr int64_t size = 16 / sizeof(T);
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_stride % size == 0 &&
         columns % size == 0;
}

// Most blocks of a launch: more work is done in a loop.
constexpr int64_t most_blocks = int64_t{1} << 30;

}  // namespace fastdfa::cuda
