// Cases of batch_norm and layer_norm with their backward, for the kernels of both devices: what
// they are given, and by plain loops in double what they must come to.
#pragma once

#include <vector>

#include "batch_norm.h"
#include "cuda_memory.h"
#include "layer_norm.h"

namespace fastdfa {

struct NormCase {
  int64_t rows, columns, gap;  // gap: columns between rows
  bool affine, training;
  Activation kind;
};

constexpr double norm_eps = 1e-3, norm_momentum = 0.25, norm_param = 0.75;

// A line of a matrix, which is normalised: a column by a batch norm, a row by a layer norm.
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

// What both norms have.
template <class T> struct NormMemory {
  using A = Accumulator<T>;

  NormCase c;
  const char* who;
  int64_t row;  // distance of rows
  Memory<T> a, delta, before, h;
  Memory<A> weight, bias, mean, rstd;

  NormMemory(const NormCase& c, const char* who, int64_t lines)
      : c(c),
        who(who),
        row(c.columns + c.gap),
        a(size()),
        delta(size()),
        before(size()),
        h(c.rows * c.columns),
        weight(c.columns),
        bias(c.columns),
        mean(lines),
        rstd(lines) {
    fill(a, 1, 3), fill(delta, 2), fill(before, 2), fill(weight, 3), fill(bias, 4);
  }

  int64_t size() const { return max(0, (c.rows - 1) * row + c.columns); }

  template <class N> static void fill(Memory<N>& memory, int64_t seed, double offset = 0) {
    for (int64_t i = 0; i < memory.size(); ++i)
      cuda::narrow(static_cast<Accumulator<N>>(number(1000003 * seed + i) + offset), memory[i]);
  }

  const void* weight_or_null() const { return c.affine ? weight.data() : nullptr; }
  const void* bias_or_null() const { return c.affine ? bias.data() : nullptr; }
  double scale(int64_t j) const { return c.affine ? weight.at(j) : 1; }

  double output(double normalised, int64_t j) const {
    const double x = normalised * scale(j) + (c.affine ? bias.at(j) : 0);
    double y = 0;
    dispatch_activation(c.kind, [&](auto k) {
      if constexpr (derivative_from_output(k.value)) y = activate<k.value>(x, norm_param);
    });
    return y;
  }

  // `errors`: of the arithmetic, in units of the accumulation type.
  template <class N> void same(N got, double want, double errors, const char* what, int64_t i) {
    const double unit = std::is_same_v<A, double> ? 5e-15 : 3e-7;
    CHECK(close(got, want, errors * unit * (1 + std::abs(want))),
          "%s, %d bytes: %s of %d x %d, gap %d, training %d, kind %d [%d] is %.9g, not %.9g", who,
          int(sizeof(T)), what, int(c.rows), int(c.columns), int(c.gap), int(c.training),
          int(c.kind), int(i), double(cuda::widen(got)), want);
  }

  void check_memory() {
    h.check("h"), delta.check("delta"), mean.check("mean"), rstd.check("rstd");
    for (int64_t i = 0; i < delta.size(); ++i)
      CHECK(i % row < c.columns || delta.at(i) == before.at(i), "wrote between rows");
  }
};

template <class T> struct BatchNormCase : NormMemory<T> {
  using typename NormMemory<T>::A;
  using Base = NormMemory<T>;
  using Base::a, Base::before, Base::c, Base::delta, Base::h, Base::mean, Base::row, Base::rstd,
      Base::same, Base::scale;

  Memory<A> running_mean, running_var, sums, weight_grad, a_sums;
  BatchNormParams forward;
  BatchNormBackwardParams backward;

  BatchNormCase(const NormCase& c, const char* who)
      : Base(c, who, c.columns),
        running_mean(c.columns),
        running_var(c.columns),
        sums(c.columns),
        weight_grad(c.columns),
        a_sums(c.columns) {
    Base::fill(running_mean, 5), Base::fill(running_var, 6, 2);
    for (int64_t j = 0; j < c.columns; ++j) {
      double total = 0;
      for (int64_t r = 0; r < c.rows; ++r) total += delta.at(r * row + j);
      sums[j] = static_cast<A>(total);
    }
    forward = {a.data(),
               h.data(),
               Base::weight_or_null(),
               Base::bias_or_null(),
               running_mean.data(),
               running_var.data(),
               mean.data(),
               rstd.data(),
               row,
               c.rows,
               c.columns,
               c.training,
               norm_momentum,
               norm_eps,
               dtype_name<T>(),
               c.kind,
               norm_param};
    backward = {delta.data(),
                sums.data(),
                a.data(),
                mean.data(),
                rstd.data(),
                Base::weight_or_null(),
                weight_grad.data(),
                a_sums.data(),
                row,
                row,
                c.rows,
                c.columns,
                c.training,
                dtype_name<T>()};
  }

  void check() {
    Base::check_memory();
    running_mean.check("the running mean"), running_var.check("the running variance");
    weight_grad.check("the weight gradient"), a_sums.check("the sums");
    for (int64_t j = 0; j < c.columns; ++j) check_column(j);
  }

  void check_column(int64_t j) {
    const auto x = [&](int64_t r) { return a.at(r * row + j); };
    const auto g = [&](int64_t r) { return before.at(r * row + j) * scale(j); };
    const Line line = c.training ? Line::of(c.rows, x) : given(j);
    check_running(j, line);
    same(mean[j], line.mean, 10, "mean", j), same(rstd[j], line.rstd, 10, "rstd", j);
    double products = 0, total = 0;
    for (int64_t r = 0; r < c.rows; ++r) {
      const double normalised = line.normalised(x(r));
      same(h[r * c.columns + j], Base::output(normalised, j), 30, "h", r * c.columns + j);
      const double grad = c.training ? line.gradient(c.rows, r, x, g) : g(r) * line.rstd;
      same(delta[r * row + j], grad, 100, "gradient", r * c.columns + j);
      products += before.at(r * row + j) * normalised, total += grad;
    }
    same(weight_grad[j], products, 20.0 + c.rows, "weight gradient", j);
    same(a_sums[j], total, 100.0 + c.rows, "sum", j);
  }

  Line given(int64_t j) const {
    return {running_mean.at(j), running_var.at(j), 1 / std::sqrt(running_var.at(j) + norm_eps)};
  }

  // A running statistic is moved in training, and else what it was.
  void check_running(int64_t j, const Line& line) {
    const double by = c.training ? norm_momentum : 0;
    const double unbiased = line.variance * static_cast<double>(c.rows) / (c.rows - 1.0);
    const double mean_before = static_cast<A>(number(1000003 * 5 + j));
    const double var_before = static_cast<A>(number(1000003 * 6 + j) + 2);
    same(running_mean[j], (1 - by) * mean_before + by * line.mean, 10, "running mean", j);
    same(running_var[j], c.training ? (1 - by) * var_before + by * unbiased : var_before, 10,
         "running variance", j);
  }
};

template <class T> struct LayerNormCase : NormMemory<T> {
  using typename NormMemory<T>::A;
  using Base = NormMemory<T>;
  using Base::a, Base::before, Base::c, Base::delta, Base::h, Base::mean, Base::row, Base::rstd,
      Base::same, Base::scale;

  Memory<A> row_means, weight_partial, a_partial, weight_grad, a_sums;
  LayerNormParams forward;
  LayerNormBackwardParams backward;
  SumChunksParams sums[2];

  // chunks: of rows, whose sums the backward leaves.
  template <class Chunks>
  LayerNormCase(const NormCase& c, const char* who, const Chunks& chunks_of)
      : LayerNormCase(c, who, chunks_of, chunks_of(shape(c))) {}

  void check() {
    Base::check_memory();
    row_means.check("the means"), weight_partial.check("the partial gradients");
    a_partial.check("the partial sums");
    std::vector<double> products(c.columns), totals(c.columns);
    for (int64_t r = 0; r < c.rows; ++r) check_row(r, products, totals);
    for (int64_t j = 0; j < c.columns; ++j) {
      same(weight_grad[j], products[j], 20.0 + c.rows, "weight gradient", j);
      same(a_sums[j], totals[j], 100.0 + c.rows, "sum", j);
    }
  }

 private:
  static LayerNormBackwardParams shape(const NormCase& c) {
    LayerNormBackwardParams p{};
    p.rows = c.rows, p.columns = c.columns, p.dtype = dtype_name<T>();
    return p;
  }

  template <class Chunks>
  LayerNormCase(const NormCase& c, const char* who, const Chunks&, int64_t chunks)
      : Base(c, who, c.rows),
        row_means(2 * c.rows),
        weight_partial(chunks * c.columns),
        a_partial(chunks * c.columns),
        weight_grad(c.columns),
        a_sums(c.columns) {
    forward = {a.data(),
               h.data(),
               Base::weight_or_null(),
               Base::bias_or_null(),
               mean.data(),
               rstd.data(),
               row,
               c.rows,
               c.columns,
               norm_eps,
               dtype_name<T>(),
               c.kind,
               norm_param};
    backward = shape(c);
    backward.delta = delta.data(), backward.a = a.data();
    backward.mean = mean.data(), backward.rstd = rstd.data();
    backward.weight = Base::weight_or_null();
    backward.weight_partial = weight_partial.data(), backward.a_partial = a_partial.data();
    backward.row_means = row_means.data();
    backward.delta_row = backward.a_row = row;
    sums[0] = {weight_partial.data(), weight_grad.data(), chunks, c.columns, dtype_name<A>()};
    sums[1] = {a_partial.data(), a_sums.data(), chunks, c.columns, dtype_name<A>()};
  }

  void check_row(int64_t r, std::vector<double>& products, std::vector<double>& totals) {
    const auto x = [&](int64_t j) { return a.at(r * row + j); };
    const auto g = [&](int64_t j) { return before.at(r * row + j) * scale(j); };
    const Line line = Line::of(c.columns, x);
    same(mean[r], line.mean, 10, "mean of a row", r), same(rstd[r], line.rstd, 20, "rstd", r);
    for (int64_t j = 0; j < c.columns; ++j) {
      const double normalised = line.normalised(x(j));
      same(h[r * c.columns + j], Base::output(normalised, j), 30, "h of a row", r * c.columns + j);
      const double grad = line.gradient(c.columns, j, x, g);
      same(delta[r * row + j], grad, 100, "gradient of a row", r * c.columns + j);
      products[j] += before.at(r * row + j) * normalised, totals[j] += grad;
    }
  }
};

// Calls f(case) for awkward sizes and strides, with and without parameters, of every activation.
template <class F> void each_norm_case(const F& f) {
  for (int64_t rows : {5, 67})
    for (int64_t columns : {5, 16, 31, 100})
      for (bool affine : {true, false})
        f(NormCase{rows, columns, affine ? 0 : 3, affine, columns != 31, Activation::relu});
  for (int kind = 0; kind < activation_count; ++kind)
    if (derivative_from_output(Activation(kind)))
      f(NormCase{9, 17, 0, true, true, Activation(kind)});
  f(NormCase{0, 3, 0, true, false, Activation::tanh});
}

}  // namespace fastdfa
