// What the tests of the CUDA kernels share: memory, and what is close enough.
#pragma once

#include <sys/mman.h>

#include "check.h"
#include "cuda/device.h"
#include "guarded.h"

namespace fastdfa {

template <class T> constexpr DType dtype_name() {
  if constexpr (std::is_same_v<T, double>) return DType::float64;
  if constexpr (std::is_same_v<T, float>) return DType::float32;
  if constexpr (std::is_same_v<T, bfloat16>) return DType::bfloat16;
  return DType::float16;
}

// Relative error of rounding to T, and what is allowed beside it for the arithmetic in float.
template <class T> constexpr double rounding() {
  if constexpr (std::is_same_v<T, double>) return 1e-14;
  if constexpr (std::is_same_v<T, float>) return 1e-6;
  return std::is_same_v<T, bfloat16> ? 0x1p-8 : 0x1p-11;
}
template <class T> bool close(T got, double want, double slack = 0) {
  const double unit = std::is_same_v<T, double> ? 1e-14 : 1e-6;
  return std::abs(double(cuda::widen(got)) - want) <= rounding<T>() * std::abs(want) + unit + slack;
}

// Guarded memory with what the tests ask of it. All its bytes are 0xFF, which is NaN in every type.
template <class T> class Memory : public Guarded<T> {
 public:
  using Guarded<T>::Guarded, Guarded<T>::data, Guarded<T>::size;

  double at(int64_t i) const { return cuda::widen(data()[i]); }

  void fill(int64_t seed) {
    for (int64_t i = 0; i < size(); ++i)
      cuda::narrow(static_cast<Accumulator<T>>(number(seed * 1000003 + i)), data()[i]);
  }
  bool poisoned(int64_t i) const { return all_poisoned(bytes(i), bytes(i + 1)); }

  // Whether the bytes around, of the same pages, are untouched. (After the last one the process
  // would have been stopped.)
  void check(const char* what) const {
    constexpr uintptr_t page = 4096;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(data()) / page * page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data() + size()) + page - 1) / page * page;
    CHECK(all_poisoned(reinterpret_cast<const unsigned char*>(begin), bytes(0)) &&
              all_poisoned(bytes(size()), reinterpret_cast<const unsigned char*>(end)),
          "wrote outside of %s", what);
  }

 private:
  const unsigned char* bytes(int64_t i) const {
    return reinterpret_cast<const unsigned char*>(data() + i);
  }
  static bool all_poisoned(const unsigned char* begin, const unsigned char* end) {
    for (; begin < end; ++begin)
      if (*begin != 0xFF) return false;
    return true;
  }
};

// Address space of zeros, of which only what is touched takes memory: for offsets beyond 2^31.
class Sparse {
 public:
  explicit Sparse(size_t bytes) : bytes_(bytes) {
    data_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(data_ != MAP_FAILED, "no address space for %zu bytes", bytes);
  }
  ~Sparse() { munmap(data_, bytes_); }
  Sparse(const Sparse&) = delete;
  void* data() { return data_; }

 private:
  void* data_;
  size_t bytes_;
};

}  // namespace fastdfa
