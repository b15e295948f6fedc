// project_gate's CUDA kernels, run by the emulator, against a plain loop in double; and the plan:
// that the launches of awkward calls cover every element exactly once.
#include <map>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/fill_feedback.cu"
#include "cuda/project_gate.cu"
#include "cuda_memory.h"

using namespace fastdfa;

namespace {

struct Case {
  int64_t rows, classes;
  std::vector<int64_t> widths;
  bool shared = true, generated = false;
  bool allow_tf32 = false;
  int64_t shift = 0;        // of every pointer, in elements: not aligned to 16 bytes
  bool transposed = false;  // the error
  int64_t chunk_rows = 0;   // where not 0: in place of the plan's
};

template <class T> T from_double(double x) {
  T y;
  if constexpr (std::is_same_v<T, double>) {
    y = x;
  } else {
    cuda::narrow(static_cast<float>(x), y);
  }
  return y;
}
template <class T> double to_double(T x) { return cuda::widen(x); }

template <class T> void fill(const Guarded<T>& x, int64_t stream) {
  for (int64_t i = 0; i < x.size(); ++i) x[i] = from_double<T>(number(1000003 * stream + i));
}

constexpr Activation kinds[] = {Activation::tanh, Activation::relu, Activation::identity,
                                Activation::gelu};

double derivative_of(Activation kind, double s) {
  switch (kind) {
    case Activation::tanh:
      return 1 - s * s;
    case Activation::relu:
      return s > 0;
    case Activation::gelu:
      return 0.5 * std::erfc(-s / std::sqrt(2)) + s * std::exp(-s * s / 2) / std::sqrt(2 * M_PI);
    default:
      return 1;
  }
}

// A call with its memory; E: the type of the error, F: of the feedback.
template <class T, class E, class F> struct Call {
  using A = Accumulator<T>;

  explicit Call(const Case& c) : c(c), error(c.rows * c.classes, c.shift) {
    count = static_cast<int64_t>(c.widths.size());
    for (int64_t n : c.widths) widest = max(widest, n);
    fill(error, 99);
    layers.resize(count);
    p.error = error.data();
    p.error_row = c.transposed ? 1 : c.classes, p.error_column = c.transposed ? c.rows : 1;
    p.rows = c.rows, p.classes = c.classes;
    p.layers = layers.data(), p.layer_count = count, p.shared = c.shared;
    p.dtype = dtype_name<T>(), p.error_dtype = dtype_name<E>(), p.feedback_dtype = dtype_name<F>();
    p.allow_tf32 = c.allow_tf32;
    p.seed = 77, p.distribution = Distribution::uniform;
    for (int64_t l = 0; l < count; ++l) add_layer(l);
    plan = cuda::plan_project_gate(p);
    if (c.chunk_rows) plan.chunk_rows = c.chunk_rows, plan.chunks = ceil_div(c.rows, c.chunk_rows);
    for (int64_t l = 0; l < count; ++l) {
      partial.emplace_back(plan.chunks * c.widths[l], c.shift);
      layers[l].bias_partial = partial[l].data();
    }
  }

  void add_layer(int64_t l) {
    ProjectGateLayer& layer = layers[l];
    const int64_t n = layer.columns = c.widths[l];
    layer.stream = c.shared ? 5 : 5 + static_cast<uint32_t>(l);
    if (l == 0 || !c.shared) make_feedback(c.shared ? widest : n, layer.stream);
    layer.feedback = c.generated ? nullptr : feedback.back().data();
    layer.feedback_row = feedback_row;
    saved.emplace_back(c.rows * n, c.shift);
    fill(saved[l], l);
    delta.emplace_back(c.rows * n, c.shift);
    layer.saved = saved[l].data(), layer.saved_row = n;
    layer.delta = delta[l].data();
    layer.scale = 0.25 * (1 + l % 5);
    layer.kind = kinds[l % 4];
  }

  // B from the CPU's kernels, rounded as the op would have it.
  void make_feedback(int64_t n, uint32_t stream) {
    const int64_t pack = 16 / sizeof(F);
    feedback_row = c.shift ? n : round_up(n, pack);
    std::vector<double> b(c.classes * feedback_row);
    const FillFeedbackParams fill{
        b.data(), feedback_row, c.classes, n, DType::float64, {p.seed, stream, p.distribution}, 0};
    cpu_kernels(Capability::baseline).fill_feedback(fill, 0, fill_tasks(fill));
    feedback.emplace_back(c.classes * feedback_row, c.shift);
    for (int64_t i = 0; i < c.classes; ++i)
      for (int64_t j = 0; j < n; ++j)
        feedback.back()[i * feedback_row + j] = from_double<F>(b[i * feedback_row + j]);
  }

  void run() {
    const Guarded<char> scratch(plan.scratch_bytes);
    CHECK(cuda::project_gate(p, plan, scratch.data(), nullptr) == 0, "launch failed");
  }

  double expected(int64_t l, int64_t r, int64_t j) const {
    const Guarded<F>& b = feedback[c.shared ? 0 : l];
    double sum = 0;
    for (int64_t k = 0; k < c.classes; ++k)
      sum += to_double(error[r * p.error_row + k * p.error_column]) *
             to_double(b[k * layers[l].feedback_row + j]);
    return sum * layers[l].scale *
           derivative_of(layers[l].kind, to_double(saved[l][r * c.widths[l] + j]));
  }

  void check(double unit, const std::string& name) const {
    for (int64_t l = 0; l < count; ++l) {
      const int64_t n = c.widths[l];
      const double most = unit * layers[l].scale * std::sqrt(c.classes + 1.0);
      for (int64_t j = 0; j < n; ++j) {
        double sum = 0, found_sum = 0;
        for (int64_t r = 0; r < c.rows; ++r) {
          const double want = expected(l, r, j), found = to_double(delta[l][r * n + j]);
          CHECK(std::abs(found - want) <= most, "%s: layer %d [%d, %d] is %.9g, not %.9g",
                name.c_str(), int(l), int(r), int(j), found, want);
          sum += want;
        }
        for (int64_t k = 0; k < plan.chunks; ++k) found_sum += double(partial[l][k * n + j]);
        CHECK(std::abs(found_sum - sum) <= most * (c.rows + 1),
              "%s: bias gradient of layer %d [%d] is %.9g, not %.9g", name.c_str(), int(l), int(j),
              found_sum, sum);
      }
    }
  }

  const Case& c;
  int64_t count, widest = 1, feedback_row = 0;
  Guarded<E> error;
  std::vector<Guarded<F>> feedback;
  std::vector<Guarded<T>> saved, delta;
  std::vector<Guarded<A>> partial;
  std::vector<ProjectGateLayer> layers;
  ProjectGateParams p{};
  cuda::ProjectGatePlan plan{};
};

std::string name_of(const Case& c, const char* type) {
  return std::string(type) + " M " + std::to_string(c.rows) + " C " + std::to_string(c.classes) +
         (c.shared ? " shared" : "") + (c.generated ? " generated" : "");
}

template <class T, class E, class F>
void run(const Case& c, bool tensor_cores, double unit, const char* type) {
  Call<T, E, F> call(c);
  const std::string name = name_of(c, type);
  CHECK(call.plan.tensor_cores == tensor_cores, "%s: takes the other kernel", name.c_str());
  call.run();
  call.check(unit, name);
}

void few_classes() {
  const std::vector<Case> cases = {
      {0, 3, {5}},
      {3, 3, {0, 0}},
      {4, 0, {33}},
      {1, 1, {1}},
      {7, 10, {0, 65, 16}},
      {65, 10, {128, 513, 31}},
      {65, 10, {128, 256, 31}, false},
      {37, 10, {130, 64, 7}, true, true},
      {37, 10, {130, 64, 7}, false, true},
      {37, 10, {128, 64}, true, false, false, 1},
      {33, 31, {24, 264}, true, false, false, 0, true},
      {600, 2, {16}},
      {300, 3, {300, 24}, true, false, false, 0, false, 128},
  };
  for (const Case& c : cases) {
    run<float, float, float>(c, false, 3e-6, "float32");
    run<double, double, double>(c, false, 1e-12, "float64");
    run<bfloat16, bfloat16, float>(c, false, 1e-2, "bfloat16");
    run<float16, float, float>(c, false, 1.5e-3, "float16");
  }
  // Many classes without tensor cores: several blocks of classes.
  for (const Case& c : std::vector<Case>{{70, 77, {140, 9}}, {33, 64, {40, 12}, false, true}}) {
    run<float, float, float>(c, false, 3e-6, "float32");
    run<double, double, double>(c, false, 1e-12, "float64");
  }
  const Case unaligned{33, 64, {40, 13}, true, false, false, 3};
  run<bfloat16, bfloat16, bfloat16>(unaligned, false, 1e-2, "bfloat16");
  const Case wide{33, 64, {40, 13}};
  run<bfloat16, bfloat16, float>(wide, false, 1e-2, "bfloat16 with float32 feedback");
  run<float16, float, float16>(wide, false, 1.5e-3, "float16 with float32 error");
}

void many_classes() {
  const std::vector<Case> cases = {
      {1, 32, {8}},
      {130, 40, {128, 8, 130}},
      {129, 33, {136, 7}, false},
      {260, 100, {17}},
      {50, 65, {150, 300, 40}, true, true},
      {50, 64, {150, 130}, false, true},
      {50, 37, {100}, true, false, false, 0, true},
      {300, 48, {136, 24, 8}, true, false, false, 0, false, 256},
  };
  for (Case c : cases) {
    run<bfloat16, bfloat16, bfloat16>(c, true, 1e-2, "bfloat16");
    run<float16, float16, float16>(c, true, 1.5e-3, "float16");
    run<bfloat16, float, bfloat16>(c, true, 1.5e-2, "bfloat16 with float32 error");
    c.allow_tf32 = true;
    run<float, float, float>(c, true, 1e-3, "tf32");
  }
}

// More layers than a launch or a group takes.
void many_layers() {
  for (bool shared : {true, false})
    for (bool generated : {true, false}) {
      const Case c{3, 4, std::vector<int64_t>(70, 9), shared, generated};
      run<float, float, float>(c, false, 3e-6, "float32");
    }
}

// Counts how often the launches of a call write each element of each delta and partial sum.
template <class T, class E, class F> void coverage(const Case& c) {
  Call<T, E, F> call(c);
  using A = Accumulator<T>;
  std::vector<std::vector<uint8_t>> deltas, partials;
  for (int64_t l = 0; l < call.count; ++l) {
    deltas.emplace_back(call.delta[l].size());
    partials.emplace_back(call.partial[l].size());
  }
  const auto find = [&](const auto& tensors, const auto* address) {
    for (size_t l = 0; l < tensors.size(); ++l) {
      const int64_t at = address - tensors[l].data();
      if (at >= 0 && at < tensors[l].size()) return std::pair<size_t, int64_t>(l, at);
    }
    CHECK(false, "a launch points outside of the outputs");
    std::abort();
  };
  cuda::emulator::observer = [&](const void* params, size_t bytes) {
    if (bytes != sizeof(cuda::Launch)) return false;
    const cuda::Launch& p = *static_cast<const cuda::Launch*>(params);
    CHECK(p.layer_count <= cuda::launch_layers, "too many layers in a launch");
    for (int64_t index = 0; index < p.strips * p.chunks; ++index) {
      const auto item = cuda::find_item(p, index, static_cast<int>(call.plan.strip_columns));
      const int64_t begin = item.chunk * p.chunk_rows, end = min(begin + p.chunk_rows, p.rows);
      for (int l = 0; l < item.group.layers; ++l) {
        const cuda::Layer& layer = p.layers[item.group.first_layer + l];
        const int64_t last = min(item.column + call.plan.strip_columns, layer.columns);
        for (int64_t j = item.column; j < last; ++j) {
          const auto [s, sum] = find(call.partial, static_cast<const A*>(layer.partial) + j +
                                                       item.chunk * layer.partial_row);
          ++partials[s][sum];
          for (int64_t r = begin; r < end; ++r) {
            const auto [d, at] =
                find(call.delta, static_cast<const T*>(layer.delta) + r * layer.delta_row + j);
            ++deltas[d][at];
          }
        }
      }
    }
    return false;
  };
  call.run();
  cuda::emulator::observer = nullptr;
  const std::string name = name_of(c, "coverage");
  for (const auto& written : {deltas, partials})
    for (const auto& layer : written)
      for (uint8_t times : layer) CHECK(times == 1, "%s: written %d times", name.c_str(), times);
}

void coverage() {
  const std::vector<int64_t> sizes = {1, 31, 32, 127, 129, 300};
  for (int64_t rows : sizes)
    for (int64_t classes : {1, 31, 32, 33})
      for (bool shared : {true, false})
        for (bool generated : {true, false}) {
          const Case c{rows, classes, {1, 513, 128, 77, 0, 256}, shared, generated};
          coverage<bfloat16, bfloat16, bfloat16>(c);
          coverage<float, float, float>(c);
        }
  coverage<float, float, float>({9, 3, std::vector<int64_t>(150, 5), true, true});
  coverage<float, float, float>({9, 3, std::vector<int64_t>(150, 5), false, false});
  // Panels of B, and windows of the padded copy of e.
  coverage<bfloat16, bfloat16, bfloat16>({300, 50001, {700, 130}, true, true});
  coverage<bfloat16, bfloat16, bfloat16>({2000, 50001, {200, 130}, false, true});
}

}  // namespace

int main() {
  coverage();
  few_classes();
  many_classes();
  many_layers();
  cuda::emulator::most_blocks = 3;
  few_classes();
  many_classes();
}
