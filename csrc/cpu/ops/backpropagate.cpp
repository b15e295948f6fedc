// The op backpropagate on the CPU.
#include "../../ops/backpropagate.h"

#include <torch/csrc/stable/library.h>

#include "bias_sums.h"
#include "products.h"

namespace fastdfa {
namespace {

std::vector<Tensor> backpropagate(Tensor delta, std::vector<Tensor> weights,
                                  std::vector<Tensor> saved, std::vector<int64_t> kinds,
                                  std::vector<double> params) {
  const OpCall call = call_of("backpropagate");
  BackpropagateWork work(call, delta, std::move(weights), std::move(saved), kinds, params);
  const ScalarType type = delta.scalar_type();
  for (const GemmProblem& g : work.problems)
    type == ScalarType::BFloat16 ? multiply_bf16(call, {g}, false) : multiply(call, type, {g});
  finish(*work.sums);
  return work.results;
}

}  // namespace
}  // namespace fastdfa

FASTDFA_IMPLEMENT(backpropagate)
