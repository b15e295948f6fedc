// The elementary functions that activation.h and philox.h are written in, for one number on host or
// device. cpu/vec_math.h has the same names for a SIMD vector; argument-dependent lookup chooses.
#pragma once

#include <math.h>

#include "common.h"

namespace fastdfa {

template <class T> FASTDFA_INLINE T select(bool condition, T yes, T no) {
  return condition ? yes : no;
}

FASTDFA_INLINE float to_real(uint32_t x, float) { return static_cast<float>(x); }
FASTDFA_INLINE double to_real(uint32_t x, double) { return static_cast<double>(x); }

FASTDFA_INLINE float exp(float x) { return ::expf(x); }
FASTDFA_INLINE double exp(double x) { return ::exp(x); }
FASTDFA_INLINE float expm1(float x) { return ::expm1f(x); }
FASTDFA_INLINE double expm1(double x) { return ::expm1(x); }
FASTDFA_INLINE float log(float x) { return ::logf(x); }
FASTDFA_INLINE double log(double x) { return ::log(x); }
FASTDFA_INLINE float log1p(float x) { return ::log1pf(x); }
FASTDFA_INLINE double log1p(double x) { return ::log1p(x); }
FASTDFA_INLINE float sqrt(float x) { return ::sqrtf(x); }
FASTDFA_INLINE double sqrt(double x) { return ::sqrt(x); }
FASTDFA_INLINE float tanh(float x) { return ::tanhf(x); }
FASTDFA_INLINE double tanh(double x) { return ::tanh(x); }

// Distribution function of N(0, 1).
FASTDFA_INLINE float normal_cdf(float x) { return 0.5f * ::erfcf(x * -0.707106781f); }
FASTDFA_INLINE double normal_cdf(double x) { return 0.5 * ::erfc(x * -0.70710678118654752); }

// Sine and cosine of 2 pi x.
#ifdef __CUDA_ARCH__
FASTDFA_INLINE void sincos_2pi(float x, float& sine, float& cosine) {
  ::sincospif(2 * x, &sine, &cosine);
}
FASTDFA_INLINE void sincos_2pi(double x, double& sine, double& cosine) {
  ::sincospi(2 * x, &sine, &cosine);
}
#else
FASTDFA_INLINE void sincos_2pi(float x, float& sine, float& cosine) {
  sine = ::sinf(6.28318531f * x);
  cosine = ::cosf(6.28318531f * x);
}
FASTDFA_INLINE void sincos_2pi(double x, double& sine, double& cosine) {
  sine = ::sin(6.2831853071795865 * x);
  cosine = ::cos(6.2831853071795865 * x);
}
#endif

}  // namespace fastdfa
