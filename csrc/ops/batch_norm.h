// The arguments of batch_norm and its backward, their checks and their results.
#pragma once

#include "../batch_norm.h"
#include "norm.h"

namespace fastdfa {

class BatchNormWork {
 public:
  BatchNormParams p{};
  Tensor h, mean, rstd;

  BatchNormWork(const OpCall& call, const Tensor& a, const std::optional<Tensor>& weight,
                const std::optional<Tensor>& bias, std::optional<Tensor> running_mean,
                std::optional<Tensor> running_var, bool training, double momentum, double eps,
                int64_t kind, double param)
      : weight(weight),
        bias(bias),
        given{std::move(running_mean), std::move(running_var)},
        running{given[0], given[1]} {
    call.check_matrix("a", a);
    p.dtype = call.dtype_of("a", a);
    p.kind = call.activation_from_output(kind, param), p.param = param;
    p.rows = a.size(0), p.columns = a.size(1);
    p.training = training, p.momentum = momentum, p.eps = eps;
    check_statistics(call);
    prepare(call, "weight", this->weight, p.columns, p.dtype);
    prepare(call, "bias", this->bias, p.columns, p.dtype);
    if (training)
      call.check_written({{"running_mean", or_null(given[0])}, {"running_var", or_null(given[1])}},
                         {{"a", &a}, {"weight", or_null(weight)}, {"bias", or_null(bias)}});
    this->a = with_unit_columns(call, a);
    p.a = this->a.data_ptr(), p.a_row = this->a.stride(0);
    p.weight = data_or_null(this->weight), p.bias = data_or_null(this->bias);
    p.running_mean = const_cast<void*>(data_or_null(running[0]));
    p.running_var = const_cast<void*>(data_or_null(running[1]));
    h = call.empty({p.rows, p.columns}, a.scalar_type());
    mean = call.empty({p.columns}, accumulation_type(p.dtype));
    rstd = call.empty({p.columns}, accumulation_type(p.dtype));
    p.h = h.data_ptr(), p.mean = mean.data_ptr(), p.rstd = rstd.data_ptr();
  }

  // Puts moved statistics where they were given, if the kernel moved copies.
  void finish() {
    if (!p.training) return;
    for (int i = 0; i < 2; ++i)
      if (given[i] && given[i]->data_ptr() != running[i]->data_ptr())
        torch::stable::copy_(*given[i], *running[i]);
  }

 private:
  void check_statistics(const OpCall& call) {
    STD_TORCH_CHECK(!p.training || p.rows > 1, call.op,
                    ": Expected more than 1 value per channel when training, got input size [",
                    p.rows, ", ", p.columns, "]");
    STD_TORCH_CHECK(given[0].has_value() == given[1].has_value(), call.op,
                    ": running_mean and running_var must both be given, or none");
    STD_TORCH_CHECK(p.training || given[0], call.op,
                    ": running_mean and running_var must be given where training is false");
    prepare(call, "running_mean", running[0], p.columns, p.dtype);
    prepare(call, "running_var", running[1], p.columns, p.dtype);
  }

  Tensor a;
  std::optional<Tensor> weight, bias, given[2], running[2];
};

class BatchNormBackwardWork {
 public:
  BatchNormBackwardParams p{};
  Tensor weight_grad, a_sums;

  BatchNormBackwardWork(const OpCall& call, const Tensor& delta, const Tensor& delta_sums,
                        const Tensor& a, const Tensor& mean, const Tensor& rstd,
                        const std::optional<Tensor>& weight, bool training)
      : weight(weight) {
    check_delta(call, delta, a);
    this->a = with_unit_columns(call, a);
    p.dtype = call.dtype_of("delta", delta);
    p.rows = delta.size(0), p.columns = delta.size(1), p.training = training;
    const Tensor* const given[] = {&delta_sums, &mean, &rstd};
    const char* const names[] = {"delta_sums", "mean", "rstd"};
    for (int i = 0; i < 3; ++i) {
      call.check_vector(names[i], *given[i], p.columns, p.dtype);
      read[i] = as_kernels_read(call, *given[i], p.dtype);
    }
    prepare(call, "weight", this->weight, p.columns, p.dtype);
    call.check_written({{"delta", &delta}}, {{"a", &a},
                                             {"delta_sums", &delta_sums},
                                             {"mean", &mean},
                                             {"rstd", &rstd},
                                             {"weight", or_null(weight)}});
    p.delta = delta.data_ptr(), p.delta_row = delta.stride(0);
    p.a = this->a.data_ptr(), p.a_row = this->a.stride(0);
    p.delta_sums = read[0].data_ptr(), p.mean = read[1].data_ptr(), p.rstd = read[2].data_ptr();
    p.weight = data_or_null(this->weight);
    weight_grad = call.empty({p.columns}, accumulation_type(p.dtype));
    a_sums = call.empty({p.columns}, accumulation_type(p.dtype));
    p.weight_grad = weight_grad.data_ptr(), p.a_sums = a_sums.data_ptr();
  }

 private:
  Tensor a, read[3];
  std::optional<Tensor> weight;
};

}  // namespace fastdfa
