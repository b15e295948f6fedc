// The ops layer_norm and layer_norm_backward_ on CUDA devices.
#include "../../ops/layer_norm.h"

#include <torch/csrc/stable/library.h>

#include "call.h"

namespace fastdfa {
namespace {

std::tuple<Tensor, Tensor, Tensor> layer_norm(Tensor a, std::optional<Tensor> weight,
                                              std::optional<Tensor> bias, double eps, int64_t kind,
                                              double param) {
  const CudaCall call("layer_norm", "a", a);
  const LayerNormWork work(call, a, weight, bias, eps, kind, param);
  call.check(cuda::layer_norm(work.p, call.stream));
  return {work.h, work.mean, work.rstd};
}

std::tuple<Tensor, Tensor> layer_norm_backward_(Tensor delta, Tensor a, Tensor mean, Tensor rstd,
                                                std::optional<Tensor> weight) {
  const CudaCall call("layer_norm_backward_", "delta", delta);
  LayerNormBackwardWork work(call, delta, a, mean, rstd, weight);
  work.allocate(call, cuda::layer_norm_backward_chunks(work.p));
  const Tensor row_means = call.empty({2, work.p.rows}, accumulation_type(work.p.dtype));
  work.p.row_means = row_means.data_ptr();
  call.check(cuda::layer_norm_backward(work.p, call.stream));
  call.finish(*work.sums);
  return {work.sums->grads[0], work.sums->grads[1]};
}

}  // namespace
}  // namespace fastdfa

STABLE_TORCH_LIBRARY_IMPL(fastdfa, CUDA, m) {
  m.impl("layer_norm", TORCH_BOX(&fastdfa::layer_norm));
  m.impl("layer_norm_backward_", TORCH_BOX(&fastdfa::layer_norm_backward_));
}
