// batch_norm and layer_norm with their backward against plain loops in double, over awkward sizes
// and strides, from the last task to the first.
#include "guarded.h"
#include "norm_case.h"

using namespace fastdfa;

struct Case {
  int64_t rows, columns, gap;  // gap: columns between rows
  bool affine, training;
  Activation kind;
};

template <class T> constexpr DType name = sizeof(T) == 8 ? DType::float64 : DType::float32;

// Numbers that are large beside their deviations, where T can hold them.
template <class T> Guarded<T> numbers(int64_t count, int64_t seed, double offset = 0) {
  Guarded<T> made(count);
  for (int64_t i = 0; i < count; ++i) made[i] = static_cast<T>(number(1000003 * seed + i) + offset);
  return made;
}

static void check(double got, double want, double unit, const char* what, const char* capability,
                  const Case& c, int64_t r, int64_t j) {
  CHECK(std::abs(got - want) <= unit * (1 + std::abs(want)),
        "%s: %s of %d x %d, training %d [%d, %d] is %.9g, not %.9g", capability, what, int(c.rows),
        int(c.columns), int(c.training), int(r), int(j), got, want);
}

template <class T>
static void batch(const CpuKernels& kernels, const char* capability, const Case& c, double unit) {
  const int64_t n = c.columns, row = n + c.gap, size = max(0, (c.rows - 1) * row + n);
  const Guarded<T> a = numbers<T>(size, 1, 3), delta = numbers<T>(size, 2);
  const Guarded<T> before = numbers<T>(size, 2), weight = numbers<T>(n, 3);
  const Guarded<T> bias = numbers<T>(n, 4), h(c.rows * n), mean(n), rstd(n);
  const Guarded<T> running_mean = numbers<T>(n, 5), running_var = numbers<T>(n, 6, 2);
  const Guarded<T> sums(n), weight_grad(n), a_sums(n);
  const void *w = c.affine ? weight.data() : nullptr, *b = c.affine ? bias.data() : nullptr;
  const BatchNormParams p{
      a.data(),    h.data(), w,      b, running_mean.data(), running_var.data(), mean.data(),
      rstd.data(), row,      c.rows, n, c.training,          norm_momentum,      norm_eps,
      name<T>,     c.kind,   0.75};
  for (int64_t task = batch_norm_tasks(n); task-- > 0;) kernels.batch_norm(p, task, task + 1);
  for (int64_t j = 0; j < n; ++j) {
    sums[j] = 0;
    for (int64_t r = 0; r < c.rows; ++r) sums[j] += delta[r * row + j];
  }
  const BatchNormBackwardParams q{
      delta.data(),       sums.data(),   a.data(), mean.data(), rstd.data(), w,
      weight_grad.data(), a_sums.data(), row,      row,         c.rows,      n,
      c.training,         name<T>};
  kernels.batch_norm_backward(q, 0, batch_norm_tasks(n));

  for (int64_t j = 0; j < n; ++j) {
    const auto x = [&](int64_t r) { return double(a[r * row + j]); };
    const auto d = [&](int64_t r) { return double(before[r * row + j]); };
    Line line = Line::of(c.rows, x);
    if (c.training) {
      const double unbiased = line.variance * c.rows / (c.rows - 1), kept = 1 - norm_momentum;
      const double mean_before = static_cast<T>(number(1000003 * 5 + j));
      const double var_before = static_cast<T>(number(1000003 * 6 + j) + 2);
      check(running_mean[j], kept * mean_before + norm_momentum * line.mean, unit, "running mean",
            capability, c, 0, j);
      check(running_var[j], kept * var_before + norm_momentum * unbiased, unit, "running variance",
            capability, c, 0, j);
    } else {
      line = {running_mean[j], running_var[j], 1 / std::sqrt(running_var[j] + norm_eps)};
    }
    check(mean[j], line.mean, unit, "mean", capability, c, 0, j);
    check(rstd[j], line.rstd, unit, "rstd", capability, c, 0, j);
    const double scale = c.affine ? weight[j] : 1, offset = c.affine ? bias[j] : 0;
    double products = 0, total = 0;
    for (int64_t r = 0; r < c.rows; ++r) {
      const double right = activated(c.kind, line.normalised(x(r)) * scale + offset, 0.75);
      check(h[r * n + j], right, 10 * unit, "h", capability, c, r, j);
      const double grad = c.training
                              ? line.gradient(c.rows, r, x, [&](int64_t k) { return scale * d(k); })
                              : scale * d(r) * line.rstd;
      check(delta[r * row + j], grad, 30 * unit, "gradient", capability, c, r, j);
      products += d(r) * line.normalised(x(r)), total += grad;
    }
    check(weight_grad[j], products, unit * (10 + c.rows), "weight gradient", capability, c, 0, j);
    check(a_sums[j], total, unit * (10 + c.rows), "sum", capability, c, 0, j);
  }
}

template <class T>
static void layer(const CpuKernels& kernels, const char* capability, const Case& c, double unit) {
  const int64_t n = c.columns, row = n + c.gap, size = max(0, (c.rows - 1) * row + n);
  const int64_t chunks = layer_norm_chunks(c.rows);
  const Guarded<T> a = numbers<T>(size, 1, 3), delta = numbers<T>(size, 2);
  const Guarded<T> before = numbers<T>(size, 2), weight = numbers<T>(n, 3);
  const Guarded<T> bias = numbers<T>(n, 4), h(c.rows * n), mean(c.rows), rstd(c.rows);
  const Guarded<T> partial(2 * chunks * n), sum(2 * n);
  const void *w = c.affine ? weight.data() : nullptr, *b = c.affine ? bias.data() : nullptr;
  kernels.layer_norm({a.data(), h.data(), w, b, mean.data(), rstd.data(), row, c.rows, n, norm_eps,
                      name<T>, c.kind, 0.75},
                     0, c.rows);
  const LayerNormBackwardParams q{delta.data(),
                                  a.data(),
                                  mean.data(),
                                  rstd.data(),
                                  w,
                                  partial.data(),
                                  partial.data() + chunks * n,
                                  nullptr,
                                  row,
                                  row,
                                  c.rows,
                                  n,
                                  name<T>};
  for (int64_t task = chunks; task-- > 0;) kernels.layer_norm_backward(q, task, task + 1);
  for (int i = 0; i < 2; ++i)
    kernels.sum_chunks({partial.data() + i * chunks * n, sum.data() + i * n, chunks, n, name<T>});

  std::vector<double> products(n), totals(n);
  for (int64_t r = 0; r < c.rows; ++r) {
    const auto x = [&](int64_t j) { return double(a[r * row + j]); };
    const auto d = [&](int64_t j) { return double(before[r * row + j]); };
    const auto scale = [&](int64_t j) { return c.affine ? double(weight[j]) : 1; };
    const Line line = Line::of(n, x);
    check(mean[r], line.mean, unit, "row's mean", capability, c, r, 0);
    check(rstd[r], line.rstd, 10 * unit, "row's rstd", capability, c, r, 0);
    for (int64_t j = 0; j < n; ++j) {
      const double right = line.normalised(x(j)) * scale(j) + (c.affine ? bias[j] : 0);
      check(h[r * n + j], activated(c.kind, right, 0.75), 10 * unit, "h of a row", capability, c, r,
            j);
      const double grad = line.gradient(n, j, x, [&](int64_t k) { return scale(k) * d(k); });
      check(delta[r * row + j], grad, 30 * unit, "gradient of a row", capability, c, r, j);
      products[j] += d(j) * line.normalised(x(j)), totals[j] += grad;
    }
  }
  for (int64_t j = 0; j < n; ++j) {
    check(sum[j], products[j], unit * (10 + c.rows), "weight gradient", capability, c, 0, j);
    check(sum[n + j], totals[j], unit * (30 + c.rows), "sum", capability, c, 0, j);
  }
}

int main() {
  for_each_capability([](const CpuKernels& kernels, const char* name) {
    for (int64_t rows : {5, 16, 67})
      for (int64_t columns : {5, 16, 31, 64, 100, 1043})
        for (bool affine : {true, false}) {
          const Case c{rows, columns, affine ? 0 : 3, affine, columns != 31, Activation::relu};
          batch<float>(kernels, name, c, 2e-6), layer<float>(kernels, name, c, 2e-6);
          batch<double>(kernels, name, c, 1e-14), layer<double>(kernels, name, c, 1e-14);
        }
    for (int kind = 0; kind < activation_count; ++kind)
      if (derivative_from_output(Activation(kind))) {
        const Case c{9, 37, 0, true, true, Activation(kind)};
        batch<float>(kernels, name, c, 2e-6), layer<float>(kernels, name, c, 2e-6);
      }
    layer<float>(kernels, name, {130, 3, 0, true, true, Activation::tanh}, 2e-6);
    layer<float>(kernels, name, {0, 3, 0, true, true, Activation::tanh}, 2e-6);
    batch<float>(kernels, name, {0, 3, 0, true, false, Activation::tanh}, 2e-6);
  });
}
