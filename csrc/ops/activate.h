// The arguments of activate_.
#pragma once

#include <optional>

#include "../activate.h"
#include "call.h"

namespace fastdfa {

// `bias` becomes contiguous: it must outlive the params.
inline ActivateParams activate_params(const OpCall& call, const Tensor& x,
                                      std::optional<Tensor>& bias, int64_t kind, double param) {
  call.check_device("x", x);
  ActivateParams p{};
  p.dtype = p.bias_dtype = call.dtype_of("x", x);
  STD_TORCH_CHECK(x.dim() >= 1, call.op, ": x must have at least one dimension, got shape ",
                  text(x));
  STD_TORCH_CHECK(x.is_contiguous(), call.op, ": x must be contiguous, got shape ", text(x));
  p.kind = call.activation_of(kind);
  STD_TORCH_CHECK(derivative_from_output(p.kind), call.op,
                  ": kind must be one whose derivative is a function of the output (0 .. 6), got ",
                  kind);
  p.param = param;
  p.x = x.data_ptr();
  p.elements = x.numel(), p.columns = x.size(x.dim() - 1);
  if (!bias) return p;
  call.check_device("bias", *bias);
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == p.columns, call.op,
                  ": bias must have shape [", p.columns, "], got ", text(*bias));
  if (bias->scalar_type() != x.scalar_type())
    call.check_dtype("bias", *bias, accumulation_type(p.dtype));
  p.bias_dtype = call.dtype_of("bias", *bias);
  bias = torch::stable::contiguous(*bias);
  p.bias = bias->data_ptr();
  return p;
}

}  // namespace fastdfa
