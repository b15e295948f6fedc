#include "../fill_feedback.h"

#include "feedback_row.h"

namespace fastdfa::FASTDFA_CPU {
namespace {

// 16-bit types: generated in float, rounded on the way out.
template <class T>
void fill_segment_of_row(T* out, const FeedbackKey& key, int64_t row, int64_t column,
                         int64_t count) {
  using V = Vec<Accumulator<T>>;
  constexpr int64_t block = 512;
  Accumulator<T> buffer[block];
  for (int64_t j = 0; j < count; j += block) {
    const int64_t n = min(block, count - j);
    feedback_row(buffer, key, row, column + j, n);
    int64_t i = 0;
    for (; i + V::size <= n; i += V::size) store(out + j + i, load(buffer + i));
    if (i < n) store(out + j + i, load(buffer + i, FirstLanes{n - i}), FirstLanes{n - i});
  }
}

}  // namespace

void fill_feedback(const FillFeedbackParams& p, int64_t begin, int64_t end) {
  const int64_t segments = ceil_div(p.columns, fill_segment);
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / segments, column = task % segments * fill_segment;
      const int64_t count = min(fill_segment, p.columns - column);
      fill_segment_of_row(static_cast<T*>(p.out) + row * p.out_row + column, p.key, row,
                          p.first_column + column, count);
    }
  });
}

}  // namespace fastdfa::FASTDFA_CPU
