// The CUDA source of batch_norm and layer_norm with their backward on the CPU.
#include "cuda/batch_norm.cu"
#include "cuda/layer_norm.cu"
#include "cuda/sum_chunks.cu"
#include "norm_case.h"

using namespace fastdfa;

// most_blocks: of a launch, so that each has several turns of its loop; the sums have none.
template <class T> static void run(const NormCase& c, unsigned most_blocks = ~0u) {
  unsigned& most = cuda::emulator::most_blocks;
  most = most_blocks;
  BatchNormCase<T> batch(c, "CUDA");
  CHECK(cuda::batch_norm(batch.forward, nullptr) == 0, "launch");
  CHECK(cuda::batch_norm_backward(batch.backward, nullptr) == 0, "launch");
  batch.check();

  LayerNormCase<T> layer(c, "CUDA", cuda::layer_norm_backward_chunks);
  CHECK(cuda::layer_norm(layer.forward, nullptr) == 0, "launch");
  CHECK(cuda::layer_norm_backward(layer.backward, nullptr) == 0, "launch");
  most = ~0u;
  CHECK(cuda::sum_chunks(layer.sums, 2, nullptr) == 0, "launch");
  layer.check();
}

template <class T> static void cases() {
  each_norm_case([](const NormCase& c) { run<T>(c); });
}

int main() {
  cases<float>(), cases<double>(), cases<bfloat16>();
  run<float16>({67, 31, 3, true, true, Activation::relu});
  run<float>({130, 70, 0, true, true, Activation::relu}, 2);
  run<float>({5, 1100, 0, true, true, Activation::relu});  // all threads of a block share a row
  run<double>({300, 8, 0, true, true, Activation::tanh});  // several chunks of rows
}
