// The functions of scalar.h for vectors. float: polynomials, 1 to 3 units in the last place
// (torch's own tanh costs 2.5 to 3.4 ns an element on AMD processors, the one here 0.35). double:
// libm for each lane, as double is for verification.
#pragma once

#include "../scalar.h"
#include "vec.h"

namespace fastdfa::FASTDFA_CPU {

FASTDFA_INLINE Vec<float> to_real(Vec<uint32_t> x, Vec<float>) {  // x < 2^31
  return __builtin_convertvector((Vec<int32_t>::Raw)x.raw, Vec<float>::Raw);
}

FASTDFA_INLINE Vec<float> sqrt(Vec<float> x) {
#if defined(__AVX512F__)
  return (Vec<float>::Raw)_mm512_sqrt_ps((__m512)x.raw);
#elif defined(__AVX2__)
  return (Vec<float>::Raw)_mm256_sqrt_ps((__m256)x.raw);
#elif defined(__SSE2__)
  return (Vec<float>::Raw)_mm_sqrt_ps((__m128)x.raw);
#else
  for (int i = 0; i < x.size; ++i) x.raw[i] = fastdfa::sqrt(x.raw[i]);
  return x;
#endif
}

// Clamp that lets NaN through.
FASTDFA_INLINE Vec<float> clamp(Vec<float> x, float least, float most) {
  x = select(x < Vec<float>(least), Vec<float>(least), x);
  return select(x > Vec<float>(most), Vec<float>(most), x);
}

// Adding it rounds |x| < 2^22 to an integer, which is then in the low bits.
constexpr float rounder = 0x1.8p23f;

// x = n ln 2 + r with |r| <= ln(2)/2: returns e^r - 1, and n as the low bits of a float.
// Polynomial of Cephes expf.
FASTDFA_INLINE Vec<float> reduced_expm1(Vec<float> x, Vec<float>& n_bits) {
  using V = Vec<float>;
  n_bits = x * V(1.44269504f) + V(rounder);
  const V n = n_bits - V(rounder);
  const V r = x - n * V(0.693359375f) + n * V(2.12194440e-4f);
  V p = V(1.9875691500e-4f);
  p = p * r + V(1.3981999507e-3f);
  p = p * r + V(8.3334519073e-3f);
  p = p * r + V(4.1665795894e-2f);
  p = p * r + V(1.6666665459e-1f);
  p = p * r + V(5.0000001201e-1f);
  return p * (r * r) + r;
}

// 2^n, -126 <= n <= 127.
FASTDFA_INLINE Vec<float> exp2_of_bits(Vec<uint32_t> n) {
  return bit_cast<float>(Vec<uint32_t>((n.raw + 127u) << 23));
}

FASTDFA_INLINE Vec<float> exp(Vec<float> x) {
  using V = Vec<float>;
  V n_bits;
  const V y = reduced_expm1(clamp(x, -104.f, 89.f), n_bits) + V(1);
#if defined(__AVX512F__)
  return (V::Raw)_mm512_scalef_ps((__m512)y.raw, (__m512)(n_bits - V(rounder)).raw);
#else
  // In two steps, as n runs from -150 to 128.
  const Vec<int32_t>::Raw n = (Vec<int32_t>::Raw)(n_bits.raw) << 10 >> 10;
  const Vec<int32_t>::Raw half = n >> 1;
  return y * exp2_of_bits((Vec<uint32_t>::Raw)half) * exp2_of_bits((Vec<uint32_t>::Raw)(n - half));
#endif
}

// Accurate relative to the result also where x is small: there n = 0, and nothing cancels.
FASTDFA_INLINE Vec<float> expm1(Vec<float> x) {
  using V = Vec<float>;
  V n_bits;
  const V p = reduced_expm1(clamp(x, -30.f, 89.f), n_bits);
  // n may be 128, so scale by 2^(n-1) and double.
  const V scale = exp2_of_bits(bit_cast<uint32_t>(n_bits) - Vec<uint32_t>(1u));
  const V y = scale * p + (scale - V(0.5f));
  return y + y;
}

FASTDFA_INLINE Vec<float> tanh(Vec<float> x) {
  using V = Vec<float>;
  const V y = clamp(x, -9.02f, 9.02f);  // tanh(9.02) = 1 - 2.9e-8 rounds to 1
  V n_bits;
  const V p = reduced_expm1(y + y, n_bits);
  const V scale = exp2_of_bits(bit_cast<uint32_t>(n_bits));
  const V z = scale * p + (scale - V(1));
  return z / (z + V(2));
}

// Normal, finite, positive x. Polynomial of Cephes logf.
FASTDFA_INLINE Vec<float> log(Vec<float> x) {
  using V = Vec<float>;
  // x = m 2^e with m in [sqrt(1/2), sqrt(2))
  const Vec<uint32_t>::Raw bits = bit_cast<uint32_t>(x).raw - 0x3F3504F3u;
  const V e = __builtin_convertvector((Vec<int32_t>::Raw)bits >> 23, V::Raw);
  const V z = bit_cast<float>(Vec<uint32_t>((bits & 0x007FFFFFu) + 0x3F3504F3u)) - V(1);
  V p = V(7.0376836292e-2f);
  p = p * z - V(1.1514610310e-1f);
  p = p * z + V(1.1676998740e-1f);
  p = p * z - V(1.2420140846e-1f);
  p = p * z + V(1.4249322787e-1f);
  p = p * z - V(1.6668057665e-1f);
  p = p * z + V(2.0000714765e-1f);
  p = p * z - V(2.4999993993e-1f);
  p = p * z + V(3.3333331174e-1f);
  const V z2 = z * z;
  const V y = p * (z2 * z) - e * V(2.12194440e-4f) - V(0.5f) * z2;
  return z + y + e * V(0.693359375f);
}

// 0 <= x <= 1. The error of rounding 1 + x to u is repaired by the factor x / (u - 1).
FASTDFA_INLINE Vec<float> log1p(Vec<float> x) {
  using V = Vec<float>;
  const V u = x + V(1);
  const V d = u - V(1);
  return select(d == V(0), x, log(u) * (x / d));
}

// Distribution function of N(0, 1), to 1e-7: Abramowitz and Stegun 7.1.26 (1.5e-7 for erf).
FASTDFA_INLINE Vec<float> normal_cdf(Vec<float> x) {
  using V = Vec<float>;
  const V magnitude = select(x < V(0), -x, x);
  const V t = V(1) / (V(1) + V(0.3275911f * 0.707106781f) * magnitude);
  V p = V(0.5f * 1.061405429f);
  p = p * t - V(0.5f * 1.453152027f);
  p = p * t + V(0.5f * 1.421413741f);
  p = p * t - V(0.5f * 0.284496736f);
  p = p * t + V(0.5f * 0.254829592f);
  const V tail = p * t * exp(V(-0.5f) * x * x);
  return select(x < V(0), tail, V(1) - tail);
}

// Sine and cosine of 2 pi x, 0 <= x <= 1. Polynomials of Cephes sinf and cosf; the reduction to an
// eighth of a turn is exact.
FASTDFA_INLINE void sincos_2pi(Vec<float> x, Vec<float>& sine, Vec<float>& cosine) {
  using V = Vec<float>;
  const V quarter_bits = V(4) * x + V(rounder);
  const V t = (x - V(0.25f) * (quarter_bits - V(rounder))) * V(6.28318531f);
  const V z = t * t;
  V s = V(-1.9515295891e-4f);
  s = s * z + V(8.3321608736e-3f);
  s = s * z - V(1.6666654611e-1f);
  s = s * (z * t) + t;
  V c = V(2.443315711809948e-5f);
  c = c * z - V(1.388731625493765e-3f);
  c = c * z + V(4.166664568298827e-2f);
  c = c * (z * z) - V(0.5f) * z + V(1);
  const Vec<uint32_t>::Raw quarter = bit_cast<uint32_t>(quarter_bits).raw;
  const Vec<uint32_t> sine_sign = (quarter & 2u) << 30;
  const Vec<uint32_t> cosine_sign = ((quarter + 1u) & 2u) << 30;
  const V::Mask odd = (quarter & 1u) != 0u;
  sine = bit_cast<float>(bit_cast<uint32_t>(select(odd, c, s)) ^ sine_sign);
  cosine = bit_cast<float>(bit_cast<uint32_t>(select(odd, s, c)) ^ cosine_sign);
}

#define FASTDFA_BY_LANE(function)                                                                 \
  FASTDFA_INLINE Vec<double> function(Vec<double> x) {                                            \
    for (int i = 0; i < x.size; ++i) x.raw[i] = fastdfa::function(static_cast<double>(x.raw[i])); \
    return x;                                                                                     \
  }
FASTDFA_BY_LANE(sqrt)
FASTDFA_BY_LANE(exp)
FASTDFA_BY_LANE(expm1)
FASTDFA_BY_LANE(log1p)
FASTDFA_BY_LANE(tanh)
FASTDFA_BY_LANE(normal_cdf)
#undef FASTDFA_BY_LANE

}  // namespace fastdfa::FASTDFA_CPU
