// Philox against the known-answer vectors of Random123 (kat_vectors, philox4x32 10), the SIMD
// kernel against the scalar generator, and the moments of the distributions.
#include <vector>

#include "check.h"

using namespace fastdfa;

static void known_answers() {
  constexpr struct {
    uint32_t counter[4], key[2], words[4];
  } vectors[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
       {0xffffffff, 0xffffffff},
       {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       {0xa4093822, 0x299f31d0},
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const auto& v : vectors) {
    uint64_t c[4] = {v.counter[0], v.counter[1], v.counter[2], v.counter[3]};
    philox4x32_10(c, v.key[0], v.key[1]);
    for (int i = 0; i < 4; ++i)
      CHECK(static_cast<uint32_t>(c[i]) == v.words[i], "word %d is %08x, not %08x", i,
            static_cast<uint32_t>(c[i]), v.words[i]);
  }
}

static double feedback(const FeedbackKey& key, int64_t row, int64_t column) {
  uint64_t c[4] = {static_cast<uint64_t>(column / 4), static_cast<uint64_t>(row), key.stream, 0};
  philox4x32_10(c, static_cast<uint32_t>(key.seed), static_cast<uint32_t>(key.seed >> 32));
  const int pair = column % 4 / 2 * 2;
  const uint32_t even = static_cast<uint32_t>(c[pair]), odd = static_cast<uint32_t>(c[pair + 1]);
  double x = 0, y = 0;
  switch (key.distribution) {
    case Distribution::normal:
      feedback_pair<Distribution::normal>(even, odd, x, y);
      break;
    case Distribution::uniform:
      feedback_pair<Distribution::uniform>(even, odd, x, y);
      break;
    case Distribution::rademacher:
      feedback_pair<Distribution::rademacher>(even, odd, x, y);
      break;
  }
  return column % 2 ? y : x;
}

template <class T>
static void fill(const CpuKernels& kernels, const char* capability, DType dtype, double tolerance,
                 int64_t first_column) {
  constexpr int64_t rows = 3, columns = fill_segment + 37, stride = columns + 2;
  for (int d = 0; d < distribution_count; ++d) {
    const FeedbackKey key{0xfedcba9876543210u, 0xfffffff0u, static_cast<Distribution>(d)};
    std::vector<T> out(rows * stride, T(7));
    const FillFeedbackParams p{out.data(), stride, rows, columns, dtype, key, first_column};
    kernels.fill_feedback(p, 0, fill_tasks(p));
    double sum = 0, squares = 0;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < columns; ++j) {
        const double got = out[r * stride + j], want = feedback(key, r, first_column + j);
        CHECK(std::abs(got - want) <= tolerance, "%s: distribution %d [%d, %d] is %.9g, not %.9g",
              capability, d, int(r), int(j), got, want);
        sum += got, squares += got * got;
      }
      CHECK(out[r * stride + columns] == T(7), "%s: wrote after the end of row %d", capability,
            int(r));
    }
    const double mean = sum / (rows * columns), variance = squares / (rows * columns);
    CHECK(std::abs(mean) < 0.04 && std::abs(variance - 1) < 0.05,
          "distribution %d has mean %.3f, variance %.3f", d, mean, variance);
  }
}

int main() {
  known_answers();
  for_each_capability([](const CpuKernels& kernels, const char* name) {
    for (int64_t first_column : {0, 1020}) {
      fill<float>(kernels, name, DType::float32, 1e-6, first_column);
      fill<double>(kernels, name, DType::float64, 1e-14, first_column);
    }
  });
}
