// The entry points of the kernel files, one set for each capability. Ranges are of tasks (the plan
// of each op says of what) or, for activate, of elements, for linear_chain and layer_norm, of rows.
#pragma once

#include "../activate.h"
#include "../batch_norm.h"
#include "../fill_feedback.h"
#include "../gate.h"
#include "../gemm.h"
#include "../layer_norm.h"
#include "../project_gate.h"
#include "dispatch.h"

namespace fastdfa {

#define FASTDFA_DECLARE_KERNELS(capability)                                                        \
  namespace capability {                                                                           \
  void fill_feedback(const FillFeedbackParams& p, int64_t begin, int64_t end);                     \
  void project_gate(const ProjectGateParams& p, const ProjectGatePlan& plan, int64_t begin,        \
                    int64_t end, void* scratch);                                                   \
  void gate(const GateParams& p, int64_t begin, int64_t end);                                      \
  void sum_chunks(const SumChunksParams& p);                                                       \
  void activate(const ActivateParams& p, int64_t begin, int64_t end);                              \
  void gemm(const GemmParams& p, const GemmPlan& plan, int64_t begin, int64_t end, void* scratch); \
  void linear_chain(const GemmParams& p, int64_t begin, int64_t end, void* scratch);               \
  void batch_norm(const BatchNormParams& p, int64_t begin, int64_t end);                           \
  void batch_norm_backward(const BatchNormBackwardParams& p, int64_t begin, int64_t end);          \
  void layer_norm(const LayerNormParams& p, int64_t begin, int64_t end);                           \
  void layer_norm_backward(const LayerNormBackwardParams& p, int64_t begin, int64_t end);          \
  }
FASTDFA_DECLARE_KERNELS(baseline)
FASTDFA_DECLARE_KERNELS(avx2)
FASTDFA_DECLARE_KERNELS(avx512)
#undef FASTDFA_DECLARE_KERNELS

struct CpuKernels {
  decltype(baseline::fill_feedback)* fill_feedback;
  decltype(baseline::project_gate)* project_gate;
  decltype(baseline::gate)* gate;
  decltype(baseline::sum_chunks)* sum_chunks;
  decltype(baseline::activate)* activate;
  decltype(baseline::gemm)* gemm;
  decltype(baseline::linear_chain)* linear_chain;
  decltype(baseline::batch_norm)* batch_norm;
  decltype(baseline::batch_norm_backward)* batch_norm_backward;
  decltype(baseline::layer_norm)* layer_norm;
  decltype(baseline::layer_norm_backward)* layer_norm_backward;
};

#define FASTDFA_KERNELS(capability)                                                                \
  CpuKernels {                                                                                     \
    capability::fill_feedback, capability::project_gate, capability::gate, capability::sum_chunks, \
        capability::activate, capability::gemm, capability::linear_chain, capability::batch_norm,  \
        capability::batch_norm_backward, capability::layer_norm, capability::layer_norm_backward   \
  }

inline const CpuKernels& cpu_kernels(Capability capability) {
  static constexpr CpuKernels table[] = {
      FASTDFA_KERNELS(baseline),
#if defined(__x86_64__)
      FASTDFA_KERNELS(avx2),
      FASTDFA_KERNELS(avx512),
#endif
  };
  return table[static_cast<int>(capability)];
}
#undef FASTDFA_KERNELS

}  // namespace fastdfa
