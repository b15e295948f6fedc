#pragma once

#include "activation.h"
#include "philox.h"

namespace fastdfa {

struct ProjectGateLayer {
  const void* feedback;  // [classes, >= columns], unit column stride; null: generated
  const void* saved;     // [rows, columns], unit column stride; not read for identity
  void* delta;           // [rows, columns], contiguous
  void* bias_partial;    // [chunks, columns], accumulation type: column sums of each chunk of rows
  int64_t feedback_row, saved_row;  // row strides, in elements
  int64_t columns;
  double scale, param;
  Activation kind;
  uint32_t stream;  // of the generated feedback
};

struct ProjectGateParams {
  const void* error;  // [rows, classes], any strides
  int64_t error_row, error_column;
  int64_t rows, classes;
  const ProjectGateLayer* layers;  // [layer_count]
  int64_t layer_count;
  bool shared;  // all layers read the feedback of layer 0: one product serves them all
  DType dtype;  // of saved and delta
  DType error_dtype, feedback_dtype;  // on the CPU: the accumulation type
  bool allow_tf32;                    // CUDA: float32 products may be made of tf32 operands
  uint64_t seed;
  Distribution distribution;
};

// How the work is cut, a function of the shapes alone: the bias gradient, which is summed chunk by
// chunk, is the same on any number of threads.
//
// A strip is a block of columns of one matrix B; a task is one strip x one chunk of rows. Tasks of
// one strip are consecutive, so a thread can keep the panel of B that it has packed.
struct ProjectGatePlan {
  int64_t groups;         // matrices B
  int64_t group_layers;   // layers that share one
  int64_t block_columns;  // columns of a strip, multiple of column_quantum
  int64_t block_classes;  // rows of B that are packed at a time
  int64_t class_blocks;
  int64_t chunk_rows, chunks;
  int64_t strips;
};

struct Strip {
  int64_t group, column;
};

constexpr int64_t column_quantum = 64;  // multiple of the width of every micro-kernel
constexpr int64_t most_tile_rows = 8;   // at least the height of every micro-kernel

FASTDFA_INLINE int64_t group_columns(const ProjectGateParams& p, const ProjectGatePlan& plan,
                                     int64_t group) {
  int64_t widest = 0;
  for (int64_t i = 0; i < plan.group_layers; ++i)
    widest = max(widest, p.layers[group * plan.group_layers + i].columns);
  return widest;
}

FASTDFA_INLINE ProjectGatePlan plan_project_gate(const ProjectGateParams& p) {
  ProjectGatePlan plan{};
  plan.groups = p.shared ? min(p.layer_count, 1) : p.layer_count;
  plan.group_layers = p.shared ? p.layer_count : 1;
  int64_t widest = 1;
  for (int64_t g = 0; g < plan.groups; ++g) widest = max(widest, group_columns(p, plan, g));

  // The panel of B [block_classes, block_columns] takes 256 KB of the L2 cache at most. Few classes
  // leave room for wide strips, along which delta and saved stream.
  const int64_t panel = p.dtype == DType::float64 ? 32768 : 65536;
  plan.class_blocks = max(1, ceil_div(p.classes, 256));
  plan.block_classes = ceil_div(p.classes, plan.class_blocks);
  const int64_t fitting = panel / max(plan.block_classes, 1) / column_quantum * column_quantum;
  const int64_t most_columns = min(1024, max(fitting, column_quantum));
  plan.block_columns = round_up(ceil_div(widest, ceil_div(widest, most_columns)), column_quantum);
  for (int64_t g = 0; g < plan.groups; ++g)
    plan.strips += ceil_div(group_columns(p, plan, g), plan.block_columns);

  // More rows amortise the packing of B (or its generation, several times dearer); fewer rows make
  // enough tasks for many cores. Multiples of 24, as the tiles are 6 or 4 rows high.
  const bool generated = p.layer_count > 0 && p.layers[0].feedback == nullptr;
  // One block of classes stays packed from task to task; several are packed for every task.
  const int64_t fewest_rows = plan.class_blocks == 1 ? 24 : generated ? 96 : 48;
  plan.chunk_rows = generated ? 384 : 96;
  while (plan.chunk_rows > fewest_rows && plan.strips * ceil_div(p.rows, plan.chunk_rows) < 64)
    plan.chunk_rows /= 2;
  plan.chunks = ceil_div(p.rows, plan.chunk_rows);
  return plan;
}

FASTDFA_INLINE Strip find_strip(const ProjectGateParams& p, const ProjectGatePlan& plan,
                                int64_t index) {
  for (int64_t g = 0;; ++g) {
    const int64_t strips = ceil_div(group_columns(p, plan, g), plan.block_columns);
    if (index < strips) return {g, index * plan.block_columns};
    index -= strips;
  }
}

// Elements (accumulation type) that one thread needs: the packed panel of B, one row of B, and the
// product, of a whole chunk where it is summed over several blocks of classes.
FASTDFA_INLINE int64_t project_gate_scratch(const ProjectGatePlan& plan) {
  const int64_t product_rows = plan.class_blocks > 1 ? plan.chunk_rows : 0;
  return plan.block_columns * (plan.block_classes + 1 + product_rows + most_tile_rows);
}

}  // namespace fastdfa
