// The op gate on CUDA devices.
#include "../../ops/gate.h"

#include <torch/csrc/stable/library.h>

#include "call.h"

namespace fastdfa {
namespace {

std::tuple<Tensor, Tensor> gate(Tensor grad, Tensor saved, int64_t kind, double param) {
  const CudaCall call("gate", "grad", grad);
  check_gate(call, grad, saved, kind, param);
  GateWork work(call, grad, saved, kind, param);
  work.allocate(call, cuda::gate_chunks(work.p));
  call.check(cuda::gate(work.p, call.stream));
  call.finish(*work.bias);
  return {work.delta, work.bias->grads[0]};
}

}  // namespace
}  // namespace fastdfa

STABLE_TORCH_LIBRARY_IMPL(fastdfa, CUDA, m) { m.impl("gate", TORCH_BOX(&fastdfa::gate)); }
