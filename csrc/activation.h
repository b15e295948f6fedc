// The activations and their derivatives, for T = float, double, or a SIMD vector of either.
// Edge cases are PyTorch's: relu'(0) = 0, leaky_relu'(0) = slope, elu'(0) = alpha; NaN propagates.
#pragma once

#include "scalar.h"

namespace fastdfa {

enum class Activation : int {
  // The derivative is a function of the output, so nothing but the output is saved.
  identity,
  relu,
  leaky_relu,  // param: slope of the negative side, >= 0, so that the output keeps the sign
  tanh,
  sigmoid,
  elu,       // param: alpha >= 0
  softplus,  // param: beta > 0
  // The derivative is a function of the input.
  gelu,
  gelu_tanh,
  silu,
};
constexpr int activation_count = 10;

constexpr bool derivative_from_output(Activation kind) { return kind < Activation::gelu; }
// Made of a few multiplications and comparisons.
constexpr bool derivative_is_cheap(Activation kind) { return kind < Activation::softplus; }

template <Activation kind> struct Kind {
  static constexpr Activation value = kind;
};

// Calls f(Kind<kind>()), so that the choice is made outside the inner loops.
template <class F> FASTDFA_INLINE void dispatch_activation(Activation kind, F&& f) {
  switch (kind) {
    case Activation::identity:
      return f(Kind<Activation::identity>());
    case Activation::relu:
      return f(Kind<Activation::relu>());
    case Activation::leaky_relu:
      return f(Kind<Activation::leaky_relu>());
    case Activation::tanh:
      return f(Kind<Activation::tanh>());
    case Activation::sigmoid:
      return f(Kind<Activation::sigmoid>());
    case Activation::elu:
      return f(Kind<Activation::elu>());
    case Activation::softplus:
      return f(Kind<Activation::softplus>());
    case Activation::gelu:
      return f(Kind<Activation::gelu>());
    case Activation::gelu_tanh:
      return f(Kind<Activation::gelu_tanh>());
    case Activation::silu:
      return f(Kind<Activation::silu>());
  }
}

template <class T> FASTDFA_INLINE T sigmoid(T x) { return T(1) / (T(1) + exp(-x)); }

// ln(1 + e^x) without overflow, as e^-|x| is at most 1; x itself from 20 on, as in PyTorch.
template <class T> FASTDFA_INLINE T log1p_exp(T x) {
  const T y = select(x <= T(0), T(0), x) + log1p(exp(select(x > T(0), -x, x)));
  return select(x > T(20), x, y);
}

// f(x), for the kinds whose derivative is a function of the output.
template <Activation kind, class T> FASTDFA_INLINE T activate(T x, [[maybe_unused]] T param) {
  static_assert(derivative_from_output(kind));
  if constexpr (kind == Activation::relu) return select(x <= T(0), T(0), x);
  if constexpr (kind == Activation::leaky_relu) return select(x > T(0), x, param * x);
  if constexpr (kind == Activation::tanh) return tanh(x);
  if constexpr (kind == Activation::sigmoid) return sigmoid(x);
  if constexpr (kind == Activation::elu) return select(x > T(0), x, param * expm1(x));
  if constexpr (kind == Activation::softplus) return log1p_exp(param * x) / param;
  return x;
}

// f'(a), computed from s = f(a), or from s = a where derivative_from_output(kind) is false.
template <Activation kind, class T>
FASTDFA_INLINE T derivative([[maybe_unused]] T s, [[maybe_unused]] T param) {
  if constexpr (kind == Activation::relu) return select(s <= T(0), T(0), T(1));
  if constexpr (kind == Activation::leaky_relu) return select(s <= T(0), param, T(1));
  if constexpr (kind == Activation::tanh) return T(1) - s * s;
  if constexpr (kind == Activation::sigmoid) return s * (T(1) - s);
  if constexpr (kind == Activation::elu) return select(s <= T(0), s + param, T(1));
  // sigmoid(beta a) = 1 - e^(-beta h); expm1 keeps it accurate where h is small.
  if constexpr (kind == Activation::softplus) return -expm1(-(param * s));
  if constexpr (kind == Activation::gelu) {
    const T density = T(0.39894228040143268) * exp(T(-0.5) * s * s);
    return normal_cdf(s) + s * density;
  }
  if constexpr (kind == Activation::gelu_tanh) {
    const T k = T(0.79788456080286536), c = T(0.044715);
    const T t = tanh(k * s * (T(1) + c * s * s));
    return T(0.5) * (T(1) + t) + T(0.5) * s * (T(1) - t * t) * k * (T(1) + T(3) * c * s * s);
  }
  if constexpr (kind == Activation::silu) {
    const T y = sigmoid(s);
    return y * (T(1) + s * (T(1) - y));
  }
  return T(1);
}

}  // namespace fastdfa
