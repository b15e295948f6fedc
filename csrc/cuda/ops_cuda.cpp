// The ops on CUDA devices: on the device of their tensors, on that device's current stream. Nothing
// here waits for the device, so a step runs ahead of it and can be captured in a CUDA graph.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../op_arguments.h"
#include "kernels.h"

namespace fastdfa {
namespace {

// A call on the device of its first argument; that device is the current one as long as it lives.
class CudaCall : public OpCall {
 public:
  CudaCall(const char* op, const char* name, const Tensor& first)
      : OpCall{op, Device::of(first)}, guard(checked_index(name, first)) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device.index, &current));
    stream = static_cast<cuda::Stream>(current);
  }

  // Of what a launcher returned.
  void check(int code) const {
    STD_TORCH_CHECK(code == 0, op, ": CUDA error: ", cuda::error_text(code));
  }

  void finish(const BiasSums& bias) const {
    if (bias.second_stage)
      check(cuda::sum_chunks(bias.sums.data(), static_cast<int64_t>(bias.sums.size()), stream));
  }

  cuda::Stream stream;

 private:
  int32_t checked_index(const char* name, const Tensor& first) const {
    STD_TORCH_CHECK(first.is_cuda(), op, ": ", name, " must be on a CUDA device, got ",
                    text(device));
    return device.index;
  }

  torch::stable::accelerator::DeviceGuard guard;
};

void fill_feedback_(Tensor out, int64_t seed, int64_t stream, int64_t distribution) {
  const CudaCall call("fill_feedback_", "out", out);
  call.check(cuda::fill_feedback(fill_feedback_params(call, out, seed, stream, distribution),
                                 call.stream));
}

// The kernels read an error of any dtype as it is, but for what they do not accumulate in.
Tensor readable(const Tensor& error, DType dtype) {
  const bool wide = error.scalar_type() == ScalarType::Double;
  return wide == (dtype == DType::float64) ? error : as_type(error, accumulation_type(dtype));
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
  a.error = readable(a.error, call.dtype_of("saved[0]", a.saved[0]));

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

std::tuple<Tensor, Tensor> gate(Tensor grad, Tensor saved, int64_t kind, double param) {
  const CudaCall call("gate", "grad", grad);
  check_gate(call, grad, saved, kind);
  GateWork work(call, grad, saved, kind, param);
  work.allocate(call, cuda::gate_chunks(work.p));
  call.check(cuda::gate(work.p, call.stream));
  call.finish(*work.bias);
  return {work.delta, work.bias->grads[0]};
}

void activate_(Tensor x, std::optional<Tensor> bias, int64_t kind, double param) {
  const CudaCall call("activate_", "x", x);
  call.check(cuda::activate(activate_params(call, x, bias, kind, param), call.stream));
}

}  // namespace
}  // namespace fastdfa

STABLE_TORCH_LIBRARY_IMPL(fastdfa, CUDA, m) {
  m.impl("fill_feedback_", TORCH_BOX(&fastdfa::fill_feedback_));
  m.impl("project_gate", TORCH_BOX(&fastdfa::project_gate));
  m.impl("gate", TORCH_BOX(&fastdfa::gate));
  m.impl("activate_", TORCH_BOX(&fastdfa::activate_));
}
