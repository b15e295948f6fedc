// The products of linear_chain, weight_gradients and backpropagate, shared out among threads.
#pragma once

#include "../../gemm_bf16.h"
#include "tasks.h"

namespace fastdfa {

// Multiplications that are worth a thread of their own: some 5 us.
constexpr int64_t grain_multiplications = 1 << 18;

// Independent products: tasks of all of them in one list.
inline void multiply(const OpCall& call, ScalarType type,
                     const std::vector<GemmProblem>& problems) {
  const GemmParams p{problems.data(), static_cast<int64_t>(problems.size()),
                     type == ScalarType::Double ? DType::float64 : DType::float32};
  int64_t multiplications = 0;
  for (const GemmProblem& g : problems) multiplications += gemm_multiplications(g);
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t parts = max(1, min(threads, multiplications / grain_multiplications));
  const GemmPlan plan = plan_gemm(p, parts);
  if (plan.tasks == 0) return;
  const Scratch scratch(call, type, gemm_scratch(plan));
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    kernels().gemm(p, plan, gemm_first_task(p, plan, begin, parts),
                   gemm_first_task(p, plan, end, parts), scratch.of_this_thread());
  });
}

// The same of bfloat16 by weights in float, or into gradients in float.
inline void multiply_bf16(const OpCall& call, const std::vector<GemmProblem>& problems,
                          bool gradients) {
  STD_TORCH_CHECK(multiplies_bfloat16(), call.op,
                  ": bfloat16 needs a processor with AVX-512 BF16, this one has ",
                  cpu_capability());
#if defined(__x86_64__)
  const Bf16GemmParams p{problems.data(), static_cast<int64_t>(problems.size()), gradients};
  int64_t multiplications = 0;
  for (const GemmProblem& g : problems) multiplications += gemm_multiplications(g);
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t parts = max(1, min(threads, multiplications / grain_multiplications));
  const GemmPlan plan = plan_bf16_gemm(p, parts);
  if (plan.tasks == 0) return;
  const Scratch scratch(call, ScalarType::Float, bf16_gemm_scratch(plan));
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    avx512_bf16::gemm_bf16(p, plan, gemm_first_task(cut_of(p), plan, begin, parts),
                           gemm_first_task(cut_of(p), plan, end, parts), scratch.of_this_thread());
  });
#endif
}

}  // namespace fastdfa
