// The ops batch_norm and batch_norm_backward_ on the CPU.
#include "../../ops/batch_norm.h"

#include <torch/csrc/stable/library.h>

#include "tasks.h"

namespace fastdfa {
namespace {

std::tuple<Tensor, Tensor, Tensor> batch_norm(Tensor a, std::optional<Tensor> weight,
                                              std::optional<Tensor> bias,
                                              std::optional<Tensor> running_mean,
                                              std::optional<Tensor> running_var, bool training,
                                              double momentum, double eps, int64_t kind,
                                              double param) {
  BatchNormWork work(call_of("batch_norm"), a, weight, bias, running_mean, running_var, training,
                     momentum, eps, kind, param);
  for_tasks(batch_norm_tasks(work.p.columns), a.numel(),
            [&](int64_t begin, int64_t end) { kernels().batch_norm(work.p, begin, end); });
  work.finish();
  return {work.h, work.mean, work.rstd};
}

std::tuple<Tensor, Tensor> batch_norm_backward_(Tensor delta, Tensor delta_sums, Tensor a,
                                                Tensor mean, Tensor rstd,
                                                std::optional<Tensor> weight, bool training) {
  const BatchNormBackwardWork work(call_of("batch_norm_backward_"), delta, delta_sums, a, mean,
                                   rstd, weight, training);
  for_tasks(batch_norm_tasks(work.p.columns), a.numel(),
            [&](int64_t begin, int64_t end) { kernels().batch_norm_backward(work.p, begin, end); });
  return {work.weight_grad, work.a_sums};
}

}  // namespace
}  // namespace fastdfa

FASTDFA_IMPLEMENT(batch_norm)
FASTDFA_IMPLEMENT(batch_norm_backward_)
