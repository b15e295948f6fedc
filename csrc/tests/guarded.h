// Memory that ends at a page which may not be touched: an access beyond the end stops the test.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <utility>

#include "../common.h"

namespace fastdfa {

template <class T> class Guarded {
 public:
  // `shift`: how many elements after a multiple of 16 bytes the data begin. Filled with 0xFF: NaN.
  explicit Guarded(int64_t count, int64_t shift = 0) : count_(count) {
    const int64_t page = 4096, bytes = round_up((count + shift) * int64_t{sizeof(T)}, 16);
    mapped_ = round_up(bytes, page) + page;
    void* base = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    base_ = static_cast<char*>(base);
    mprotect(base_ + mapped_ - page, page, PROT_NONE);
    std::memset(base_, 0xFF, mapped_ - page);
    data_ = reinterpret_cast<T*>(base_ + mapped_ - page - bytes) + shift;
  }
  Guarded(Guarded&& other) noexcept
      : count_(other.count_),
        mapped_(other.mapped_),
        base_(std::exchange(other.base_, nullptr)),
        data_(other.data_) {}
  ~Guarded() {
    if (base_) munmap(base_, mapped_);
  }

  T* data() const { return data_; }
  int64_t size() const { return count_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  int64_t count_, mapped_;
  char* base_;
  T* data_;
};

}  // namespace fastdfa
