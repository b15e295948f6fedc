// The ops batch_norm and batch_norm_backward_ on CUDA devices.
#include "../../ops/batch_norm.h"

#include <torch/csrc/stable/library.h>

#include "call.h"

namespace fastdfa {
namespace {

std::tuple<Tensor, Tensor, Tensor> batch_norm(Tensor a, std::optional<Tensor> weight,
                                              std::optional<Tensor> bias,
                                              std::optional<Tensor> running_mean,
                                              std::optional<Tensor> running_var, bool training,
                                              double momentum, double eps, int64_t kind,
                                              double param) {
  const CudaCall call("batch_norm", "a", a);
  BatchNormWork work(call, a, weight, bias, running_mean, running_var, training, momentum, eps,
                     kind, param);
  call.check(cuda::batch_norm(work.p, call.stream));
  work.finish();
  return {work.h, work.mean, work.rstd};
}

std::tuple<Tensor, Tensor> batch_norm_backward_(Tensor delta, Tensor delta_sums, Tensor a,
                                                Tensor mean, Tensor rstd,
                                                std::optional<Tensor> weight, bool training) {
  const CudaCall call("batch_norm_backward_", "delta", delta);
  const BatchNormBackwardWork work(call, delta, delta_sums, a, mean, rstd, weight, training);
  call.check(cuda::batch_norm_backward(work.p, call.stream));
  return {work.weight_grad, work.a_sums};
}

}  // namespace
}  // namespace fastdfa

STABLE_TORCH_LIBRARY_IMPL(fastdfa, CUDA, m) {
  m.impl("batch_norm", TORCH_BOX(&fastdfa::batch_norm));
  m.impl("batch_norm_backward_", TORCH_BOX(&fastdfa::batch_norm_backward_));
}
