// The ops on the CPU: how their work is cut into tasks for parallel_for.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../gemm_bf16.h"
#include "../op_arguments.h"
#include "kernels.h"

namespace fastdfa {
namespace {

// Elements that are worth a thread of their own: some 10 us.
constexpr int64_t grain_elements = 32768;

const CpuKernels& kernels() { return cpu_kernels(capability()); }

OpCall call_of(const char* op) { return {op, {aoti_torch_device_type_cpu(), 0}}; }

// Runs f(begin, end) over tasks that together handle `elements`.
template <class F> void for_tasks(int64_t tasks, int64_t elements, const F& f) {
  if (tasks == 0) return;
  const int64_t each = max(1, elements / tasks);
  torch::stable::parallel_for(0, tasks, max(1, grain_elements / each), f);
}

// Scratch for every thread of a parallel_for.
class Scratch {
 public:
  Scratch(const OpCall& call, ScalarType type, int64_t elements)
      : memory(
            call.empty({static_cast<int64_t>(torch::stable::get_num_threads()), elements}, type)),
        bytes(elements * static_cast<int64_t>(memory.element_size())) {}

  void* of_this_thread() const {
    uint32_t thread = 0;
    TORCH_ERROR_CODE_CHECK(torch_get_thread_idx(&thread));
    return static_cast<char*>(memory.data_ptr()) + thread * bytes;
  }

 private:
  Tensor memory;
  int64_t bytes;
};

void finish(const BiasSums& bias) {
  if (!bias.second_stage) return;
  for_tasks(static_cast<int64_t>(bias.sums.size()), bias.partials.numel(),
            [&](int64_t begin, int64_t end) {
              for (int64_t l = begin; l < end; ++l) kernels().sum_chunks(bias.sums[l]);
            });
}

void fill_feedback_(Tensor out, int64_t seed, int64_t stream, int64_t distribution) {
  const FillFeedbackParams p =
      fill_feedback_params(call_of("fill_feedback_"), out, seed, stream, distribution);
  for_tasks(fill_tasks(p), 4 * out.numel(),
            [&](int64_t begin, int64_t end) { kernels().fill_feedback(p, begin, end); });
}

std::vector<Tensor> project_gate(Tensor error, std::vector<Tensor> feedback, int64_t seed,
                                 std::vector<int64_t> streams, int64_t distribution,
                                 std::vector<Tensor> saved, std::vector<int64_t> kinds,
                                 std::vector<double> params, std::vector<double> scales,
                                 bool sum_error, bool allow_tf32) {
  const OpCall call = call_of("project_gate");
  ProjectGateArguments a{std::move(error),   std::move(feedback), seed,
                         std::move(streams), distribution,        std::move(saved),
                         std::move(kinds),   std::move(params),   std::move(scales),
                         sum_error,          allow_tf32};
  check_project_gate(call, a);
  if (a.saved.empty()) return {};
  const ScalarType wide = accumulation_type(call.dtype_of("saved[0]", a.saved[0]));
  a.error = as_type(a.error, wide);
  for (Tensor& b : a.feedback) b = as_type(b, wide);

  ProjectGateWork work(call, std::move(a));
  const ProjectGateParams& p = work.p;
  const ProjectGatePlan plan = plan_project_gate(p);
  work.allocate(call, plan.chunks);
  const Scratch scratch(call, wide, project_gate_scratch(plan));
  const int64_t effort =
      work.elements() + p.rows * p.classes * plan.strips * plan.block_columns / 16;
  for_tasks(plan.strips * plan.chunks, effort, [&](int64_t begin, int64_t end) {
    kernels().project_gate(p, plan, begin, end, scratch.of_this_thread());
  });
  finish(*work.bias);
  return work.results;
}

std::tuple<Tensor, Tensor> gate(Tensor grad, Tensor saved, int64_t kind, double param) {
  const OpCall call = call_of("gate");
  check_gate(call, grad, saved, kind);
  GateWork work(call, grad, saved, kind, param);
  work.allocate(call, gate_chunks(work.p));
  for_tasks(gate_tasks(work.p), grad.numel(),
            [&](int64_t begin, int64_t end) { kernels().gate(work.p, begin, end); });
  finish(*work.bias);
  return {work.delta, work.bias->grads[0]};
}

void activate_(Tensor x, std::optional<Tensor> bias, int64_t kind, double param) {
  const ActivateParams p = activate_params(call_of("activate_"), x, bias, kind, param);
  torch::stable::parallel_for(0, p.elements, grain_elements, [&](int64_t begin, int64_t end) {
    kernels().activate(p, begin, end);
  });
}

// Multiplications that are worth a thread of their own: some 5 us.
constexpr int64_t grain_multiplications = 1 << 18;

// Independent products: tasks of all of them in one list.
void multiply(const OpCall& call, ScalarType type, const std::vector<GemmProblem>& problems) {
  const GemmParams p{problems.data(), static_cast<int64_t>(problems.size()),
                     type == ScalarType::Double ? DType::float64 : DType::float32};
  int64_t multiplications = 0;
  for (const GemmProblem& g : problems) multiplications += gemm_multiplications(g);
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t parts = max(1, min(threads, multiplications / grain_multiplications));
  const GemmPlan plan = plan_gemm(p, parts);
  if (plan.tasks == 0) return;
  const Scratch scratch(call, type, gemm_scratch(plan));
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    kernels().gemm(p, plan, gemm_first_task(p, plan, begin, parts),
                   gemm_first_task(p, plan, end, parts), scratch.of_this_thread());
  });
}

// The same of bfloat16 by weights in float, or into gradients in float.
void multiply_bf16(const OpCall& call, const std::vector<GemmProblem>& problems, bool gradients) {
  STD_TORCH_CHECK(multiplies_bfloat16(), call.op,
                  ": bfloat16 needs a processor with AVX-512 BF16, this one has ",
                  cpu_capability());
#if defined(__x86_64__)
  const Bf16GemmParams p{problems.data(), static_cast<int64_t>(problems.size()), gradients};
  int64_t multiplications = 0;
  for (const GemmProblem& g : problems) multiplications += gemm_multiplications(g);
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t parts = max(1, min(threads, multiplications / grain_multiplications));
  const GemmPlan plan = plan_bf16_gemm(p, parts);
  if (plan.tasks == 0) return;
  const Scratch scratch(call, ScalarType::Float, bf16_gemm_scratch(plan));
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    avx512_bf16::gemm_bf16(p, plan, gemm_first_task(cut_of(p), plan, begin, parts),
                           gemm_first_task(cut_of(p), plan, end, parts), scratch.of_this_thread());
  });
#endif
}

// Products each of which reads the result of the one before.
void multiply_chain(const OpCall& call, ScalarType type, const std::vector<GemmProblem>& problems) {
  const GemmParams p{problems.data(), static_cast<int64_t>(problems.size()),
                     type == ScalarType::Double ? DType::float64 : DType::float32};
  if (!chain_by_rows(p, static_cast<int64_t>(torch::stable::get_num_threads()))) {
    for (const GemmProblem& g : problems) multiply(call, type, {g});
    return;
  }
  int64_t multiplications_of_a_row = 0;
  for (const GemmProblem& g : problems) multiplications_of_a_row += g.columns * g.depth;
  const Scratch scratch(call, type, chain_scratch(p));
  const int64_t grain = max(chain_rows, grain_multiplications / max(multiplications_of_a_row, 1));
  torch::stable::parallel_for(0, problems[0].rows, grain, [&](int64_t begin, int64_t end) {
    kernels().linear_chain(p, begin, end, scratch.of_this_thread());
  });
}

std::vector<Tensor> linear_chain(Tensor x, std::vector<Tensor> weights,
                                 std::vector<std::optional<Tensor>> biases,
                                 std::vector<int64_t> kinds, std::vector<double> params) {
  const OpCall call = call_of("linear_chain");
  LinearChainWork work(call, x, weights, biases, kinds, params);
  if (x.scalar_type() == ScalarType::BFloat16) {
    for (const GemmProblem& g : work.problems) multiply_bf16(call, {g}, false);
  } else {
    multiply_chain(call, x.scalar_type(), work.problems);
  }
  return work.results;
}

std::vector<Tensor> weight_gradients(std::vector<Tensor> deltas, std::vector<Tensor> inputs) {
  const OpCall call = call_of("weight_gradients");
  if (deltas.empty() && inputs.empty()) return {};
  const bool narrow = !deltas.empty() && deltas[0].scalar_type() == ScalarType::BFloat16;
  WeightGradientsWork work(call, std::move(deltas), std::move(inputs));
  if (narrow) {
    multiply_bf16(call, work.problems, true);
  } else {
    multiply(call, work.results[0].scalar_type(), work.problems);
  }
  return work.results;
}

}  // namespace
}  // namespace fastdfa

STABLE_TORCH_LIBRARY_IMPL(fastdfa, CPU, m) {
  m.impl("fill_feedback_", TORCH_BOX(&fastdfa::fill_feedback_));
  m.impl("project_gate", TORCH_BOX(&fastdfa::project_gate));
  m.impl("gate", TORCH_BOX(&fastdfa::gate));
  m.impl("activate_", TORCH_BOX(&fastdfa::activate_));
  m.impl("linear_chain", TORCH_BOX(&fastdfa::linear_chain));
  m.impl("weight_gradients", TORCH_BOX(&fastdfa::weight_gradients));
}
