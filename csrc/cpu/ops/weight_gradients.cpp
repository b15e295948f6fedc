// The op weight_gradients on the CPU.
#include "../../ops/weight_gradients.h"

#include <torch/csrc/stable/library.h>

#include "products.h"

namespace fastdfa {
namespace {

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
  m.impl("weight_gradients", TORCH_BOX(&fastdfa::weight_gradients));
}
