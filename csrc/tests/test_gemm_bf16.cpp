// gemm_bf16 against a plain loop in double, over awkward sizes, both ways that operands lie in
// memory, and every number of threads; operands and results end at pages that may not be touched.
#include <cstring>
#include <vector>

#include "check.h"
#include "cpu/dispatch.h"
#include "gemm_bf16.h"
#include "gemm_case.h"
#include "guarded.h"

using namespace fastdfa;

#if defined(__x86_64__)
static void put(float& x, double value) { x = static_cast<float>(value); }
static void put(bfloat16& x, double value) {  // rounded to zero: any bfloat16 will do
  const float narrow = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &narrow, sizeof bits);
  x.bits = static_cast<uint16_t>(bits >> 16);
}
static double get(float x) { return double(x); }
static double get(bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return double(wide);
}

// A product whose b is bfloat16, in float where B is.
template <class B, class C> struct Product {
  Case c;
  Guarded<bfloat16> a;
  Guarded<B> b;
  Guarded<float> bias;
  Guarded<C> result, saved;
  Guarded<float> sums;
  GemmProblem g{};

  Product(const Case& c, int64_t seed)
      : c(c),
        a(c.rows * c.depth),
        b((c.depth + 2) * (c.columns + 2)),
        bias(c.columns),
        result(c.rows * (c.columns + 1)),
        saved(c.rows * c.columns),
        sums(gemm_chunks(c.rows) * c.columns) {
    for (int64_t i = 0; i < saved.size(); ++i) put(saved[i], number(seed++));
    for (int64_t i = 0; i < a.size(); ++i) put(a[i], number(seed++));
    for (int64_t i = 0; i < bias.size(); ++i) put(bias[i], number(seed++));
    for (int64_t i = 0; i < b.size(); ++i) {
      bfloat16 narrow;
      put(narrow, number(seed++));
      put(b[i], get(narrow));
    }
    g.a = a.data(), g.b = b.data(), g.c = result.data(), g.bias = c.bias ? bias.data() : nullptr;
    lay_out(g, c);
    if (c.gated) g.saved = saved.data(), g.saved_row = c.columns, g.sums = sums.data();
  }

  void check() const {
    // Sums are of float; 2^-8 is what bfloat16 rounds to.
    const double tolerance = sizeof(C) == 4 ? 1e-6 * std::sqrt(c.depth + 1.0) : 0.004;
    std::vector<double> sum(sums.size());
    for (int64_t i = 0; i < c.rows; ++i) {
      for (int64_t j = 0; j < c.columns; ++j) {
        double want = c.bias ? double(bias[j]) : 0;
        for (int64_t k = 0; k < c.depth; ++k)
          want += get(a[i * g.a_row + k * g.a_column]) * get(b[k * g.b_row + j * g.b_column]);
        if (c.gated) {
          want *= derivative_of(c.kind, get(saved[i * c.columns + j]));
          sum[i / gemm_chunk_rows * c.columns + j] += want;
        } else if (c.kind == Activation::tanh) {
          want = std::tanh(want);
        }
        const double got = get(result[i * g.c_row + j]);
        CHECK(std::abs(got - want) <= tolerance * std::fmax(1.0, std::abs(want)),
              "[%d, %d, %d] at (%d, %d) is %.9g, not %.9g", int(c.rows), int(c.columns),
              int(c.depth), int(i), int(j), got, want);
      }
      CHECK(std::isnan(get(result[i * g.c_row + c.columns])), "wrote beside a row");
    }
    for (int64_t i = 0; c.gated && i < sums.size(); ++i)  // of what is not rounded yet
      CHECK(std::abs(sums[i] - sum[i]) <= 1e-6 * gemm_chunk_rows * std::sqrt(c.depth + 1.0),
            "[%d, %d, %d] sum %d is %.9g, not %.9g", int(c.rows), int(c.columns), int(c.depth),
            int(i), double(sums[i]), sum[i]);
  }
};

template <class B, class C> static void run(const std::vector<Case>& cases) {
  std::vector<double> first;
  for (int64_t threads : {1, 2, 3, 64}) {
    std::vector<Product<B, C>> products;
    std::vector<GemmProblem> problems;
    for (const Case& c : cases) products.emplace_back(c, 1000 * int64_t(products.size()));
    for (const Product<B, C>& product : products) problems.push_back(product.g);
    const Bf16GemmParams p{problems.data(), int64_t(problems.size()), sizeof(C) == 4};
    const GemmPlan plan = plan_bf16_gemm(p, threads);
    Guarded<uint32_t> scratch(task_threads * bf16_gemm_scratch(plan));
    each_task(plan.tasks, [&](int64_t task, int64_t thread) {
      avx512_bf16::gemm_bf16(p, plan, task, task + 1,
                             scratch.data() + thread * bf16_gemm_scratch(plan));
    });
    std::vector<double> all;
    for (const Product<B, C>& product : products) {
      product.check();
      for (int64_t i = 0; i < product.c.rows; ++i)
        for (int64_t j = 0; j < product.c.columns; ++j)
          all.push_back(get(product.result[i * product.g.c_row + j]));
      for (int64_t i = 0; product.c.gated && i < product.sums.size(); ++i)
        all.push_back(product.sums[i]);
    }
    if (threads == 1) first = all;
    CHECK(all == first, "other numbers on %d threads", int(threads));
  }
}

static void run_all() {
  const auto none = Activation::identity, tanh = Activation::tanh;
  const std::vector<Case> cases = {
      {0, 5, 3, false, true, true, none},        {5, 0, 3, false, true, true, none},
      {5, 7, 0, false, true, true, tanh},        {1, 1, 1, false, true, false, none},
      {7, 65, 33, false, true, true, tanh},      {13, 130, 300, false, true, true, tanh},
      {100, 17, 257, false, true, true, tanh},   {98, 600, 40, true, false, false, none},
      {200, 63, 1025, true, false, false, none}, {37, 50, 20, false, false, true, none},
      {37, 50, 21, true, true, false, none},     {20, 70, 5000, false, true, true, tanh},
  };
  for (const Case& c : cases) {
    run<float, bfloat16>({c});
    run<bfloat16, float>({c});
  }
  const std::vector<Case> gated = {
      {0, 5, 3, false, false, false, tanh, true},
      {5, 7, 0, false, false, false, tanh, true},
      {1, 1, 1, false, false, false, Activation::silu, true},
      {49, 130, 301, false, false, false, tanh, true},
      {200, 63, 1025, false, true, false, Activation::silu, true},
      {145, 600, 40, true, false, false, none, true},
  };
  for (const Case& c : gated) run<float, bfloat16>({c});
  run<float, bfloat16>(gated);
  run<float, bfloat16>(cases);
  run<bfloat16, float>(cases);
}
#else
static void run_all() {}
#endif

int main() {
  if (multiplies_bfloat16()) run_all();
}
