#pragma once

#include "activation.h"

namespace fastdfa {

struct ActivateParams {
  void* x;           // [rows, columns], contiguous; overwritten by f(x + bias)
  const void* bias;  // [columns], or null
  int64_t elements, columns;
  DType dtype, bias_dtype;  // bias_dtype: dtype, or its accumulation type
  Activation kind;
  double param;
};

}  // namespace fastdfa
