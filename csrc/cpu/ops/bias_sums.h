// The second stage of the bias gradients.
#pragma once

#include "../../ops/bias_sums.h"
#include "tasks.h"

namespace fastdfa {

inline void finish(const BiasSums& bias) {
  if (!bias.second_stage) return;
  for_tasks(static_cast<int64_t>(bias.sums.size()), bias.partials.numel(),
            [&](int64_t begin, int64_t end) {
              for (int64_t l = begin; l < end; ++l) kernels().sum_chunks(bias.sums[l]);
            });
}

}  // namespace fastdfa
