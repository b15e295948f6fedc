#include "dispatch.h"

#include <cstdlib>
#include <cstring>

namespace fastdfa {
namespace {

Capability wanted_capability() {
  const char* name = std::getenv("FASTDFA_CPU_CAPABILITY");
  const Capability best = best_capability();
  for (int lower = 0; name && lower < static_cast<int>(best); ++lower)
    if (std::strcmp(name, capability_names[lower]) == 0) return static_cast<Capability>(lower);
  return best;
}

}  // namespace

Capability best_capability() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // Every processor with AVX2 and FMA also converts float16 (F16C), for which GCC 10 cannot ask.
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
    return Capability::baseline;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Capability::avx512;
  return Capability::avx2;
#else
  return Capability::baseline;
#endif
}

Capability capability() {
  static const Capability wanted = wanted_capability();
  return wanted;
}

bool multiplies_bfloat16() {
#if defined(__x86_64__)
  return capability() == Capability::avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

const char* cpu_capability() { return capability_names[static_cast<int>(capability())]; }

}  // namespace fastdfa
