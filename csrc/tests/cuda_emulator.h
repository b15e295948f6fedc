// CUDA on the CPU, for tests: runs the kernels' own source with a plain C++ compiler, one fiber for
// each thread of a block, block after block. Threads run in a random order, or one far ahead of the
// others, between barriers, and asynchronous copies land only when they are waited for, so a
// missing barrier or wait shows. What it cannot show: time, registers, bank conflicts, and what the
// compiler makes of the inline assembly.
//
// Matrix instructions follow the fragment layouts of the PTX manual (sections "mma" and
// "ldmatrix").
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "../common.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = struct CUstream_st*;
enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }

namespace fastdfa::cuda {
namespace emulator {

constexpr int warp_size = 32;
constexpr size_t stack_bytes = 128 * 1024;

[[noreturn]] inline void fail(const char* what) {
  std::printf("CUDA emulator: %s\n", what);
  std::exit(1);
}

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[stack_bytes]};
  enum { ready, at_barrier, in_warp, done } state;
  void* argument;                          // of the warp's collective operation
  std::vector<std::vector<Copy>> commits;  // the last is open
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<char> shared;
  std::function<void()> kernel;
  ucontext_t scheduler;
  int current = 0, size = 0;
  uint64_t random = 1;
};
inline Block block;

// Where set, sees the parameters of each launch; the launch does not run if it returns false.
inline std::function<bool(const void* params, size_t bytes)> observer;

// Most blocks in a launch, so that each has several turns of a kernel's loop.
inline unsigned most_blocks = ~0u;

inline Fiber& self() { return block.fibers[block.current]; }

inline void yield() { swapcontext(&self().context, &block.scheduler); }

inline void entry() {
  block.kernel();
  self().state = Fiber::done;
  yield();
}

// Whether all the fibers of [begin, end) that are not done are in `state`.
inline bool all_in(int begin, int end, int state) {
  for (int i = begin; i < end; ++i)
    if (block.fibers[i].state != state) return false;
  return true;
}

inline void release(int begin, int end) {
  for (int i = begin; i < end; ++i) block.fibers[i].state = Fiber::ready;
}

inline void prepare(Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = stack_bytes;
  fiber.context.uc_link = nullptr;
  fiber.state = Fiber::ready;
  fiber.commits.assign(1, {});
  makecontext(&fiber.context, entry, 0);
}

inline void run_block() {
  const int size = block.size;
  for (int i = 0; i < size; ++i) prepare(block.fibers[i]);
  // From a random thread on, in a random direction: all in turn, or the first as far as it gets.
  block.random = block.random * 6364136223846793005u + 1442695040888963407u;
  const int start = static_cast<int>((block.random >> 33) % size);
  const int step = block.random >> 63 ? 1 : size - 1;
  const bool greedy = block.random >> 62 & 1;
  while (!all_in(0, size, Fiber::done)) {
    bool progress = false;
    for (int n = 0, i = start; n < size && !(progress && greedy); ++n, i = (i + step) % size) {
      if (block.fibers[i].state != Fiber::ready) continue;
      block.current = i;
      threadIdx = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
      swapcontext(&block.scheduler, &block.fibers[i].context);
      progress = true;
    }
    if (all_in(0, size, Fiber::at_barrier)) {
      release(0, size);
    } else if (!progress) {
      fail("threads wait at a barrier or a matrix instruction that others never reach");
    }
  }
  for (int i = 0; i < size; ++i)
    for (const auto& commit : block.fibers[i].commits)
      if (!commit.empty()) fail("a thread ended with asynchronous copies that it did not wait for");
}

// Runs f(arguments of the 32 lanes) once, when every lane of the warp has come here.
template <class T, class F> void collective(T& argument, F&& f) {
  const int first = block.current / warp_size * warp_size, last = first + warp_size;
  if (last > block.size) fail("a matrix instruction in an incomplete warp");
  self().argument = &argument;
  self().state = Fiber::in_warp;
  if (!all_in(first, last, Fiber::in_warp)) return yield();
  T* lanes[warp_size];
  for (int i = 0; i < warp_size; ++i) lanes[i] = static_cast<T*>(block.fibers[first + i].argument);
  f(lanes);
  release(first, last);
}

inline float bf16(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

inline float fp16(uint16_t bits) {
  _Float16 x;
  std::memcpy(&x, &bits, 2);
  return static_cast<float>(x);
}

}  // namespace emulator

inline void* shared_memory() { return emulator::block.shared.data(); }

inline void forget(int64_t&) {}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bfloat16 x) { return emulator::bf16(x.bits); }
inline float widen(float16 x) { return emulator::fp16(x.bits); }

inline void narrow(float x, float& y) { y = x; }
inline void narrow(double x, double& y) { y = x; }
inline void narrow(float x, bfloat16& y) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  y.bits = x != x ? 0x7FC0 : static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline void narrow(float x, float16& y) {
  const _Float16 half = static_cast<_Float16>(x);
  std::memcpy(&y.bits, &half, 2);
}

inline void copy_async(void* to, const void* from, bool valid) {
  if (reinterpret_cast<uintptr_t>(to) % 16) emulator::fail("a copy to an unaligned address");
  if (valid && reinterpret_cast<uintptr_t>(from) % 16)
    emulator::fail("a copy from an unaligned address");
  emulator::self().commits.back().push_back({to, from, valid});
}
inline void commit_copies() { emulator::self().commits.emplace_back(); }
template <int pending> void wait_copies() {
  auto& commits = emulator::self().commits;
  while (static_cast<int>(commits.size()) - 1 > pending) {
    for (const emulator::Copy& copy : commits.front()) {
      if (copy.valid) {
        std::memcpy(copy.to, copy.from, 16);
      } else {
        std::memset(copy.to, 0, 16);
      }
    }
    commits.erase(commits.begin());
  }
}

namespace emulator {

struct LoadMatrices {
  uint32_t* r;
  const void* row;
};

template <bool transposed> void load_matrices(uint32_t (&r)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("a matrix row at an unaligned address");
  LoadMatrices argument{r, row};
  collective(argument, [](LoadMatrices** lanes) {
    uint32_t result[warp_size][4];
    for (int lane = 0; lane < warp_size; ++lane)
      for (int m = 0; m < 4; ++m) {
        uint16_t pair[2];
        for (int i = 0; i < 2; ++i) {
          const int line = lane / 4, position = 2 * (lane % 4) + i;
          const int row = transposed ? position : line, column = transposed ? line : position;
          pair[i] = static_cast<const uint16_t*>(lanes[8 * m + row]->row)[column];
        }
        std::memcpy(&result[lane][m], pair, 4);
      }
    for (int lane = 0; lane < warp_size; ++lane) std::memcpy(lanes[lane]->r, result[lane], 16);
  });
}

struct MultiplyAdd {
  float* d;
  const uint32_t *a, *b;
};

// Element i of 32-bit register, as the 16-bit type T or as tf32.
template <class T> float element(uint32_t reg, int i) {
  const uint16_t bits = static_cast<uint16_t>(reg >> 16 * i);
  if constexpr (std::is_same_v<T, bfloat16>) return bf16(bits);
  if constexpr (std::is_same_v<T, float16>) return fp16(bits);
  if constexpr (std::is_same_v<T, float>) {
    if (reg & 0x1FFF) fail("a matrix operand was not rounded to tf32");
    float x;
    std::memcpy(&x, &reg, 4);
    return x;
  }
}

}  // namespace emulator

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  emulator::load_matrices<false>(r, row);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  emulator::load_matrices<true>(r, row);
}

template <class T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::MultiplyAdd argument{d, a, b};
  emulator::collective(argument, [](emulator::MultiplyAdd** lanes) {
    constexpr int each = std::is_same_v<T, float> ? 1 : 2;  // elements of a register
    constexpr int k = 8 * each;
    float a[16][k], b[k][8];
    for (int lane = 0; lane < emulator::warp_size; ++lane) {
      const int group = lane / 4, place = lane % 4;
      for (int i = 0; i < each; ++i)
        for (int half = 0; half < 2; ++half) {
          const int depth = each * place + i + 4 * each * half;
          for (int down = 0; down < 2; ++down)
            a[group + 8 * down][depth] = emulator::element<T>(lanes[lane]->a[2 * half + down], i);
          b[depth][group] = emulator::element<T>(lanes[lane]->b[half], i);
        }
    }
    for (int lane = 0; lane < emulator::warp_size; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        for (int depth = 0; depth < k; ++depth)
          lanes[lane]->d[i] += a[row][depth] * b[depth][column];
      }
  });
}

inline uint32_t round_to_tf32(float x) {  // to nearest, halves away from zero
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return (bits + 0x1000) & ~0x1FFFu;
}

template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, dim3 threads, size_t shared_bytes,
                   cudaStream_t, const std::type_identity_t<Params>& params) {
  emulator::Block& block = emulator::block;
  block.size = static_cast<int>(threads.x * threads.y * threads.z);
  // 99 KB are what a block may have on every processor from sm_80 on.
  if (block.size == 0 || block.size > 1024 || grid.x * grid.y * grid.z == 0 ||
      shared_bytes > 99 * 1024)
    return cudaErrorInvalidConfiguration;
  if (emulator::observer && !emulator::observer(&params, sizeof(Params))) return cudaSuccess;
  if (block.fibers.size() < static_cast<size_t>(block.size)) block.fibers.resize(block.size);
  block.kernel = [kernel, params] { kernel(params); };
  grid.x = grid.x < emulator::most_blocks ? grid.x : emulator::most_blocks;
  gridDim = grid, blockDim = threads;
  for (unsigned i = 0; i < grid.x * grid.y * grid.z; ++i) {
    blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
    block.shared.assign(shared_bytes, static_cast<char>(0xFF));  // NaN
    emulator::run_block();
  }
  return cudaSuccess;
}

}  // namespace fastdfa::cuda

inline void __syncthreads() {
  fastdfa::cuda::emulator::self().state = fastdfa::cuda::emulator::Fiber::at_barrier;
  fastdfa::cuda::emulator::yield();
}
