// The arguments of activate_.
#pragma once

#include <optional>

#include "../activate.h"
#include "call.h"

namespace fastdfa {

// `bias` becomes contiguous: it must outlive the params.
inline ActivateParams activate_params(const OpCall& call, const Tensor& x,
                                      std::optional<Tensor>& bias, int64_t kind, double param) {
  call.check_operand("x", x);
  ActivateParams p{};
  p.dtype = p.bias_dtype = call.dtype_of("x", x);
  STD_TORCH_CHECK(x.dim() >= 1, call.op, ": x must have at least one dimension, got shape ",
                  text(x));
  STD_TORCH_CHECK(x.is_contiguous(), call.op, ": x must be contiguous, got shape ", text(x));
  p.kind = call.activation_from_output(kind, param);
  p.param = param;
  p.x = x.data_ptr();
  p.elements = x.numel(), p.columns = x.size(x.dim() - 1);
  if (!bias) return p;
  call.check_vector("bias", *bias, p.columns, p.dtype);
  call.check_written({{"x", &x}}, {{"bias", &*bias}});
  p.bias_dtype = call.dtype_of("bias", *bias);
  bias = call.contiguous(*bias);
  p.bias = bias->data_ptr();
  return p;
}

}  // namespace fastdfa
