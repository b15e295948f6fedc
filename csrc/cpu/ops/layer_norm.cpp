// The ops layer_norm and layer_norm_backward_ on the CPU.
#include "../../ops/layer_norm.h"

#include <torch/csrc/stable/library.h>

#include "bias_sums.h"

namespace fastdfa {
namespace {

std::tuple<Tensor, Tensor, Tensor> layer_norm(Tensor a, std::optional<Tensor> weight,
                                              std::optional<Tensor> bias, double eps, int64_t kind,
                                              double param) {
  const LayerNormWork work(call_of("layer_norm"), a, weight, bias, eps, kind, param);
  for_tasks(work.p.rows, a.numel(),
            [&](int64_t begin, int64_t end) { kernels().layer_norm(work.p, begin, end); });
  return {work.h, work.mean, work.rstd};
}

std::tuple<Tensor, Tensor> layer_norm_backward_(Tensor delta, Tensor a, Tensor mean, Tensor rstd,
                                                std::optional<Tensor> weight) {
  const OpCall call = call_of("layer_norm_backward_");
  LayerNormBackwardWork work(call, delta, a, mean, rstd, weight);
  const int64_t chunks = layer_norm_chunks(work.p.rows);
  work.allocate(call, chunks);
  for_tasks(chunks, a.numel(),
            [&](int64_t begin, int64_t end) { kernels().layer_norm_backward(work.p, begin, end); });
  finish(*work.sums);
  return {work.sums->grads[0], work.sums->grads[1]};
}

}  // namespace
}  // namespace fastdfa

FASTDFA_IMPLEMENT(layer_norm)
FASTDFA_IMPLEMENT(layer_norm_backward_)
