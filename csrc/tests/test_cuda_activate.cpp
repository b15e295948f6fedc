// The CUDA source of activate on the CPU, against plain loops in double.
#include "cuda/activate.cu"
#include "cuda_memory.h"

using namespace fastdfa;

// B: type of the bias; void where there is none.
template <class T, class B>
static void run(int64_t rows, int64_t columns, Activation kind, int64_t offset = 0) {
  using Bias = std::conditional_t<std::is_void_v<B>, float, B>;
  const int64_t elements = rows * columns;
  Memory<T> x(elements, offset), before(elements);
  Memory<Bias> bias(columns, offset);
  x.fill(1), before.fill(1), bias.fill(2);
  const ActivateParams p{x.data(),
                         std::is_void_v<B> ? nullptr : bias.data(),
                         elements,
                         columns,
                         dtype_name<T>(),
                         std::is_void_v<B> ? dtype_name<T>() : dtype_name<Bias>(),
                         kind,
                         0.75};
  CHECK(cuda::activate(p, nullptr) == 0, "launch");
  x.check("x");
  for (int64_t i = 0; i < elements; ++i) {
    const double a = before.at(i) + (std::is_void_v<B> ? 0 : bias.at(i % columns));
    double want = 0;
    dispatch_activation(kind, [&](auto k) {
      if constexpr (derivative_from_output(k.value)) want = activate<k.value>(a, p.param);
    });
    CHECK(close(x[i], want), "%d bytes, kind %d, %d x %d, element %d: %.9g, not %.9g",
          int(sizeof(T)), int(kind), int(rows), int(columns), int(i), x.at(i), want);
  }
}

template <class T> static void cases() {
  using A = Accumulator<T>;
  for (int kind = 0; kind < activation_count; ++kind)
    if (derivative_from_output(Activation(kind))) {
      run<T, A>(9, 40, Activation(kind));
      run<T, void>(9, 41, Activation(kind));
    }
  for (int64_t columns : {1, 3, 7, 8, 10, 33, 64, 100, 1023, 2048, 2049}) {
    for (int64_t rows : {1, 2, 5, 17}) run<T, T>(rows, columns, Activation::tanh);
    run<T, A>(5, columns, Activation::relu);
    run<T, void>(5, columns, Activation::relu);
  }
  run<T, T>(12000, 3, Activation::relu);  // several blocks of folded rows
  run<T, void>(3, 12001, Activation::relu);
  for (int64_t offset : {1, 2, 4}) run<T, A>(7, 96, Activation::sigmoid, offset);
  run<T, T>(0, 5, Activation::tanh), run<T, T>(5, 0, Activation::tanh);
}

int main() { cases<float>(), cases<double>(), cases<bfloat16>(), cases<float16>(); }
