// How project_gate is cut for a GPU: a function of the shapes alone, so that bias gradients, which
// are summed chunk by chunk, come out the same on every device. Free of CUDA: tested on the CPU.
#pragma once

#include "../project_gate.h"

namespace fastdfa::cuda {

// Few classes: fp32 units, bound by memory; the multiplications stay hidden behind the traffic of
// saved and delta up to about 25 classes in bf16 (counted for an H200: 67 TFLOP/s, 4.3 TB/s, 4
// bytes an element). More: tensor cores, where the types allow it.
constexpr int64_t tensor_core_classes = 32;

// A block computes tiles of `rows` x `columns` by `across` x `down` threads; each thread owns 16
// bytes of columns and thread_rows rows.
// `cheap`: every layer of the launch has a cheap derivative and rows of whole 16-byte packs. That
// takes 96 registers, 5 blocks a multiprocessor, where the general case takes 128.
template <class T, bool cheap_ = false> struct FewClasses {
  static constexpr bool cheap = cheap_;
  static constexpr int across = 32, down = 4, thread_rows = sizeof(T) == 2 ? 4 : 8;
  static constexpr int batch = 4;             // rows of a thread whose loads are in flight at once
  static constexpr int unroll = thread_rows;  // the product is in registers: no index at run time
  static constexpr int rows = down * thread_rows, columns = across * (16 / sizeof(T));
};
template <class T> struct TensorCores {
  static constexpr bool cheap = false;
  static constexpr int rows = 128, columns = 128;
  static constexpr int across = columns / (16 / sizeof(T)), down = 256 / across;
  static constexpr int thread_rows = rows / down, batch = 2;
  static constexpr int unroll = 1;  // the product is in shared memory
};

struct ProjectGatePlan {
  bool tensor_cores;
  bool copies_error;  // tensor cores read whole packs of e: a padded copy, window by window
  int64_t tile_rows, strip_columns;
  int64_t chunk_rows, chunks;  // a block walks down the tiles of one chunk
  int64_t group_layers;        // most layers that one product serves
  int64_t window_rows;         // rows of a launch: those of one padded copy of e, or all
  int64_t padded_classes;
  int64_t panel_columns;  // columns of B that are generated at a time
  int64_t error_bytes, panel_bytes, scratch_bytes;
};

// A launch is described in the kernel's parameters, for up to this many layers.
constexpr int64_t launch_layers = 64;
// Column sums of every layer of a group stay in shared memory: 16 layers keep a block under the 99
// KB that sm_86 has (90 KB with tensor cores). With more layers that share B, e B is made once
// for 16.
constexpr int64_t most_group_layers = 16;
// The generated panel of B should be read from L2 (40 MB on an A100, 50 MB on an H100), the copy of
// e must be smaller than what the caller holds anyway.
constexpr int64_t most_panel_bytes = 16 << 20, most_error_bytes = 64 << 20;

FASTDFA_INLINE constexpr int64_t bytes_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

FASTDFA_INLINE bool aligned(const void* data, int64_t row_stride, DType dtype) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_stride * bytes_of(dtype) % 16 == 0;
}

// Whether tensor cores may read every given B as it is: 16 bytes at a time, the last of a row
// possibly beyond its columns.
FASTDFA_INLINE bool feedback_fits_tensor_cores(const ProjectGateParams& p) {
  if (p.feedback_dtype != p.dtype) return false;
  for (int64_t l = 0; l < p.layer_count; ++l) {
    const ProjectGateLayer& layer = p.layers[l];
    const int64_t whole = round_up(layer.columns, 16 / bytes_of(p.dtype));
    if (!aligned(layer.feedback, layer.feedback_row, p.dtype) || layer.feedback_row < whole)
      return false;
  }
  return true;
}

FASTDFA_INLINE bool is_generated(const ProjectGateParams& p) {
  return p.layer_count > 0 && p.layers[0].feedback == nullptr;
}

FASTDFA_INLINE bool uses_tensor_cores(const ProjectGateParams& p) {
  if (p.classes < tensor_core_classes || p.rows == 0 || p.dtype == DType::float64) return false;
  if (p.dtype == DType::float32 && !p.allow_tf32) return false;
  // A float32 error in fp16 could be flushed: it stays with the fp32 units.
  if (p.dtype == DType::float16 && p.error_dtype != DType::float16) return false;
  return is_generated(p) || feedback_fits_tensor_cores(p);
}

FASTDFA_INLINE ProjectGatePlan plan_project_gate(const ProjectGateParams& p) {
  ProjectGatePlan plan{};
  plan.tensor_cores = uses_tensor_cores(p);
  const int64_t size = bytes_of(p.dtype);
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    plan.tile_rows = plan.tensor_cores ? TensorCores<T>::rows : FewClasses<T>::rows;
    plan.strip_columns = plan.tensor_cores ? TensorCores<T>::columns : FewClasses<T>::columns;
  });
  plan.group_layers = p.shared ? min(p.layer_count, most_group_layers) : 1;

  int64_t strips = 0;
  for (int64_t l = 0; l < p.layer_count; l += plan.group_layers)
    strips += ceil_div(p.layers[l].columns, plan.strip_columns);
  // Longer chunks have fewer partial sums, shorter ones make enough blocks: 2048 are 5 waves of
  // three blocks on each of 132 multiprocessors.
  plan.chunk_rows = 512;
  while (plan.chunk_rows > plan.tile_rows && strips * ceil_div(p.rows, plan.chunk_rows) < 2048)
    plan.chunk_rows /= 2;
  plan.chunks = ceil_div(p.rows, plan.chunk_rows);

  plan.window_rows = max(p.rows, 1);
  plan.padded_classes = p.classes;
  if (plan.tensor_cores) {
    const int64_t pack = 16 / size;
    plan.copies_error = p.error_dtype != p.dtype || p.error_column != 1 || p.classes % pack != 0 ||
                        !aligned(p.error, p.error_row, p.dtype);
    if (plan.copies_error) {
      plan.padded_classes = round_up(p.classes, pack);
      const int64_t fitting = most_error_bytes / (plan.padded_classes * size);
      const int64_t window = max(fitting / plan.chunk_rows, 1) * plan.chunk_rows;
      plan.window_rows = min(window, plan.window_rows);
      plan.error_bytes = round_up(plan.window_rows * plan.padded_classes * size, 256);
    }
  }
  if (is_generated(p) && p.classes > 0) {
    const int64_t element = plan.tensor_cores || size == 8 ? size : 4;
    const int64_t fitting = most_panel_bytes / (p.classes * element);
    plan.panel_columns = max(fitting / plan.strip_columns, 1) * plan.strip_columns;
    // No more than all matrices need: of one row each where there are several.
    int64_t needed = 0;
    for (int64_t l = 0; l < p.layer_count; ++l) {
      const int64_t columns = round_up(p.layers[l].columns, plan.strip_columns);
      needed = p.shared ? max(needed, columns) : needed + columns;
    }
    plan.panel_columns = min(plan.panel_columns, max(needed, plan.strip_columns));
    plan.panel_bytes = round_up(plan.panel_columns * p.classes * element, 256);
  }
  plan.scratch_bytes = plan.error_bytes + plan.panel_bytes;
  return plan;
}

}  // namespace fastdfa::cuda
