// How the ops on the CPU cut their work into tasks for parallel_for.
#pragma once

#include "../../ops/call.h"
#include "../kernels.h"

// Implements an op for the CPU, and for every kind of tensor that nothing else is implemented for:
// sparse, nested, quantized, on other devices. check_operand refuses these by name.
#define FASTDFA_IMPLEMENT(op)                                                    \
  STABLE_TORCH_LIBRARY_IMPL(fastdfa, CompositeExplicitAutograd, m) {             \
    m.impl(#op, TORCH_BOX(&fastdfa::op));                                        \
  }                                                                              \
  STABLE_TORCH_LIBRARY_IMPL(fastdfa, CompositeImplicitAutogradNestedTensor, m) { \
    m.impl(#op, TORCH_BOX(&fastdfa::op));                                        \
  }

namespace fastdfa {

// Elements that are worth a thread of their own: some 10 us.
constexpr int64_t grain_elements = 32768;

inline const CpuKernels& kernels() { return cpu_kernels(capability()); }

inline OpCall call_of(const char* op) { return {op, {aoti_torch_device_type_cpu(), 0}}; }

// Runs f(begin, end) over tasks that together handle `elements`.
template <class F> void for_tasks(int64_t tasks, int64_t elements, const F& f) {
  if (tasks == 0) return;
  const int64_t each = max(1, elements / tasks);
  torch::stable::parallel_for(0, tasks, max(1, grain_elements / each), f);
}

// Scratch for every thread of a parallel_for.
class Scratch {
 public:
  Scratch(const OpCall& call, ScalarType type, int64_t elements)
      : memory(
            call.empty({static_cast<int64_t>(torch::stable::get_num_threads()), elements}, type)),
        bytes(elements * static_cast<int64_t>(memory.element_size())) {}

  void* of_this_thread() const {
    uint32_t thread = 0;
    TORCH_ERROR_CODE_CHECK(torch_get_thread_idx(&thread));
    return static_cast<char*>(memory.data_ptr()) + thread * bytes;
  }

 private:
  Tensor memory;
  int64_t bytes;
};

}  // namespace fastdfa
