// The op project_gate on CUDA devices.
#include "../../ops/project_gate.h"

#include <torch/csrc/stable/library.h>

#include "call.h"

namespace fastdfa {
namespace {

// The kernels read an error of any dtype as it is, but for what they do not accumulate in.
Tensor readable(const OpCall& call, const Tensor& error, DType dtype) {
  const bool wide = error.scalar_type() == ScalarType::Double;
  return wide == (dtype == DType::float64) ? error : as_type(call, error, accumulation_type(dtype));
}

std::vector<Tensor> project_gate(Tensor error, std::vector<Tensor> feedback, int64_t seed,
                                 std::vector<int64_t> streams, int64_t distribution,
                                 std::vector<Tensor> saved, std::vector<int64_t> kinds,
                                 std::vector<double> params, std::vector<double> scales,
                                 bool sum_error, bool allow_tf32) {
  const CudaCall call("project_gate", "error", error);
  ProjectGateArguments a{std::move(error),   std::move(feedback), seed,
                         std::move(streams), distribution,        std::move(saved),
                         std::move(kinds),   std::move(params),   std::move(scales),
                         sum_error,          allow_tf32};
  check_project_gate(call, a);
  if (a.saved.empty()) return {};
  a.error = readable(call, a.error, call.dtype_of("saved[0]", a.saved[0]));

  ProjectGateWork work(call, std::move(a));
  const cuda::ProjectGatePlan plan = cuda::plan_project_gate(work.p);
  work.allocate(call, plan.chunks);
  Tensor scratch;
  if (plan.scratch_bytes > 0) scratch = call.empty({plan.scratch_bytes}, ScalarType::Byte);
  void* const scratch_data = plan.scratch_bytes > 0 ? scratch.data_ptr() : nullptr;
  call.check(cuda::project_gate(work.p, plan, scratch_data, call.stream));
  call.finish(*work.bias);
  return work.results;
}

}  // namespace
}  // namespace fastdfa

STABLE_TORCH_LIBRARY_IMPL(fastdfa, CUDA, m) {
  m.impl("project_gate", TORCH_BOX(&fastdfa::project_gate));
}
