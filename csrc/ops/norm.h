// What the arguments of batch_norm and layer_norm share.
#pragma once

#include <optional>

#include "call.h"

namespace fastdfa {

// What is per column, or per row, as the kernels read it: contiguous, in the accumulation type.
inline Tensor as_kernels_read(const OpCall& call, const Tensor& t, DType dtype) {
  const Tensor wide = as_type(call, t, accumulation_type(dtype));
  return wide.is_contiguous() ? wide : call.contiguous(wide);
}

inline const Tensor* or_null(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }

inline const void* data_or_null(const std::optional<Tensor>& t) {
  return t ? t->data_ptr() : nullptr;
}

// Checks an argument that may be None, and replaces it by what the kernels read.
inline void prepare(const OpCall& call, const char* name, std::optional<Tensor>& t, int64_t n,
                    DType dtype) {
  if (!t) return;
  call.check_vector(name, *t, n, dtype);
  t = as_kernels_read(call, *t, dtype);
}

// Delta is overwritten where it lies.
inline void check_delta(const OpCall& call, const Tensor& delta, const Tensor& a) {
  call.check_matrix("delta", delta);
  call.check_matrix("a", a);
  call.dtype_of("delta", delta);
  call.check_dtype("a", a, delta.scalar_type());
  STD_TORCH_CHECK(a.size(0) == delta.size(0) && a.size(1) == delta.size(1), call.op,
                  ": a must have the shape of delta, ", text(delta), ", got ", text(a));
  STD_TORCH_CHECK(delta.size(1) <= 1 || delta.stride(1) == 1, call.op,
                  ": delta must have contiguous rows");
}

}  // namespace fastdfa
