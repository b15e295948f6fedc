// The arguments of weight_gradients, their checks and its results.
#pragma once

#include "products.h"

namespace fastdfa {

// Independent products.
class WeightGradientsWork {
 public:
  WeightGradientsWork(const OpCall& call, std::vector<Tensor> deltas_, std::vector<Tensor> inputs_)
      : deltas(std::move(deltas_)), inputs(std::move(inputs_)) {
    check(call);
    for (size_t l = 0; l < deltas.size(); ++l) {
      const Tensor d = deltas[l] = with_a_unit_stride(call, deltas[l]);
      const Tensor x = inputs[l] = with_a_unit_stride(call, inputs[l]);
      GemmProblem g{};
      set_a_transposed(g, d);
      g.b = x.data_ptr(), g.b_row = x.stride(0), g.b_column = x.stride(1);
      g.columns = g.c_row = x.size(1);
      results.push_back(call.empty({g.rows, g.columns}, wide_type(d.scalar_type())));
      g.c = results.back().data_ptr();
      problems.push_back(g);
    }
  }

  ScalarType type;  // of the operands
  std::vector<GemmProblem> problems;
  std::vector<Tensor> results;

 private:
  void check(const OpCall& call) {
    STD_TORCH_CHECK(deltas.size() == inputs.size(), call.op,
                    ": inputs must have one entry for each of the ", deltas.size(), " deltas, got ",
                    inputs.size());
    type = call.type_of("deltas[0]", deltas[0]);
    for (size_t l = 0; l < deltas.size(); ++l) {
      check_gemm_operand(call, element("deltas", l), deltas[l], type);
      check_gemm_operand(call, element("inputs", l), inputs[l], type);
      STD_TORCH_CHECK(deltas[l].size(0) == inputs[l].size(0), call.op, ": ", element("inputs", l),
                      " must have ", deltas[l].size(0), " rows, as its delta has, got shape ",
                      text(inputs[l]));
    }
  }

  std::vector<Tensor> deltas, inputs;
};

}  // namespace fastdfa
