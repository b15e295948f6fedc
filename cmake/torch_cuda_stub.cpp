// Stands for libtorch_cuda.so where the PyTorch to build against is without CUDA: what the linker
// needs of it is its name and the functions that csrc/cuda/ops calls.
#define STUB(function) \
  extern "C" __attribute__((visibility("default"))) void function() {}

STUB(aoti_torch_get_current_cuda_stream)
