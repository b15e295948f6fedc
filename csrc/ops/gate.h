// The arguments of gate, their checks and its results.
#pragma once

#include <optional>

#include "../gate.h"
#include "bias_sums.h"

namespace fastdfa {

inline void check_gate(const OpCall& call, const Tensor& grad, const Tensor& saved, int64_t kind,
                       double param) {
  call.check_matrix("grad", grad);
  call.check_matrix("saved", saved);
  call.dtype_of("grad", grad);
  call.check_dtype("saved", saved, grad.scalar_type());
  STD_TORCH_CHECK(grad.size(0) == saved.size(0) && grad.size(1) == saved.size(1), call.op,
                  ": saved must have the shape of grad, ", text(grad), ", got ", text(saved));
  call.activation_of(kind, param);
}

// As ProjectGateWork.
class GateWork {
 public:
  GateParams p{};

  GateWork(const OpCall& call, const Tensor& grad, const Tensor& saved, int64_t kind, double param)
      : grad(with_unit_columns(call, grad)), saved(saved) {
    p.dtype = call.dtype_of("grad", grad);
    p.kind = call.activation_of(kind, param), p.param = param;
    if (p.kind != Activation::identity) this->saved = with_unit_columns(call, saved);
    p.grad = this->grad.data_ptr(), p.grad_row = this->grad.stride(0);
    p.saved = this->saved.data_ptr(), p.saved_row = this->saved.stride(0);
    p.rows = grad.size(0), p.columns = grad.size(1);
  }

  void allocate(const OpCall& call, int64_t chunks) {
    delta = call.empty({p.rows, p.columns}, grad.scalar_type());
    bias.emplace(call, std::vector{p.columns}, chunks, p.dtype);
    p.delta = delta.data_ptr(), p.bias_partial = bias->partial(0);
  }

  Tensor delta;
  std::optional<BiasSums> bias;

 private:
  Tensor grad, saved;
};

}  // namespace fastdfa
