// project_gate against a plain loop in double, over awkward sizes: dense and generated feedback,
// shared and separate, layers of different widths; and the plan of its tasks.
#include <cstring>
#include <vector>

#include "check.h"

using namespace fastdfa;

// Every entry of every layer belongs to exactly one task.
static void coverage(const ProjectGateParams& p, const ProjectGatePlan& plan) {
  for (int64_t l = 0; l < p.layer_count; ++l) {
    const int64_t columns = p.layers[l].columns;
    std::vector<int> times(p.rows * columns);
    for (int64_t task = 0; task < plan.strips * plan.chunks; ++task) {
      const Strip strip = find_strip(p, plan, task / plan.chunks);
      if (l / plan.group_layers != strip.group) continue;
      const int64_t first = task % plan.chunks * plan.chunk_rows;
      for (int64_t r = first; r < min(first + plan.chunk_rows, p.rows); ++r)
        for (int64_t j = strip.column; j < min(strip.column + plan.block_columns, columns); ++j)
          ++times[r * columns + j];
    }
    for (int t : times) CHECK(t == 1, "an entry of layer %d is written %d times", int(l), t);
  }
  CHECK(plan.block_columns % column_quantum == 0 && plan.block_classes <= 256, "block sizes");
}

struct Case {
  int64_t rows, classes;
  std::vector<int64_t> widths;
  bool shared, generated;
};

template <class T>
static void run(const CpuKernels& kernels, const char* capability, DType dtype, const Case& c,
                double tolerance) {
  const int64_t count = static_cast<int64_t>(c.widths.size());
  int64_t widest = 0;
  for (int64_t n : c.widths) widest = max(widest, n);
  const int64_t ld = widest + 3;
  std::vector<T> error(c.rows * c.classes);
  for (size_t i = 0; i < error.size(); ++i) error[i] = T(number(i));
  std::vector<std::vector<T>> b(count), saved(count), delta(count), partial(count), bias(count);
  std::vector<ProjectGateLayer> layers(count);

  ProjectGateParams p{};
  p.error = error.data(), p.error_row = 1, p.error_column = c.rows;  // transposed
  p.rows = c.rows, p.classes = c.classes;
  p.layers = layers.data(), p.layer_count = count, p.shared = c.shared;
  p.dtype = dtype, p.seed = 77, p.distribution = Distribution::normal;
  for (int64_t l = 0; l < count; ++l) {
    const int64_t n = c.widths[l];
    layers[l].columns = n;
    layers[l].stream = c.shared ? 5 : 5 + l;
    b[l].resize(c.classes * ld);
    const FillFeedbackParams fill{
        b[l].data(), ld, c.classes, widest, dtype, {p.seed, layers[l].stream, p.distribution}, 0};
    each_task(fill_tasks(fill),
              [&](int64_t task, int64_t) { kernels.fill_feedback(fill, task, task + 1); });
    layers[l].feedback = c.generated ? nullptr : b[l].data();
    layers[l].feedback_row = ld;
    saved[l].resize(c.rows * n);
    for (size_t i = 0; i < saved[l].size(); ++i) saved[l][i] = T(number(1000003 * (l + 1) + i));
    layers[l].saved = saved[l].data(), layers[l].saved_row = n;
    layers[l].scale = 0.25 * (l + 1);
    layers[l].kind = l % 2 ? Activation::tanh : Activation::relu;
  }
  const ProjectGatePlan plan = plan_project_gate(p);
  coverage(p, plan);
  for (int64_t l = 0; l < count; ++l) {
    const int64_t n = c.widths[l];
    delta[l].assign(c.rows * n + 1, T(9)), bias[l].resize(n + 1);
    partial[l].assign(plan.chunks * n + 1, T(9));
    layers[l].delta = delta[l].data(), layers[l].bias_partial = partial[l].data();
  }
  std::vector<T> scratch(task_threads * project_gate_scratch(plan) + 1, T(9));
  each_task(plan.strips * plan.chunks, [&](int64_t task, int64_t thread) {
    kernels.project_gate(p, plan, task, task + 1,
                         scratch.data() + thread * project_gate_scratch(plan));
  });
  CHECK(scratch.back() == T(9), "%s: wrote after the end of the scratch", capability);

  for (int64_t l = 0; l < count; ++l) {
    const int64_t n = c.widths[l];
    kernels.sum_chunks({partial[l].data(), bias[l].data(), plan.chunks, n, dtype});
    CHECK(delta[l].back() == T(9) && partial[l].back() == T(9), "%s: wrote after the end",
          capability);
    const double unit = tolerance * layers[l].scale * std::sqrt(c.classes + 1.0);
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t r = 0; r < c.rows; ++r) {
        double want = 0;
        for (int64_t k = 0; k < c.classes; ++k)
          want += double(error[k * c.rows + r]) * double(b[l][k * ld + j]);
        const double s = saved[l][r * n + j];
        want *= layers[l].scale * (l % 2 ? 1 - s * s : s > 0);
        CHECK(std::abs(delta[l][r * n + j] - want) <= unit,
              "%s: M %d, C %d, layer %d [%d, %d] is %.9g, not %.9g", capability, int(c.rows),
              int(c.classes), int(l), int(r), int(j), double(delta[l][r * n + j]), want);
        sum += want;
      }
      CHECK(std::abs(bias[l][j] - sum) <= unit * (c.rows + 1),
            "%s: M %d, C %d, bias gradient of layer %d [%d] is %.9g, not %.9g", capability,
            int(c.rows), int(c.classes), int(l), int(j), double(bias[l][j]), sum);
    }
  }
}

int main() {
  const std::vector<Case> cases = {
      {0, 3, {5}, true, false},
      {4, 0, {33}, true, false},
      {1, 1, {1}, true, false},
      {7, 10, {0, 65, 16}, true, false},
      {129, 10, {128, 1025, 31}, true, false},
      {129, 10, {128, 1025, 31}, false, false},
      {97, 10, {130, 64, 7}, true, true},
      {97, 10, {130, 64, 7}, false, true},
      {101, 257, {300, 63}, true, false},
      {101, 513, {63, 300}, false, true},
      {5, 100, {641}, true, true},
  };
  for_each_capability([&](const CpuKernels& kernels, const char* name) {
    for (const Case& c : cases) {
      run<float>(kernels, name, DType::float32, c, 3e-6);
      run<double>(kernels, name, DType::float64, c, 1e-13);
    }
  });
}
