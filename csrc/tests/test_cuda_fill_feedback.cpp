// The CUDA source of fill_feedback on the CPU, against the numbers of the CPU kernel.
#include <vector>

#include "cuda/fill_feedback.cu"
#include "cuda_memory.h"

using namespace fastdfa;

struct Case {
  int64_t classes, columns;
  int64_t gap = 0, offset = 0, first_column = 0;
};

template <class T> static void run(const Case& c, Distribution distribution) {
  using A = Accumulator<T>;
  const FeedbackKey key{0xfedcba9876543210u, 0xfffffff0u, distribution};
  const int64_t row = c.columns + c.gap, wide = c.first_column + c.columns;
  Memory<T> out(c.classes * row, c.offset);
  const FillFeedbackParams p{out.data(),      row, c.classes,     c.columns,
                             dtype_name<T>(), key, c.first_column};
  CHECK(cuda::fill_feedback(p, nullptr) == 0, "launch");
  out.check("out");

  std::vector<A> want(c.classes * wide);
  const FillFeedbackParams whole{want.data(), wide, c.classes, wide, dtype_name<A>(), key, 0};
  cpu_kernels(Capability::baseline).fill_feedback(whole, 0, fill_tasks(whole));
  for (int64_t r = 0; r < c.classes; ++r) {
    for (int64_t j = 0; j < c.columns; ++j) {
      const double right = want[r * wide + c.first_column + j];
      CHECK(close(out[r * row + j], right), "%d bytes, distribution %d, [%d, %d]: %.9g, not %.9g",
            int(sizeof(T)), int(distribution), int(r), int(j), out.at(r * row + j), right);
    }
    for (int64_t j = c.columns; j < row; ++j)
      CHECK(out.poisoned(r * row + j), "wrote after the end of row %d", int(r));
  }
}

template <class T> static void cases() {
  for (int d = 0; d < distribution_count; ++d) {
    const Distribution distribution = static_cast<Distribution>(d);
    for (int64_t columns : {1, 2, 3, 4, 5, 31, 128, 129, 300})
      for (int64_t classes : {1, 10, 33}) run<T>({classes, columns}, distribution);
    for (int64_t gap : {1, 2, 4, 8})
      for (int64_t offset : {0, 1, 2, 4}) run<T>({5, 44, gap, offset}, distribution);
    run<T>({5, 44, 4, 0, 4}, distribution), run<T>({5, 130, 2, 0, 1020}, distribution);
  }
  run<T>({0, 5}, Distribution::normal), run<T>({5, 0}, Distribution::normal);
}

// Rows that lie 2^31 elements apart.
static void far_rows() {
  constexpr int64_t row = (int64_t{1} << 31) + 8, rows = 3, columns = 6;
  const FeedbackKey key{1, 2, Distribution::rademacher};
  Sparse memory(rows * row * sizeof(bfloat16));
  auto* out = static_cast<bfloat16*>(memory.data());
  const FillFeedbackParams p{out, row, rows, columns, DType::bfloat16, key, 0};
  CHECK(cuda::fill_feedback(p, nullptr) == 0, "launch");
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < 8; ++j)
      CHECK(std::abs(cuda::widen(out[r * row + j])) == (j < columns), "[%d, %d]", int(r), int(j));
}

int main() {
  cases<float>(), cases<double>(), cases<bfloat16>(), cases<float16>();
  far_rows();
}
