// Words shared by every kernel: element types, accumulation types, inlining. Free of torch and of
// the standard library, because kernel files are compiled once per CPU capability: a function that
// the linker could merge between two of them might run AVX-512 code on a processor that has none.
// So everything here is a type, or is inlined by force.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTDFA_INLINE __host__ __device__ __forceinline__
#else
#define FASTDFA_INLINE inline __attribute__((always_inline))
#endif

namespace fastdfa {

// Storage of the 16-bit types; arithmetic is done in float.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

enum class DType : int { float32, float64, bfloat16, float16 };

// Products and sums are accumulated in float, in double for double.
template <class T> struct AccumulatorOf {
  using type = float;
};
template <> struct AccumulatorOf<double> {
  using type = double;
};
template <class T> using Accumulator = typename AccumulatorOf<T>::type;

template <class T> struct Type {
  using type = T;
};

// Calls f(Type<T>()) with the element type that `dtype` names.
template <class F> FASTDFA_INLINE void dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32:
      return f(Type<float>());
    case DType::float64:
      return f(Type<double>());
    case DType::bfloat16:
      return f(Type<bfloat16>());
    case DType::float16:
      return f(Type<float16>());
  }
}

// Sets numbers to zero. Of no numbers the address may be null, which memset must not be given.
template <class T> FASTDFA_INLINE void clear(T* numbers, int64_t count) {
  if (count > 0) __builtin_memset(numbers, 0, count * sizeof(T));
}

FASTDFA_INLINE constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
FASTDFA_INLINE constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
FASTDFA_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTDFA_INLINE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace fastdfa
