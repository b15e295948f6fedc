// The op fill_feedback_ on the CPU.
#include "../../ops/fill_feedback.h"

#include <torch/csrc/stable/library.h>

#include "tasks.h"

namespace fastdfa {
namespace {

void fill_feedback_(Tensor out, int64_t seed, int64_t stream, int64_t distribution) {
  const FillFeedbackParams p =
      fill_feedback_params(call_of("fill_feedback_"), out, seed, stream, distribution);
  for_tasks(fill_tasks(p), 4 * out.numel(),
            [&](int64_t begin, int64_t end) { kernels().fill_feedback(p, begin, end); });
}

}  // namespace
}  // namespace fastdfa

FASTDFA_IMPLEMENT(fill_feedback_)
