// The arguments of backpropagate, their checks and its results.
#pragma once

#include <optional>

#include "bias_sums.h"
#include "products.h"

namespace fastdfa {

// The products of the boundaries, from the top down; each reads the result of the one before.
class BackpropagateWork {
 public:
  BackpropagateWork(const OpCall& call, const Tensor& top, std::vector<Tensor> weights_,
                    std::vector<Tensor> saved_, const std::vector<int64_t>& kinds,
                    const std::vector<double>& params)
      : delta(top), weights(std::move(weights_)), saved(std::move(saved_)) {
    check(call, kinds, params);
    delta = with_a_unit_stride(call, delta);
    std::vector<int64_t> columns;
    for (const Tensor& w : weights) columns.push_back(w.size(1));
    sums.emplace(call, columns, gemm_chunks(delta.size(0)), call.dtype_of("delta", delta));
    for (size_t i = 0; i < weights.size(); ++i) {
      const Tensor w = weights[i] = with_a_unit_stride(call, weights[i]);
      GemmProblem g{};
      set_a(g, results.empty() ? delta : results.back());
      g.b = w.data_ptr(), g.b_row = w.stride(0), g.b_column = w.stride(1);
      g.columns = g.c_row = w.size(1);
      g.kind = call.activation_of(kinds[i], params[i]), g.param = params[i];
      if (g.kind != Activation::identity) saved[i] = with_unit_columns(call, saved[i]);
      g.saved = saved[i].data_ptr(), g.saved_row = saved[i].stride(0);
      g.sums = sums->partial(i);
      results.push_back(call.empty({g.rows, g.columns}, delta.scalar_type()));
      g.c = results.back().data_ptr();
      problems.push_back(g);
    }
    results.insert(results.end(), sums->grads.begin(), sums->grads.end());
  }

  std::vector<GemmProblem> problems;
  std::vector<Tensor> results;  // the deltas, then their sums
  std::optional<BiasSums> sums;

 private:
  void check(const OpCall& call, const std::vector<int64_t>& kinds,
             const std::vector<double>& params) const {
    const size_t count = weights.size();
    STD_TORCH_CHECK(saved.size() == count && kinds.size() == count && params.size() == count,
                    call.op, ": saved, kinds and params must have one entry for each of the ",
                    count, " weights, got ", saved.size(), ", ", kinds.size(), " and ",
                    params.size());
    const ScalarType type = call.type_of("delta", delta);
    check_gemm_operand(call, "delta", delta, type);
    int64_t above = delta.size(1);
    for (size_t i = 0; i < count; ++i) {
      const std::string name = element("weights", i), saved_name = element("saved", i);
      check_gemm_operand(call, name, weights[i], wide_type(type));
      STD_TORCH_CHECK(weights[i].size(0) == above, call.op, ": ", name, " must have ", above,
                      " rows, as many as the delta above it has columns, got shape ",
                      text(weights[i]));
      above = weights[i].size(1);
      check_gemm_operand(call, saved_name, saved[i], type);
      STD_TORCH_CHECK(saved[i].size(0) == delta.size(0) && saved[i].size(1) == above, call.op, ": ",
                      saved_name, " must have shape [", delta.size(0), ", ", above, "], got ",
                      text(saved[i]));
      call.activation_of(kinds[i], params[i]);
    }
  }

  // What the problems point into.
  Tensor delta;
  std::vector<Tensor> weights, saved;
};

}  // namespace fastdfa
