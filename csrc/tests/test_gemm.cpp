// gemm and linear_chain against a plain loop in double, over awkward sizes, both ways that operands
// lie in memory, and every number of threads; operands and results end at pages that may not be
// touched.
#include <vector>

#include "check.h"
#include "gemm_case.h"
#include "guarded.h"

using namespace fastdfa;

static double activated(Activation kind, double x, double param) {
  if (kind == Activation::relu) return x > 0 ? x : 0;
  if (kind == Activation::leaky_relu) return x > 0 ? x : param * x;
  if (kind == Activation::tanh) return std::tanh(x);
  return x;
}

// One product of a list, with rows that lie further apart than they are long.
template <class T> struct Product {
  Case c;
  Guarded<T> a, b, bias, result, saved, sums;
  GemmProblem g{};

  Product(const Case& c, int64_t seed)
      : c(c),
        a(c.rows * c.depth),
        b((c.depth + 2) * (c.columns + 2)),
        bias(c.columns),
        result(c.rows * (c.columns + 1)),
        saved(c.rows * c.columns),
        sums(gemm_chunks(c.rows) * c.columns) {
    for (Guarded<T>* x : {&a, &b, &bias, &saved})
      for (int64_t i = 0; i < x->size(); ++i) (*x)[i] = T(number(seed++));
    g.a = a.data(), g.b = b.data(), g.c = result.data(), g.bias = c.bias ? bias.data() : nullptr;
    lay_out(g, c);
    g.param = 0.25;
    if (c.gated) g.saved = saved.data(), g.saved_row = c.columns, g.sums = sums.data();
  }

  void check(const char* capability, double tolerance) const {
    std::vector<double> sum(sums.size());
    for (int64_t i = 0; i < c.rows; ++i) {
      for (int64_t j = 0; j < c.columns; ++j) {
        double want = c.bias ? double(bias[j]) : 0;
        for (int64_t k = 0; k < c.depth; ++k)
          want += double(a[i * g.a_row + k * g.a_column]) * double(b[k * g.b_row + j * g.b_column]);
        want = c.gated ? want * derivative_of(c.kind, double(saved[i * c.columns + j]))
                       : activated(c.kind, want, g.param);
        if (c.gated) sum[i / gemm_chunk_rows * c.columns + j] += want;
        const double got = result[i * g.c_row + j];
        CHECK(std::abs(got - want) <= tolerance * std::sqrt(c.depth + 1.0),
              "%s: [%d, %d, %d] at (%d, %d) is %.9g, not %.9g", capability, int(c.rows),
              int(c.columns), int(c.depth), int(i), int(j), got, want);
      }
      CHECK(std::isnan(double(result[i * g.c_row + c.columns])), "wrote beside a row");
    }
    for (int64_t i = 0; c.gated && i < sums.size(); ++i)
      CHECK(std::abs(double(sums[i]) - sum[i]) <=
                tolerance * gemm_chunk_rows * std::sqrt(c.depth + 1.0),
            "%s: [%d, %d, %d] sum %d is %.9g, not %.9g", capability, int(c.rows), int(c.columns),
            int(c.depth), int(i), double(sums[i]), sum[i]);
  }
};

template <class T>
static void run(const CpuKernels& kernels, const char* capability, const std::vector<Case>& cases,
                double tolerance) {
  std::vector<double> first;
  for (int64_t threads : {1, 2, 3, 7, 64}) {
    std::vector<Product<T>> products;
    std::vector<GemmProblem> problems;
    for (const Case& c : cases) products.emplace_back(c, 1000 * int64_t(products.size()));
    for (const Product<T>& product : products) problems.push_back(product.g);
    const DType dtype = sizeof(T) == 8 ? DType::float64 : DType::float32;
    const GemmParams p{problems.data(), int64_t(problems.size()), dtype};
    const GemmPlan plan = plan_gemm(p, threads);
    CHECK(plan.block_columns <= gemm_most_columns, "a block of %d columns",
          int(plan.block_columns));
    int64_t first_task = 0;
    for (int64_t part = 0; part <= threads; ++part) {
      const int64_t next = gemm_first_task(p, plan, part, threads);
      CHECK(part > 0 ? next >= first_task : next == 0, "part %d begins at task %d", int(part),
            int(next));
      first_task = next;
    }
    CHECK(first_task == plan.tasks, "%d of %d tasks are shared out", int(first_task),
          int(plan.tasks));
    Guarded<T> scratch(task_threads * gemm_scratch(plan));
    each_task(plan.tasks, [&](int64_t task, int64_t thread) {
      kernels.gemm(p, plan, task, task + 1, scratch.data() + thread * gemm_scratch(plan));
    });
    std::vector<double> all;
    for (const Product<T>& product : products) {
      product.check(capability, tolerance);
      for (int64_t i = 0; i < product.c.rows; ++i)
        for (int64_t j = 0; j < product.c.columns; ++j)
          all.push_back(product.result[i * product.g.c_row + j]);
      for (int64_t i = 0; product.c.gated && i < product.sums.size(); ++i)
        all.push_back(product.sums[i]);
    }
    if (threads == 1) first = all;
    CHECK(all == first, "%s: other numbers on %d threads", capability, int(threads));
  }
}

// Layers by rows, in parts, have the bits of one product after the other.
template <class T>
static void run_chain(const CpuKernels& kernels, const char* capability, int64_t rows,
                      const std::vector<int64_t>& widths, bool x_transposed, double tolerance) {
  std::vector<Product<T>> products;
  std::vector<GemmProblem> problems;
  for (size_t l = 0; l + 1 < widths.size(); ++l)
    products.emplace_back(Case{rows, widths[l + 1], widths[l], l == 0 && x_transposed, true,
                               l % 2 == 0, l % 2 ? Activation::tanh : Activation::leaky_relu},
                          1000 * int64_t(l));
  for (Product<T>& product : products) {
    if (!problems.empty()) product.g.a = problems.back().c, product.g.a_row = problems.back().c_row;
    problems.push_back(product.g);
  }
  const DType dtype = sizeof(T) == 8 ? DType::float64 : DType::float32;
  const GemmParams p{problems.data(), int64_t(problems.size()), dtype};
  Guarded<T> scratch(task_threads * chain_scratch(p));
  for (int64_t parts : {1, 2, 5}) {
    each_task(parts, [&](int64_t part, int64_t thread) {
      kernels.linear_chain(p, rows * part / parts, rows * (part + 1) / parts,
                           scratch.data() + thread * chain_scratch(p));
    });
    for (Product<T>& product : products) {
      std::vector<double> got;
      for (int64_t i = 0; i < product.result.size(); ++i) got.push_back(double(product.result[i]));
      const GemmParams one{&product.g, 1, dtype};
      const GemmPlan plan = plan_gemm(one, 1);
      Guarded<T> panel(gemm_scratch(plan));
      kernels.gemm(one, plan, 0, plan.tasks, panel.data());
      for (int64_t i = 0; i < product.result.size(); ++i)
        CHECK(double(product.result[i]) == got[i] ||
                  (std::isnan(got[i]) && std::isnan(double(product.result[i]))),
              "%s: chain of %d rows, %d parts: other bits at %d", capability, int(rows), int(parts),
              int(i));
    }
    products[0].check(capability, tolerance);
  }
}

int main() {
  const auto none = Activation::identity;
  const std::vector<Case> alone[] = {
      {{0, 5, 3, false, true, true, none}},
      {{5, 0, 3, false, true, true, none}},
      {{5, 7, 0, false, true, true, Activation::tanh}},
      {{1, 1, 1, false, true, false, none}},
      {{7, 65, 33, false, true, true, Activation::relu}},
      {{13, 130, 300, false, true, true, Activation::leaky_relu}},
      {{100, 17, 257, false, true, true, Activation::tanh}},
      {{98, 600, 40, true, false, false, none}},
      {{200, 63, 513, true, false, false, none}},
      {{517, 70, 300, true, false, false, none}},  // so far apart that rows of `a` are packed
      {{517, 17, 40, true, true, true, Activation::tanh}},
      {{37, 50, 20, false, false, true, none}},
      {{37, 50, 20, true, true, false, none}},
      {{0, 5, 3, false, false, false, Activation::tanh, true}},
      {{5, 7, 0, false, false, false, Activation::tanh, true}},
      {{1, 1, 1, false, false, false, Activation::silu, true}},
      {{49, 130, 300, false, false, false, Activation::tanh, true}},
      {{200, 63, 513, false, true, false, Activation::silu, true}},
      {{145, 600, 40, true, false, false, none, true}},
  };
  std::vector<Case> together;
  for (const auto& cases : alone) together.insert(together.end(), cases.begin(), cases.end());
  for_each_capability([&](const CpuKernels& kernels, const char* name) {
    for (const auto& cases : alone) {
      run<float>(kernels, name, cases, 1e-6);
      run<double>(kernels, name, cases, 1e-14);
    }
    for (int64_t rows : {0, 1, 15, 64, 100}) {
      for (bool transposed : {false, true}) {
        run_chain<float>(kernels, name, rows, {33, 17, 65, 1, 130}, transposed, 1e-6);
        run_chain<float>(kernels, name, rows, {300, 7, 260, 20}, transposed, 1e-6);
        run_chain<double>(kernels, name, rows, {300, 7, 260, 20}, transposed, 1e-14);
      }
    }
    run<float>(kernels, name, together, 1e-6);
    run<double>(kernels, name, together, 1e-14);
  });
}
