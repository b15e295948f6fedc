// c = f(a b + bias) or c = (a b) * f'(saved): several independent matrix products in one list of
// tasks.
#pragma once

#include "activation.h"

namespace fastdfa {

struct GemmProblem {
  const void* a;     // [rows, depth]
  const void* b;     // [depth, columns]
  void* c;           // [rows, columns], unit column stride
  const void* bias;  // [columns], or null
  // In elements. One stride of a and one of b is 1, as of a matrix or of a transposed one.
  int64_t a_row, a_column, b_row, b_column, c_row;
  int64_t rows, columns, depth;
  double param;
  Activation kind;  // one whose derivative is a function of the output, unless the product is gated
  // Where `sums` is set, the product is gated: c = (a b) * f'(saved), of any kind and without bias.
  const void* saved;  // [rows, columns], unit column stride; not read for identity
  int64_t saved_row;
  void* sums;  // [gemm_chunks, columns], accumulation type: column sums of each chunk of rows of c
};

struct GemmParams {
  const GemmProblem* problems;  // [count]
  int64_t count;
  DType dtype;  // float32 or float64
};

// How the work is cut. A task is a block of rows x columns of one product; the depth is summed in
// blocks of fixed size, so the numbers do not depend on how many threads there are.
struct GemmPlan {
  // Multiples of gemm_rows, or where a product is gated of gemm_chunk_rows, and of gemm_columns.
  int64_t block_rows, block_columns;
  int64_t panel_a, panel_b;  // elements of the packed panels
  int64_t tasks;
};

struct GemmTask {
  int64_t problem, row, column;
};

constexpr int64_t gemm_columns = 64;  // multiple of the width of every micro-kernel
constexpr int64_t gemm_rows = 12;     // multiple of the height of every micro-kernel
// A packed panel of b, [256, 256] of float, takes a quarter of an L2 cache of 1 MB. Twice as wide a
// panel was no faster, and twice the scratch.
constexpr int64_t gemm_depth = 256, gemm_most_columns = 256;
// Rows of a that are packed at a time, where they are: [96, 256] of float, 96 KB of the L2 cache.
constexpr int64_t gemm_packed_rows = 96;
static_assert(gemm_packed_rows % gemm_rows == 0, "the packed rows are whole tiles");
// Rows that are summed together where a product is gated. They belong to one task, so the sums do
// not depend on how many threads there are; the sums of a chunk are 1/48 of the traffic.
constexpr int64_t gemm_chunk_rows = 48;
static_assert(gemm_chunk_rows % gemm_rows == 0, "a chunk is made of whole tiles");

FASTDFA_INLINE int64_t gemm_chunks(int64_t rows) { return ceil_div(rows, gemm_chunk_rows); }

FASTDFA_INLINE int64_t gemm_tasks(const GemmProblem& g, const GemmPlan& plan) {
  return ceil_div(g.rows, plan.block_rows) * ceil_div(g.columns, plan.block_columns);
}

FASTDFA_INLINE GemmPlan plan_gemm(const GemmParams& p, int64_t threads) {
  // Each task packs its own panel, so blocks are as large as threads leave them: columns are split
  // first, as packing b, which may have to be transposed, is what costs.
  int64_t rows = 1, columns = 1, depth = 1, least_rows = gemm_rows;
  for (int64_t i = 0; i < p.count; ++i) {
    const GemmProblem& g = p.problems[i];
    if (g.sums) least_rows = gemm_chunk_rows;
    rows = max(rows, g.rows), columns = max(columns, g.columns), depth = max(depth, g.depth);
  }
  depth = min(depth, gemm_depth);
  GemmPlan plan{};
  int64_t row_parts = 1, column_parts = ceil_div(columns, gemm_most_columns);
  for (;;) {
    plan.block_rows = round_up(ceil_div(rows, row_parts), least_rows);
    plan.block_columns = round_up(ceil_div(columns, column_parts), gemm_columns);
    plan.panel_a = depth * gemm_packed_rows;
    plan.panel_b = depth * plan.block_columns;
    plan.tasks = 0;
    for (int64_t i = 0; i < p.count; ++i) plan.tasks += gemm_tasks(p.problems[i], plan);
    // Few tasks are shared out evenly only where they are a multiple of the threads.
    if (threads == 1 || plan.tasks >= 4 * threads || plan.tasks % threads == 0) return plan;
    if (plan.block_columns > gemm_columns) {
      ++column_parts;
    } else if (plan.block_rows > least_rows) {
      ++row_parts;
    } else {
      return plan;
    }
  }
}

FASTDFA_INLINE GemmTask find_gemm_task(const GemmParams& p, const GemmPlan& plan, int64_t index) {
  for (int64_t i = 0;; ++i) {
    const int64_t tasks = gemm_tasks(p.problems[i], plan);
    if (index < tasks) {
      // Tasks of one block of columns follow each other.
      const int64_t row_blocks = ceil_div(p.problems[i].rows, plan.block_rows);
      return {i, index % row_blocks * plan.block_rows, index / row_blocks * plan.block_columns};
    }
    index -= tasks;
  }
}

FASTDFA_INLINE int64_t gemm_multiplications(const GemmProblem& g) {
  return g.rows * g.columns * max(g.depth, 1);
}

// The first task of a part, where the tasks, which differ in size, are cut in order into `parts` of
// as many multiplications as can be.
FASTDFA_INLINE int64_t gemm_first_task(const GemmParams& p, const GemmPlan& plan, int64_t part,
                                       int64_t parts) {
  int64_t total = 0, before = 0;
  for (int64_t i = 0; i < p.count; ++i) total += gemm_multiplications(p.problems[i]);
  for (int64_t index = 0; index < plan.tasks; ++index) {
    const GemmTask task = find_gemm_task(p, plan, index);
    const GemmProblem& g = p.problems[task.problem];
    const int64_t size = min(plan.block_rows, g.rows - task.row) *
                         min(plan.block_columns, g.columns - task.column) * max(g.depth, 1);
    if ((2 * before + size) * parts >= 2 * part * total) return index;
    before += size;
  }
  return plan.tasks;
}

// Elements that one thread needs: the packed panels, and a tile of the product.
FASTDFA_INLINE int64_t gemm_scratch(const GemmPlan& plan) {
  return round_up(plan.panel_a + plan.panel_b + gemm_rows * gemm_columns, 64);
}

constexpr int64_t chain_rows = 16;                  // fewest rows of a thread: a vector of float
constexpr int64_t small_multiplications = 1 << 21;  // some 40 us of one thread

// The widest input or output of a chain of products.
FASTDFA_INLINE int64_t chain_features(const GemmParams& p) {
  int64_t widest = 0;
  for (int64_t i = 0; i < p.count; ++i)
    widest = max(widest, max(p.problems[i].depth, p.problems[i].columns));
  return widest;
}

// Elements that one thread needs for a chain: inputs and outputs of a layer, up to whole tiles.
FASTDFA_INLINE int64_t chain_scratch(const GemmParams& p) {
  return 2 * round_up(chain_features(p), gemm_rows) * gemm_columns;
}

// Whether a thread had better make its rows of all products of a chain, transposing inputs and
// outputs (csrc/cpu/linear_chain.cpp), than all threads one product after the other, for which
// weights are packed. One core of a Zen 4 processor, GFLOP/s: 1x1024x1024 of 32 rows 105 and 74,
// 32x128x128 of 64 rows 85 and 76, 4096x4096 of 256 rows 110 and 104; but 16x64x64 of 2048 rows 68
// and 83.
FASTDFA_INLINE bool chain_by_rows(const GemmParams& p, int64_t threads) {
  if (p.count == 0 || p.problems[0].rows < chain_rows) return false;
  const int64_t rows = p.problems[0].rows;
  int64_t transposed = rows * p.problems[0].depth, packed = 0, most = 0;
  for (int64_t i = 0; i < p.count; ++i) {
    const GemmProblem& g = p.problems[i];
    transposed += rows * g.columns;
    packed += g.depth * g.columns;
    most = max(most, rows * g.depth * g.columns);
  }
  // Fewer rows than threads could share leave some idle, which small products do in any case.
  const int64_t parts = min(threads, rows / chain_rows);
  return transposed <= 2 * packed && (parts == threads || most <= parts * small_multiplications);
}

}  // namespace fastdfa
