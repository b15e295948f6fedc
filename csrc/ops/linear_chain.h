// The arguments of linear_chain, their checks and its results.
#pragma once

#include <optional>

#include "products.h"

namespace fastdfa {

// The products of a chain, one after the other; each reads the result of the one before.
class LinearChainWork {
 public:
  LinearChainWork(const OpCall& call, const Tensor& input, const std::vector<Tensor>& weights,
                  const std::vector<std::optional<Tensor>>& biases,
                  const std::vector<int64_t>& kinds, const std::vector<double>& params)
      : x(input), weights(weights), biases(biases) {
    check(call, input, kinds, params);
    x = with_a_unit_stride(call, x);
    for (size_t l = 0; l < weights.size(); ++l) {
      const Tensor w = this->weights[l] = with_a_unit_stride(call, weights[l]);
      GemmProblem g{};
      set_a(g, results.empty() ? x : results.back());
      g.b = w.data_ptr(), g.b_row = w.stride(1), g.b_column = w.stride(0);
      g.columns = w.size(0), g.c_row = w.size(0);
      results.push_back(call.empty({g.rows, g.columns}, input.scalar_type()));
      g.c = results.back().data_ptr();
      if (auto& bias = this->biases[l]) {
        bias = call.contiguous(*bias);
        g.bias = bias->data_ptr();
      }
      g.kind = call.activation_of(kinds[l], params[l]), g.param = params[l];
      problems.push_back(g);
    }
  }

  std::vector<GemmProblem> problems;
  std::vector<Tensor> results;

 private:
  void check(const OpCall& call, const Tensor& input, const std::vector<int64_t>& kinds,
             const std::vector<double>& params) const {
    const size_t layers = weights.size();
    STD_TORCH_CHECK(biases.size() == layers && kinds.size() == layers && params.size() == layers,
                    call.op, ": biases, kinds and params must have one entry for each of the ",
                    layers, " weights, got ", biases.size(), ", ", kinds.size(), " and ",
                    params.size());
    const ScalarType type = call.type_of("x", input);
    check_gemm_operand(call, "x", input, type);
    int64_t inputs = input.size(1);
    for (size_t l = 0; l < layers; ++l) {
      const std::string name = element("weights", l);
      check_gemm_operand(call, name, weights[l], wide_type(type));
      STD_TORCH_CHECK(weights[l].size(1) == inputs, call.op, ": ", name, " must have ", inputs,
                      " columns, as its input has, got shape ", text(weights[l]));
      inputs = weights[l].size(0);
      if (biases[l]) check_bias(call, element("biases", l), *biases[l], inputs, wide_type(type));
      call.activation_from_output(kinds[l], params[l]);
    }
  }

  static void check_bias(const OpCall& call, const std::string& name, const Tensor& bias,
                         int64_t columns, ScalarType type) {
    call.check_operand(name, bias);
    STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == columns, call.op, ": ", name,
                    " must have shape [", columns, "], got ", text(bias));
    call.check_dtype(name, bias, type);
  }

  // What the problems point into.
  Tensor x;
  std::vector<Tensor> weights;
  std::vector<std::optional<Tensor>> biases;
};

}  // namespace fastdfa
