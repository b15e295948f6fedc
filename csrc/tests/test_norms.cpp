// batch_norm and layer_norm with their backward on the CPU.
#include "norm_case.h"

using namespace fastdfa;

template <class T> static void cases(const CpuKernels& kernels, const char* capability) {
  const auto run = [&](const NormCase& c) {
    BatchNormCase<T> batch(c, capability);
    const int64_t tasks = batch_norm_tasks(c.columns);
    each_task(tasks,
              [&](int64_t task, int64_t) { kernels.batch_norm(batch.forward, task, task + 1); });
    each_task(tasks, [&](int64_t task, int64_t) {
      kernels.batch_norm_backward(batch.backward, task, task + 1);
    });
    batch.check();

    LayerNormCase<T> layer(c, capability, [](const auto& p) { return layer_norm_chunks(p.rows); });
    const int64_t chunks = layer_norm_chunks(c.rows);
    each_task(c.rows,
              [&](int64_t row, int64_t) { kernels.layer_norm(layer.forward, row, row + 1); });
    each_task(chunks, [&](int64_t chunk, int64_t) {
      kernels.layer_norm_backward(layer.backward, chunk, chunk + 1);
    });
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
