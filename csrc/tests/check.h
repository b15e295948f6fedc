// The little that the kernel tests share: a check that names what failed, and the loop over the
// capabilities of this processor.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "cpu/kernels.h"

#ifdef __SANITIZE_THREAD__
#include <thread>
#include <vector>
#endif

#define CHECK(condition, ...)                                            \
  do {                                                                   \
    if (!(condition)) {                                                  \
      std::printf("%s:%d: %s failed: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                          \
      std::printf("\n");                                                 \
      std::exit(1);                                                      \
    }                                                                    \
  } while (0)

namespace fastdfa {

template <class F> void for_each_capability(F&& f) {
  for (int c = 0; c <= static_cast<int>(best_capability()); ++c)
    f(cpu_kernels(static_cast<Capability>(c)), capability_names[c]);
}

// Calls f(task, thread) for every task: from the last to the first, one by one, as no task may need
// another; under ThreadSanitizer on several threads, which sees two tasks that write one place.
#ifdef __SANITIZE_THREAD__
constexpr int64_t task_threads = 3;

template <class F> void each_task(int64_t tasks, const F& f) {
  std::vector<std::thread> threads;
  for (int64_t thread = 0; thread < task_threads; ++thread)
    threads.emplace_back([&, thread] {
      for (int64_t task = thread; task < tasks; task += task_threads) f(task, thread);
    });
  for (std::thread& thread : threads) thread.join();
}
#else
constexpr int64_t task_threads = 1;

template <class F> void each_task(int64_t tasks, const F& f) {
  for (int64_t task = tasks; task-- > 0;) f(task, int64_t{0});
}
#endif

// A reproducible number in [-1, 1), a function of its index.
inline double number(int64_t index) {
  uint64_t c[4] = {static_cast<uint64_t>(index), 0, 0, 0};
  philox4x32_10(c, 1, 2);
  return 2 * unit_interval<double>(static_cast<uint32_t>(c[0])) - 1;
}

}  // namespace fastdfa
