// A SIMD vector of the width of one CPU capability, in GCC's and clang's vector extensions, with
// intrinsics where those compile badly. FASTDFA_CPU (baseline, avx2, avx512) names the namespace,
// so that the linker never merges code compiled for different processors.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
// GCC 12 warns about the deliberately undefined operands in its own header (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpragmas"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "../common.h"

namespace fastdfa::FASTDFA_CPU {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

// One specialisation for each type, as GCC 12 takes T __attribute__((vector_size)) in a template
// for T.
template <class T> struct RawVector;
#define FASTDFA_RAW_VECTOR(T)                                  \
  template <> struct RawVector<T> {                            \
    typedef T type __attribute__((vector_size(vector_bytes))); \
  };
FASTDFA_RAW_VECTOR(float)
FASTDFA_RAW_VECTOR(double)
FASTDFA_RAW_VECTOR(int32_t)
FASTDFA_RAW_VECTOR(uint32_t)
FASTDFA_RAW_VECTOR(uint64_t)
#undef FASTDFA_RAW_VECTOR

template <class T> struct Vec {
  using Raw = typename RawVector<T>::type;
  using Mask = decltype(Raw{} < Raw{});  // lanes of 0 or -1
  static constexpr int size = vector_bytes / sizeof(T);

  Raw raw;

  Vec() = default;
  FASTDFA_INLINE Vec(Raw r) : raw(r) {}
  FASTDFA_INLINE Vec(T scalar) : raw(scalar - Raw{}) {}

  friend FASTDFA_INLINE Vec operator+(Vec a, Vec b) { return a.raw + b.raw; }
  friend FASTDFA_INLINE Vec operator-(Vec a, Vec b) { return a.raw - b.raw; }
  friend FASTDFA_INLINE Vec operator*(Vec a, Vec b) { return a.raw * b.raw; }
  friend FASTDFA_INLINE Vec operator/(Vec a, Vec b) { return a.raw / b.raw; }
  friend FASTDFA_INLINE Vec operator^(Vec a, Vec b) { return a.raw ^ b.raw; }
  friend FASTDFA_INLINE Vec operator-(Vec a) { return -a.raw; }
  friend FASTDFA_INLINE Vec operator>>(Vec a, int bits) { return a.raw >> bits; }
  friend FASTDFA_INLINE Mask operator<(Vec a, Vec b) { return a.raw < b.raw; }
  friend FASTDFA_INLINE Mask operator>(Vec a, Vec b) { return a.raw > b.raw; }
  friend FASTDFA_INLINE Mask operator<=(Vec a, Vec b) { return a.raw <= b.raw; }
  friend FASTDFA_INLINE Mask operator==(Vec a, Vec b) { return a.raw == b.raw; }
  friend FASTDFA_INLINE Vec select(Mask mask, Vec yes, Vec no) { return mask ? yes.raw : no.raw; }
};

// The same bits, other lanes.
template <class T, class S> FASTDFA_INLINE Vec<T> bit_cast(Vec<S> v) {
  return (typename Vec<T>::Raw)v.raw;
}

// -- conversion of the 16-bit types, half a vector of them to and from a vector of float ---------

typedef uint16_t Half __attribute__((vector_size(vector_bytes / 2)));

FASTDFA_INLINE Vec<float> widen(Half h, bfloat16) {
  return bit_cast<float>(Vec<uint32_t>(__builtin_convertvector(h, Vec<uint32_t>::Raw) << 16));
}

// Rounds to nearest even; every NaN becomes the quiet one, as in PyTorch.
FASTDFA_INLINE Half narrow(Vec<float> v, bfloat16) {
  const Vec<uint32_t>::Raw bits = bit_cast<uint32_t>(v).raw;
  const Vec<uint32_t>::Raw rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const Vec<uint32_t>::Raw quiet = Vec<uint32_t>(0x7FC0u).raw;
  return __builtin_convertvector(v.raw == v.raw ? rounded : quiet, Half);
}

FASTDFA_INLINE Vec<float> widen(Half h, float16) {
#if defined(__AVX512F__)
  return (Vec<float>::Raw)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  return (Vec<float>::Raw)_mm256_cvtph_ps((__m128i)h);
#else
  // After F. Giesen, "Half to float done quick": move the exponent's bias by 112; infinity and NaN
  // by 112 more; subnormals through a subtraction that normalises them.
  const Vec<uint32_t>::Raw bits = __builtin_convertvector(h, Vec<uint32_t>::Raw);
  const Vec<uint32_t>::Raw magnitude = (bits & 0x7FFFu) << 13;
  const Vec<uint32_t>::Raw exponent = magnitude & 0x0F800000u;
  const Vec<uint32_t>::Raw normal = magnitude + (112u << 23);
  const Vec<uint32_t>::Raw special = magnitude + (224u << 23);
  const Vec<float> least = bit_cast<float>(Vec<uint32_t>(113u << 23));
  const Vec<uint32_t> subnormal =
      bit_cast<uint32_t>(bit_cast<float>(Vec<uint32_t>(magnitude + (113u << 23))) - least);
  const Vec<uint32_t>::Raw value =
      exponent == 0x0F800000u ? special : (exponent == 0u ? subnormal.raw : normal);
  return bit_cast<float>(Vec<uint32_t>(value | ((bits & 0x8000u) << 16)));
#endif
}

FASTDFA_INLINE Half narrow(Vec<float> v, float16) {
#if defined(__AVX512F__)
  return (Half)_mm512_cvtps_ph((__m512)v.raw, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (Half)_mm256_cvtps_ph((__m256)v.raw, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  // The same in the other direction, rounding to nearest even.
  const Vec<uint32_t>::Raw bits = bit_cast<uint32_t>(v).raw;
  const Vec<uint32_t>::Raw magnitude = bits & 0x7FFFFFFFu;
  const Vec<uint32_t> shift = Vec<uint32_t>(126u << 23);  // 2^-1, whose last bit is 2^-24
  const Vec<uint32_t> subnormal =
      bit_cast<uint32_t>(bit_cast<float>(Vec<uint32_t>(magnitude)) + bit_cast<float>(shift)) -
      shift;
  const Vec<uint32_t>::Raw normal =
      (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  const Vec<uint32_t>::Raw infinite = Vec<uint32_t>(0x7C00u).raw;
  const Vec<uint32_t>::Raw quiet = Vec<uint32_t>(0x7E00u).raw;
  const Vec<uint32_t>::Raw special = magnitude > (255u << 23) ? quiet : infinite;
  const Vec<uint32_t>::Raw finite = magnitude < (113u << 23) ? subnormal.raw : normal;
  const Vec<uint32_t>::Raw value = magnitude >= (143u << 23) ? special : finite;
  return __builtin_convertvector(value | ((bits >> 16) & 0x8000u), Half);
#endif
}

// -- memory: any element type as a vector of its accumulation type --------------------------------

FASTDFA_INLINE Vec<float> load(const float* p) {
  Vec<float> v;
  __builtin_memcpy(&v.raw, p, sizeof v.raw);
  return v;
}
FASTDFA_INLINE Vec<double> load(const double* p) {
  Vec<double> v;
  __builtin_memcpy(&v.raw, p, sizeof v.raw);
  return v;
}
template <class T> FASTDFA_INLINE Vec<float> load(const T* p) {
  Half h;
  __builtin_memcpy(&h, p, sizeof h);
  return widen(h, T());
}

FASTDFA_INLINE void store(float* p, Vec<float> v) { __builtin_memcpy(p, &v.raw, sizeof v.raw); }
FASTDFA_INLINE void store(double* p, Vec<double> v) { __builtin_memcpy(p, &v.raw, sizeof v.raw); }
template <class T> FASTDFA_INLINE void store(T* p, Vec<float> v) {
  const Half h = narrow(v, T());
  __builtin_memcpy(p, &h, sizeof h);
}

// Which lanes a load or store touches; the others read as zero.
struct AllLanes {};
struct FirstLanes {
  int64_t count;
};

template <class T> FASTDFA_INLINE auto load(const T* p, AllLanes) { return load(p); }
template <class T> FASTDFA_INLINE auto load(const T* p, FirstLanes lanes) {
  T buffer[Vec<Accumulator<T>>::size] = {};
  __builtin_memcpy(buffer, p, lanes.count * sizeof(T));
  return load(static_cast<const T*>(buffer));
}
template <class T, class V> FASTDFA_INLINE void store(T* p, V v, AllLanes) { store(p, v); }
template <class T, class V> FASTDFA_INLINE void store(T* p, V v, FirstLanes lanes) {
  T buffer[V::size];
  store(buffer, v);
  __builtin_memcpy(p, buffer, lanes.count * sizeof(T));
}

// -- lanes of the generator ----------------------------------------------------------------------

// Low halves of 64-bit lanes: a 32 x 32 -> 64 bit product, which the extensions cannot express.
FASTDFA_INLINE Vec<uint64_t> wide_multiply(Vec<uint64_t> a, uint32_t b) {
  const Vec<uint64_t> factor(uint64_t{b});
#if defined(__AVX512F__)
  return (Vec<uint64_t>::Raw)_mm512_mul_epu32((__m512i)a.raw, (__m512i)factor.raw);
#elif defined(__AVX2__)
  return (Vec<uint64_t>::Raw)_mm256_mul_epu32((__m256i)a.raw, (__m256i)factor.raw);
#elif defined(__SSE2__)
  return (Vec<uint64_t>::Raw)_mm_mul_epu32((__m128i)a.raw, (__m128i)factor.raw);
#else
  return (a.raw & 0xFFFFFFFFu) * factor.raw;
#endif
}

// The low words of a and b in turn: a0 b0 a1 b1 ...
FASTDFA_INLINE Vec<uint32_t> interleave_words(Vec<uint64_t> a, Vec<uint64_t> b) {
  return bit_cast<uint32_t>(Vec<uint64_t>((a.raw & 0xFFFFFFFFu) | (b.raw << 32)));
}

// x0 y0 x1 y1 ... over two vectors.
FASTDFA_INLINE void interleave(Vec<float> x, Vec<float> y, Vec<float>& low, Vec<float>& high) {
#if defined(__AVX512F__)
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  low = (Vec<float>::Raw)_mm512_permutex2var_ps((__m512)x.raw, first, (__m512)y.raw);
  high = (Vec<float>::Raw)_mm512_permutex2var_ps((__m512)x.raw, second, (__m512)y.raw);
#elif defined(__AVX2__)
  const __m256 even = _mm256_unpacklo_ps((__m256)x.raw, (__m256)y.raw);
  const __m256 odd = _mm256_unpackhi_ps((__m256)x.raw, (__m256)y.raw);
  low = (Vec<float>::Raw)_mm256_permute2f128_ps(even, odd, 0x20);
  high = (Vec<float>::Raw)_mm256_permute2f128_ps(even, odd, 0x31);
#else
  low = Vec<float>::Raw{x.raw[0], y.raw[0], x.raw[1], y.raw[1]};
  high = Vec<float>::Raw{x.raw[2], y.raw[2], x.raw[3], y.raw[3]};
#endif
}

}  // namespace fastdfa::FASTDFA_CPU
