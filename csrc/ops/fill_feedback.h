// The arguments of fill_feedback_.
#pragma once

#include "../fill_feedback.h"
#include "call.h"

namespace fastdfa {

inline FillFeedbackParams fill_feedback_params(const OpCall& call, const Tensor& out, int64_t seed,
                                               int64_t stream, int64_t distribution) {
  call.check_matrix("out", out);
  FillFeedbackParams p{};
  p.dtype = call.dtype_of("out", out);
  p.key = {static_cast<uint64_t>(seed), call.stream_of(stream), call.distribution_of(distribution)};
  p.classes = out.size(0), p.columns = out.size(1);
  STD_TORCH_CHECK(p.columns <= 1 || out.stride(1) == 1, call.op,
                  ": out must have unit stride along its columns, got stride ", out.stride(1));
  call.check_written({{"out", &out}}, {});
  p.out = out.data_ptr(), p.out_row = out.stride(0);
  return p;
}

}  // namespace fastdfa
