// The memory of the bias gradients, for the ops that make them.
#pragma once

#include "../gate.h"
#include "call.h"

namespace fastdfa {

// The bias gradients of a call, summed in a fixed order: within chunks of rows by the kernel, then
// over the chunks. Where there is one chunk only, its sum is the result.
struct BiasSums {
  std::vector<Tensor> grads;          // [n_l] each, accumulation type
  std::vector<SumChunksParams> sums;  // the second stage, one for each layer
  bool second_stage;
  Tensor partials;  // of all layers, each from a multiple of 256 bytes

  BiasSums(const OpCall& call, const std::vector<int64_t>& columns, int64_t chunks, DType dtype)
      : second_stage(chunks != 1) {
    const ScalarType type = accumulation_type(dtype);
    std::vector<int64_t> offsets;
    int64_t elements = 0;
    for (int64_t n : columns) {
      grads.push_back(call.empty({n}, type));
      offsets.push_back(elements);
      elements += round_up(chunks * n, 64);
    }
    if (second_stage) partials = call.empty({elements}, type);
    for (size_t l = 0; l < columns.size(); ++l) {
      void* const sum = grads[l].data_ptr();
      sums.push_back({second_stage ? at(partials, offsets[l]) : sum, sum, chunks, columns[l],
                      accumulation(dtype)});
    }
  }

  // Where the kernel puts the sums of layer l: [chunks, n_l].
  void* partial(size_t l) const { return const_cast<void*>(sums[l].partial); }

 private:
  static void* at(const Tensor& t, int64_t element) {
    return static_cast<char*>(t.data_ptr()) + element * static_cast<int64_t>(t.element_size());
  }
};

}  // namespace fastdfa
