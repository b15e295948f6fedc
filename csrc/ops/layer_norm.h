// The arguments of layer_norm and its backward, their checks and their results.
#pragma once

#include "../layer_norm.h"
#include "bias_sums.h"
#include "norm.h"

namespace fastdfa {

class LayerNormWork {
 public:
  LayerNormParams p{};
  Tensor h, mean, rstd;

  LayerNormWork(const OpCall& call, const Tensor& a, std::optional<Tensor> weight,
                std::optional<Tensor> bias, double eps, int64_t kind, double param)
      : weight(std::move(weight)), bias(std::move(bias)) {
    call.check_matrix("a", a);
    p.dtype = call.dtype_of("a", a);
    p.kind = call.activation_from_output(kind, param), p.param = param, p.eps = eps;
    p.rows = a.size(0), p.columns = a.size(1);
    STD_TORCH_CHECK(p.columns > 0, call.op, ": a must have columns, got shape ", text(a));
    prepare(call, "weight", this->weight, p.columns, p.dtype);
    prepare(call, "bias", this->bias, p.columns, p.dtype);
    this->a = with_unit_columns(call, a);
    p.a = this->a.data_ptr(), p.a_row = this->a.stride(0);
    p.weight = data_or_null(this->weight), p.bias = data_or_null(this->bias);
    h = call.empty({p.rows, p.columns}, a.scalar_type());
    mean = call.empty({p.rows}, accumulation_type(p.dtype));
    rstd = call.empty({p.rows}, accumulation_type(p.dtype));
    p.h = h.data_ptr(), p.mean = mean.data_ptr(), p.rstd = rstd.data_ptr();
  }

 private:
  Tensor a;
  std::optional<Tensor> weight, bias;
};

class LayerNormBackwardWork {
 public:
  LayerNormBackwardParams p{};
  std::optional<BiasSums> sums;  // the gradient of the weight, and the sum of that of a

  LayerNormBackwardWork(const OpCall& call, const Tensor& delta, const Tensor& a,
                        const Tensor& mean, const Tensor& rstd, const std::optional<Tensor>& weight)
      : weight(weight) {
    check_delta(call, delta, a);
    this->a = with_unit_columns(call, a);
    p.dtype = call.dtype_of("delta", delta);
    p.rows = delta.size(0), p.columns = delta.size(1);
    STD_TORCH_CHECK(p.columns > 0, call.op, ": delta must have columns, got shape ", text(delta));
    call.check_vector("mean", mean, p.rows, p.dtype);
    call.check_vector("rstd", rstd, p.rows, p.dtype);
    this->mean = as_kernels_read(call, mean, p.dtype),
    this->rstd = as_kernels_read(call, rstd, p.dtype);
    prepare(call, "weight", this->weight, p.columns, p.dtype);
    call.check_written({{"delta", &delta}},
                       {{"a", &a}, {"mean", &mean}, {"rstd", &rstd}, {"weight", or_null(weight)}});
    p.delta = delta.data_ptr(), p.delta_row = delta.stride(0);
    p.a = this->a.data_ptr(), p.a_row = this->a.stride(0);
    p.mean = this->mean.data_ptr(), p.rstd = this->rstd.data_ptr();
    p.weight = data_or_null(this->weight);
  }

  void allocate(const OpCall& call, int64_t chunks) {
    sums.emplace(call, std::vector{p.columns, p.columns}, chunks, p.dtype);
    p.weight_partial = sums->partial(0), p.a_partial = sums->partial(1);
  }

 private:
  Tensor a, mean, rstd;
  std::optional<Tensor> weight;
};

}  // namespace fastdfa
