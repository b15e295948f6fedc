// The op weight_gradients on the CPU.
#include "../../ops/weight_gradients.h"

#include <torch/csrc/stable/library.h>

#include "products.h"

namespace fastdfa {
namespace {

std::vector<Tensor> weight_gradients(std::vector<Tensor> deltas, std::vector<Tensor> inputs) {
  const OpCall call = call_of("weight_gradients");
  if (deltas.empty() && inputs.empty()) return {};
  WeightGradientsWork work(call, std::move(deltas), std::move(inputs));
  if (work.type == ScalarType::BFloat16) {
    multiply_bf16(call, work.problems, true);
  } else {
    multiply(call, work.type, work.problems);
  }
  return work.results;
}

}  // namespace
}  // namespace fastdfa

FASTDFA_IMPLEMENT(weight_gradients)
