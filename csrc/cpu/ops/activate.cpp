// The op activate_ on the CPU.
#include "../../ops/activate.h"

#include <torch/csrc/stable/library.h>

#include "tasks.h"

namespace fastdfa {
namespace {

void activate_(Tensor x, std::optional<Tensor> bias, int64_t kind, double param) {
  const ActivateParams p = activate_params(call_of("activate_"), x, bias, kind, param);
  torch::stable::parallel_for(0, p.elements, grain_elements, [&](int64_t begin, int64_t end) {
    kernels().activate(p, begin, end);
  });
}

}  // namespace
}  // namespace fastdfa

FASTDFA_IMPLEMENT(activate_)
