#pragma once

#include "philox.h"

namespace fastdfa {

struct FillFeedbackParams {
  void* out;        // [classes, columns], unit column stride
  int64_t out_row;  // row stride, in elements
  int64_t classes, columns;
  DType dtype;
  FeedbackKey key;
  int64_t first_column;  // of B, with which `out` begins: a multiple of 4
};

// On the CPU, a task is one row of one segment of columns.
constexpr int64_t fill_segment = 4096;

FASTDFA_INLINE int64_t fill_tasks(const FillFeedbackParams& p) {
  return p.classes * ceil_div(p.columns, fill_segment);
}

}  // namespace fastdfa
