// The op activate_ on CUDA devices.
#include "../../ops/activate.h"

#include <torch/csrc/stable/library.h>

#include "call.h"

namespace fastdfa {
namespace {

void activate_(Tensor x, std::optional<Tensor> bias, int64_t kind, double param) {
  const CudaCall call("activate_", "x", x);
  call.check(cuda::activate(activate_params(call, x, bias, kind, param), call.stream));
}

}  // namespace
}  // namespace fastdfa

STABLE_TORCH_LIBRARY_IMPL(fastdfa, CUDA, m) { m.impl("activate_", TORCH_BOX(&fastdfa::activate_)); }
