// Matrices as the products of linear_chain, weight_gradients and backpropagate read them.
#pragma once

#include "../gemm.h"
#include "call.h"

namespace fastdfa {

// A matrix as the products read it, one of its strides being 1.
inline Tensor with_a_unit_stride(const OpCall& call, const Tensor& t) {
  return t.stride(0) == 1 || t.stride(1) == 1 ? t : call.contiguous(t);
}

inline void check_gemm_operand(const OpCall& call, const std::string& name, const Tensor& t,
                               ScalarType type) {
  call.check_matrix(name, t);
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16,
      call.op, ": ", name, " must be float32, float64 or bfloat16, got dtype ",
      torch::headeronly::toString(type));
  call.check_dtype(name, t, type);
}

// Of weights, biases and gradients.
inline ScalarType wide_type(ScalarType type) {
  return type == ScalarType::BFloat16 ? ScalarType::Float : type;
}

inline void set_a(GemmProblem& g, const Tensor& a) {
  g.a = a.data_ptr(), g.rows = a.size(0), g.depth = a.size(1);
  g.a_row = a.stride(0), g.a_column = a.stride(1);
}

// Of the transposed matrix.
inline void set_a_transposed(GemmProblem& g, const Tensor& a) {
  g.a = a.data_ptr(), g.rows = a.size(1), g.depth = a.size(0);
  g.a_row = a.stride(1), g.a_column = a.stride(0);
}

}  // namespace fastdfa
