// The op linear_chain on the CPU.
#include "../../ops/linear_chain.h"

#include <torch/csrc/stable/library.h>

#include "products.h"

namespace fastdfa {
namespace {

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

Tensor without_negative_bit(const Tensor& t) {
  StableIValue stack[] = {torch::stable::detail::from(t)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::resolve_neg", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// torch's own fallback for views that are negated when they are read leaves out lists of optionals:
// biases would be taken with the wrong sign.
std::vector<Tensor> linear_chain_of_negated(Tensor x, std::vector<Tensor> weights,
                                            std::vector<std::optional<Tensor>> biases,
                                            std::vector<int64_t> kinds,
                                            std::vector<double> params) {
  for (Tensor& w : weights) w = without_negative_bit(w);
  for (std::optional<Tensor>& b : biases)
    if (b) b = without_negative_bit(*b);
  return linear_chain(without_negative_bit(x), std::move(weights), std::move(biases),
                      std::move(kinds), std::move(params));
}

}  // namespace
}  // namespace fastdfa

FASTDFA_IMPLEMENT(linear_chain)

STABLE_TORCH_LIBRARY_IMPL(fastdfa, Negative, m) {
  m.impl("linear_chain", TORCH_BOX(&fastdfa::linear_chain_of_negated));
}
