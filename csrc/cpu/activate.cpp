#include "../activate.h"

#include "vec_math.h"

namespace fastdfa::FASTDFA_CPU {
namespace {

// x[0 .. count) = f(x + bias); bias may be null.
template <Activation kind, class T, class B>
void activate_run(T* x, const B* bias, int64_t count, Accumulator<T> param) {
  using V = Vec<Accumulator<T>>;
  const auto step = [&](int64_t j, auto lanes) __attribute__((always_inline)) {
    V a = load(x + j, lanes);
    if (bias) a = a + load(bias + j, lanes);
    store(x + j, activate<kind>(a, V(param)), lanes);
  };
  int64_t j = 0;
  for (; j + V::size <= count; j += V::size) step(j, AllLanes());
  if (j < count) step(j, FirstLanes{count - j});
}

template <class T, class B>
void activate_range(const ActivateParams& p, int64_t begin, int64_t end) {
  const B* bias = static_cast<const B*>(p.bias);
  dispatch_activation(p.kind, [&](auto kind) {
    if constexpr (derivative_from_output(kind.value)) {
      for (int64_t i = begin; i < end;) {
        const int64_t column = bias ? i % p.columns : 0;
        const int64_t count = bias ? min(p.columns - column, end - i) : end - i;
        activate_run<kind.value>(static_cast<T*>(p.x) + i, bias ? bias + column : nullptr, count,
                                 static_cast<Accumulator<T>>(p.param));
        i += count;
      }
    }
  });
}

}  // namespace

void activate(const ActivateParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (p.bias_dtype == p.dtype) return activate_range<T, T>(p, begin, end);
    activate_range<T, Accumulator<T>>(p, begin, end);
  });
}

}  // namespace fastdfa::FASTDFA_CPU
