// What this processor can run. Free of the kernels themselves, so that the Python module can ask.
#pragma once

namespace fastdfa {

enum class Capability : int { baseline, avx2, avx512 };

constexpr const char* capability_names[] = {"baseline", "avx2", "avx512"};

// The best one of this processor, also where the environment says less.
Capability best_capability();

// The one that the ops use: the best, or a lower one that the environment variable
// FASTDFA_CPU_CAPABILITY names (for tests). Read once.
Capability capability();

const char* cpu_capability();

// Whether the ops multiply bfloat16 themselves: AVX-512 with BF16.
bool multiplies_bfloat16();

}  // namespace fastdfa
