// The op project_gate on the CPU.
#include "../../ops/project_gate.h"

#include <torch/csrc/stable/library.h>

#include "bias_sums.h"

namespace fastdfa {
namespace {

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
  a.error = as_type(call, a.error, wide);
  for (Tensor& b : a.feedback) b = as_type(call, b, wide);

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

}  // namespace
}  // namespace fastdfa

FASTDFA_IMPLEMENT(project_gate)
