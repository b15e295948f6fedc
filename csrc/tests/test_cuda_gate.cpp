// The CUDA source of gate and of sum_chunks on the CPU, against plain loops in double.
#include <vector>

#include "cuda/gate.cu"
#include "cuda/sum_chunks.cu"
#include "cuda_memory.h"

using namespace fastdfa;

struct Case {
  int64_t rows, columns;
  int64_t grad_gap = 0, saved_gap = 0;   // columns between rows; -1: all rows are the same
  int64_t offset = 0, delta_offset = 0;  // from alignment, in elements
};

static int64_t stride(int64_t columns, int64_t gap) { return gap < 0 ? 0 : columns + gap; }

template <class T> static void run(const Case& c, Activation kind) {
  using A = Accumulator<T>;
  GateParams p{};
  p.rows = c.rows, p.columns = c.columns;
  p.grad_row = stride(c.columns, c.grad_gap), p.saved_row = stride(c.columns, c.saved_gap);
  p.dtype = dtype_name<T>(), p.kind = kind, p.param = 0.75;
  Memory<T> grad(c.rows * p.grad_row + c.columns, c.offset);
  Memory<T> saved(c.rows * p.saved_row + c.columns, c.offset);
  Memory<T> delta(c.rows * c.columns, c.delta_offset);
  grad.fill(1), saved.fill(2);
  const int64_t chunks = cuda::gate_chunks(p);
  Memory<A> partial(chunks * c.columns), sum(c.columns);
  p.grad = grad.data(), p.saved = kind == Activation::identity ? nullptr : saved.data();
  p.delta = delta.data(), p.bias_partial = partial.data();
  CHECK(cuda::gate(p, nullptr) == 0, "launch");
  const SumChunksParams second{partial.data(), sum.data(), chunks, c.columns,
                               dtype_name<Accumulator<T>>()};
  CHECK(cuda::sum_chunks(&second, 1, nullptr) == 0, "launch");
  delta.check("delta"), partial.check("the partial sums"), sum.check("the bias gradient");

  for (int64_t j = 0; j < c.columns; ++j) {
    double total = 0, size = 0;
    for (int64_t r = 0; r < c.rows; ++r) {
      double want = grad.at(r * p.grad_row + j);
      dispatch_activation(kind, [&](auto k) {
        if constexpr (k.value != Activation::identity)
          want *= derivative<k.value>(saved.at(r * p.saved_row + j), p.param);
      });
      CHECK(close(delta[r * c.columns + j], want), "%d bytes, kind %d, [%d, %d]: %.9g, not %.9g",
            int(sizeof(T)), int(kind), int(r), int(j), delta.at(r * c.columns + j), want);
      total += want, size += std::abs(want);
    }
    // The sum is of numbers that are not rounded to T yet.
    CHECK(close(sum[j], total, 1e-6 * size),
          "%d bytes, kind %d, %d x %d, sum of column %d: %.9g, not %.9g", int(sizeof(T)), int(kind),
          int(c.rows), int(c.columns), int(j), sum.at(j), total);
  }
}

template <class T> static void cases() {
  for (int kind = 0; kind < activation_count; ++kind)
    for (int64_t columns : {40, 33}) run<T>({37, columns}, Activation(kind));
  for (int64_t columns : {1, 3, 8, 16, 31, 64, 100, 256, 300, 520})
    for (int64_t rows : {1, 31, 32, 33, 130}) run<T>({rows, columns}, Activation::tanh);
  for (int64_t rows : {0, 5})
    for (int64_t columns : {0, 5}) run<T>({rows, columns}, Activation::tanh);
  run<T>({1100, 8}, Activation::tanh);  // several chunks of the longest kind
  for (int64_t gap : {8, 3, -1})
    for (int64_t other : {0, 16, 1})
      for (Activation kind : {Activation::identity, Activation::gelu}) {
        run<T>({70, 48, gap, other}, kind);
        run<T>({70, 48, other, gap}, kind);
      }
  for (int64_t offset : {1, 2, 4}) {
    run<T>({70, 48, 0, 0, offset}, Activation::relu);
    run<T>({70, 48, 0, 0, 0, offset}, Activation::relu);
  }
}

// Rows that lie 2^31 elements apart.
static void far_rows() {
  constexpr int64_t row = (int64_t{1} << 31) + 8, rows = 3, columns = 8;
  Sparse grad(rows * row * sizeof(bfloat16)), saved(rows * row * sizeof(bfloat16));
  auto* g = static_cast<bfloat16*>(grad.data());
  auto* s = static_cast<bfloat16*>(saved.data());
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < columns; ++j)
      cuda::narrow(float(1 + r), g[r * row + j]), cuda::narrow(float(2 * j), s[r * row + j]);
  Memory<bfloat16> delta(rows * columns);
  Memory<float> sum(columns);
  const GateParams p{g,    s,       delta.data(),    sum.data(),       row, row,
                     rows, columns, DType::bfloat16, Activation::relu, 0};
  CHECK(cuda::gate_chunks(p) == 1 && cuda::gate(p, nullptr) == 0, "launch");
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t r = 0; r < rows; ++r)
      CHECK(delta.at(r * columns + j) == (j > 0) * (1 + r), "[%d, %d]", int(r), int(j));
    CHECK(sum.at(j) == (j > 0) * 6, "sum of column %d", int(j));
  }
}

// Many layers of all sizes, in several launches.
template <class T> static void sums() {
  const std::vector<int64_t> widths{0, 1, 31, 32, 33, 100}, counts{0, 1, 2, 7, 8, 9, 64, 65};
  std::vector<Memory<T>> partials, results;
  std::vector<SumChunksParams> list;
  for (int64_t l = 0; l < 150; ++l) {
    const int64_t columns = widths[l % widths.size()], chunks = counts[l % counts.size()];
    partials.emplace_back(chunks * columns, l % 3), results.emplace_back(columns, l % 2);
    partials.back().fill(l);
    list.push_back(
        {partials.back().data(), results.back().data(), chunks, columns, dtype_name<T>()});
  }
  CHECK(cuda::sum_chunks(list.data(), int64_t(list.size()), nullptr) == 0, "launch");
  for (size_t l = 0; l < list.size(); ++l) {
    results[l].check("a sum");
    for (int64_t j = 0; j < list[l].columns; ++j) {
      double want = 0;
      for (int64_t c = 0; c < list[l].chunks; ++c) want += partials[l].at(c * list[l].columns + j);
      CHECK(close(results[l][j], want, 65 * rounding<T>()), "layer %d [%d]: %.9g, not %.9g", int(l),
            int(j), results[l].at(j), want);
    }
  }
}

int main() {
  cases<float>(), cases<double>(), cases<bfloat16>(), cases<float16>();
  far_rows();
  sums<float>(), sums<double>();
  CHECK(cuda::sum_chunks(nullptr, 0, nullptr) == 0, "no layers");
}
