// The op gate on the CPU.
#include "../../ops/gate.h"

#include <torch/csrc/stable/library.h>

#include "bias_sums.h"

namespace fastdfa {
namespace {

std::tuple<Tensor, Tensor> gate(Tensor grad, Tensor saved, int64_t kind, double param) {
  const OpCall call = call_of("gate");
  check_gate(call, grad, saved, kind, param);
  GateWork work(call, grad, saved, kind, param);
  work.allocate(call, gate_chunks(work.p));
  for_tasks(gate_tasks(work.p), grad.numel(),
            [&](int64_t begin, int64_t end) { kernels().gate(work.p, begin, end); });
  finish(*work.bias);
  return {work.delta, work.bias->grads[0]};
}

}  // namespace
}  // namespace fastdfa

FASTDFA_IMPLEMENT(gate)
