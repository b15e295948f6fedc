// A call of an op on a CUDA device: on the device of its tensors, on that device's current stream.
// Nothing here waits for the device, so a step runs ahead of it and can be captured in a CUDA
// graph.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../../ops/bias_sums.h"
#include "../kernels.h"

namespace fastdfa {

// A call on the device of its first argument; that device is the current one as long as it lives.
class CudaCall : public OpCall {
 public:
  CudaCall(const char* op, const char* name, const Tensor& first)
      : OpCall{op, Device::of(first)}, guard(checked_index(name, first)) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device.index, &current));
    stream = static_cast<cuda::Stream>(current);
  }

  // Of what a launcher returned.
  void check(int code) const {
    STD_TORCH_CHECK(code == 0, op, ": CUDA error: ", cuda::error_text(code));
  }

  void finish(const BiasSums& bias) const {
    if (bias.second_stage)
      check(cuda::sum_chunks(bias.sums.data(), static_cast<int64_t>(bias.sums.size()), stream));
  }

  cuda::Stream stream;

 private:
  int32_t checked_index(const char* name, const Tensor& first) const {
    STD_TORCH_CHECK(first.is_cuda(), op, ": ", name, " must be on a CUDA device, got ",
                    text(device));
    return device.index;
  }

  torch::stable::accelerator::DeviceGuard guard;
};

}  // namespace fastdfa
