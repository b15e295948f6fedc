// The vector functions against libm in double, on a grid: the forward kernel and, with a signal of
// one, the gate.
#include <limits>
#include <vector>

#include "check.h"

using namespace fastdfa;

constexpr int64_t grid = 200003;  // odd, so that the last vector is not full
constexpr double param = 1.25;

static float point(int64_t i) { return static_cast<float>(40.0 * i / (grid - 1) - 20.0); }

static double forward(Activation kind, double x) {
  double y = 0;
  dispatch_activation(kind, [&](auto k) {
    if constexpr (derivative_from_output(k.value)) y = activate<k.value>(x, param);
  });
  return y;
}

static double slope(Activation kind, double saved) {
  double y = 0;
  dispatch_activation(kind, [&](auto k) { y = derivative<k.value>(saved, param); });
  return y;
}

static void forward_kernel(const CpuKernels& kernels, const char* capability, Activation kind) {
  std::vector<float> x(grid + 1, -1.f);
  for (int64_t i = 0; i < grid; ++i) x[i] = point(i);
  const ActivateParams p{x.data(),       nullptr,        grid, grid,
                         DType::float32, DType::float32, kind, param};
  each_task(7, [&](int64_t part, int64_t) {
    kernels.activate(p, grid * part / 7, grid * (part + 1) / 7);
  });
  for (int64_t i = 0; i < grid; ++i) {
    const double want = forward(kind, point(i));
    // softplus: the rounding of param * x is a relative error of the result where x < 0.
    const double error = kind == Activation::softplus ? 1e-7 * std::abs(param * point(i)) : 0;
    CHECK(std::abs(x[i] - want) <= (4e-7 + error) * std::abs(want),
          "%s: kind %d at %.9g is %.9g, not %.9g", capability, int(kind), point(i), x[i], want);
  }
  CHECK(x[grid] == -1.f, "%s: kind %d wrote after the end", capability, int(kind));

  float nan = std::numeric_limits<float>::quiet_NaN();
  kernels.activate({&nan, nullptr, 1, 1, DType::float32, DType::float32, kind, param}, 0, 1);
  CHECK(std::isnan(nan), "%s: kind %d swallows NaN", capability, int(kind));
}

static void gate_kernel(const CpuKernels& kernels, const char* capability, Activation kind) {
  std::vector<float> one(grid, 1.f), saved(grid), delta(grid), bias(grid);
  for (int64_t i = 0; i < grid; ++i)
    saved[i] =
        static_cast<float>(derivative_from_output(kind) ? forward(kind, point(i)) : point(i));
  const GateParams p{one.data(), saved.data(), delta.data(),   bias.data(), grid, grid,
                     1,          grid,         DType::float32, kind,        param};
  each_task(gate_tasks(p), [&](int64_t task, int64_t) { kernels.gate(p, task, task + 1); });
  for (int64_t i = 0; i < grid; ++i) {
    // gelu_tanh: 1 - tanh^2 cancels, times a polynomial of up to 9; PyTorch has the same error.
    const double want = slope(kind, saved[i]), error = kind == Activation::gelu_tanh ? 3e-6 : 1e-6;
    CHECK(std::abs(delta[i] - want) <= error, "%s: derivative of kind %d at %.9g is %.9g, not %.9g",
          capability, int(kind), saved[i], delta[i], want);
    CHECK(bias[i] == delta[i], "%s: kind %d: column sum of one row", capability, int(kind));
  }
}

int main() {
  for_each_capability([](const CpuKernels& kernels, const char* name) {
    for (int kind = 0; kind < activation_count; ++kind) {
      if (derivative_from_output(Activation(kind))) forward_kernel(kernels, name, Activation(kind));
      gate_kernel(kernels, name, Activation(kind));
    }
  });
  CHECK(slope(Activation::relu, 0) == 0, "relu'(0)");
  CHECK(slope(Activation::leaky_relu, 0) == param, "leaky_relu'(0)");
  CHECK(slope(Activation::elu, 0) == param, "elu'(0)");
}
