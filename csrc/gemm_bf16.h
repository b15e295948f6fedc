// c = f(a b + bias) or c = (a b) * f'(saved) of bfloat16, for processors with AVX-512 BF16; see
// gemm.h.
#pragma once

#include "gemm.h"

namespace fastdfa {

// a and saved are bfloat16, bias and sums float; and b float, c bfloat16, or, of weight gradients,
// the other way round.
struct Bf16GemmParams {
  const GemmProblem* problems;  // [count]
  int64_t count;
  bool gradients;
};

// The whole depth is summed in registers, unless c is float and can hold a sum. A panel of b takes
// up to half of an L2 cache of 1 MB.
constexpr int64_t bf16_gemm_depth = 512, bf16_most_panel = 1 << 17;

FASTDFA_INLINE GemmParams cut_of(const Bf16GemmParams& p) {
  return {p.problems, p.count, DType::bfloat16};
}

// Its panels hold pairs of bfloat16, 32 bits, which are what is multiplied.
FASTDFA_INLINE GemmPlan plan_bf16_gemm(const Bf16GemmParams& p, int64_t threads) {
  GemmPlan plan = plan_gemm(cut_of(p), threads);
  int64_t depth = 1;
  for (int64_t i = 0; i < p.count; ++i) depth = max(depth, p.problems[i].depth);
  const int64_t pairs = ceil_div(p.gradients ? min(depth, bf16_gemm_depth) : depth, 2);
  const int64_t most = max(bf16_most_panel / pairs / gemm_columns, 1) * gemm_columns;
  plan.block_columns = min(plan.block_columns, most);
  plan.panel_b = pairs * plan.block_columns;
  plan.panel_a = pairs * gemm_packed_rows;
  for (;;) {
    plan.tasks = 0;
    for (int64_t i = 0; i < p.count; ++i) plan.tasks += gemm_tasks(p.problems[i], plan);
    // Gradients of several layers differ in size: 10 tasks of 4x512 left one of two threads 10%
    // more than the other. Blocks of fewer rows only copy b once more.
    const bool even = threads == 1 || plan.tasks >= 16 * threads;
    if (!p.gradients || even || plan.block_rows <= gemm_packed_rows) return plan;
    plan.block_rows = round_up(ceil_div(plan.block_rows, 2), gemm_rows);
  }
}

// Numbers of 32 bits that one thread needs: the packed panels, and a tile of the product.
FASTDFA_INLINE int64_t bf16_gemm_scratch(const GemmPlan& plan) {
  return round_up(plan.panel_b + plan.panel_a + gemm_rows * gemm_columns, 64);
}

#if defined(__x86_64__)
namespace avx512_bf16 {
void gemm_bf16(const Bf16GemmParams& p, const GemmPlan& plan, int64_t begin, int64_t end,
               void* scratch);
}
#endif

}  // namespace fastdfa
