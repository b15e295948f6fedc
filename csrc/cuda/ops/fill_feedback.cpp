// The op fill_feedback_ on CUDA devices.
#include "../../ops/fill_feedback.h"

#include <torch/csrc/stable/library.h>

#include "call.h"

namespace fastdfa {
namespace {

void fill_feedback_(Tensor out, int64_t seed, int64_t stream, int64_t distribution) {
  const CudaCall call("fill_feedback_", "out", out);
  call.check(cuda::fill_feedback(fill_feedback_params(call, out, seed, stream, distribution),
                                 call.stream));
}

}  // namespace
}  // namespace fastdfa

STABLE_TORCH_LIBRARY_IMPL(fastdfa, CUDA, m) {
  m.impl("fill_feedback_", TORCH_BOX(&fastdfa::fill_feedback_));
}
