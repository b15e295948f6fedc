// batch_norm and layer_norm with their backward on the CPU, from the last task to the first.
#include "norm_case.h"

using namespace fastdfa;

template <class T> static void cases(const CpuKernels& kernels, const char* capability) {
  const auto run = [&](const NormCase& c) {
    BatchNormCase<T> batch(c, capability);
    const int64_t tasks = batch_norm_tasks(c.columns);
    for (int64_t task = tasks; task-- > 0;) kernels.batch_norm(batch.forward, task, task + 1);
    kernels.batch_norm_backward(batch.backward, 0, tasks);
    batch.check();

    LayerNormCase<T> layer(c, capability, [](const auto& p) { return layer_norm_chunks(p.rows); });
    const int64_t chunks = layer_norm_chunks(c.rows);
    kernels.layer_norm(layer.forward, 0, c.rows);
    for (int64_t chunk = chunks; chunk-- > 0;)
      kernels.layer_norm_backward(layer.backward, chunk, chunk + 1);
    for (const SumChunksParams& sum : layer.sums) kernels.sum_chunks(sum);
    layer.check();
  };
  each_norm_case(run);
  run({33, 1043, 0, true, true, Activation::relu});  // several blocks of columns
  run({130, 64, 0, true, true, Activation::relu});   // several chunks of rows
}

int main() {
  for_each_capability([](const CpuKernels& kernels, const char* name) {
    cases<float>(kernels, name), cases<double>(kernels, name);
    cases<bfloat16>(kernels, name), cases<float16>(kernels, name);
  });
}
