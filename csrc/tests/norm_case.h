// Batch and layer norm in double, by plain loops: what the kernels of both devices must come to.
#pragma once

#include <vector>

#include "batch_norm.h"
#include "check.h"

namespace fastdfa {

constexpr double norm_eps = 1e-3, norm_momentum = 0.25;

// A norm of `lines` lines of `length` numbers each: columns of a batch norm, rows of a layer norm.
// `number(line, i)` is a, `delta(line, i)` the gradient of the output.
struct Line {
  double mean = 0, variance = 0, rstd = 0;

  template <class F> static Line of(int64_t length, const F& a) {
    Line l;
    for (int64_t i = 0; i < length; ++i) l.mean += a(i) / length;
    for (int64_t i = 0; i < length; ++i) l.variance += (a(i) - l.mean) * (a(i) - l.mean) / length;
    l.rstd = 1 / std::sqrt(l.variance + norm_eps);
    return l;
  }

  double normalised(double a) const { return (a - mean) * rstd; }

  // The gradient of a(i), where g(i) is that of the normalised number.
  template <class F, class G>
  double gradient(int64_t length, int64_t i, const F& a, const G& g) const {
    double center = 0, slope = 0;
    for (int64_t k = 0; k < length; ++k)
      center += g(k) / length, slope += g(k) * normalised(a(k)) / length;
    return (g(i) - center - normalised(a(i)) * slope) * rstd;
  }
};

inline double activated(Activation kind, double x, double param) {
  double y = 0;
  dispatch_activation(kind, [&](auto k) {
    if constexpr (derivative_from_output(k.value)) y = activate<k.value>(x, param);
  });
  return y;
}

}  // namespace fastdfa
