// delta_l = scale_l * (error B_l) * f'_l(saved_l) and its column sums, for all layers in one pass.
//
// A small GEMM in the manner of BLIS: a panel of B is packed (or generated) into the L2 cache, a
// micro-kernel keeps a tile of the product in registers, and the product, which never leaves the
// cache, is gated for every layer that shares B.
#include "../project_gate.h"

#include "feedback_row.h"
#include "gate_rows.h"
#include "tile.h"

namespace fastdfa::FASTDFA_CPU {
namespace {

static_assert(Tile<float>::rows <= most_tile_rows && Tile<double>::rows <= most_tile_rows);
static_assert(column_quantum % Tile<float>::columns == 0);

// One strip of columns of the layers that share a matrix B.
template <class T> struct StripWork {
  using A = Accumulator<T>;
  using Tile = FASTDFA_CPU::Tile<A>;

  const ProjectGateParams& p;
  const ProjectGatePlan& plan;
  const ProjectGateLayer* layers;
  int64_t column, columns;
  A *panel, *b_row, *product;  // scratch: see project_gate_scratch

  StripWork(const ProjectGateParams& p, const ProjectGatePlan& plan, int64_t strip, A* scratch)
      : p(p),
        plan(plan),
        panel(scratch),
        b_row(scratch + plan.block_columns * plan.block_classes),
        product(b_row + plan.block_columns) {
    const Strip s = find_strip(p, plan, strip);
    layers = p.layers + s.group * plan.group_layers;
    column = s.column;
    columns = min(plan.block_columns, group_columns(p, plan, s.group) - column);
  }

  int64_t first_class(int64_t block) const { return block * plan.block_classes; }
  int64_t class_count(int64_t block) const {
    return min(plan.block_classes, p.classes - first_class(block));
  }

  // Packs a block of rows of B, tile by tile: panel[tile][class][column of the tile], the columns
  // after the last one filled with zeros.
  void pack(int64_t block) {
    const int64_t classes = class_count(block);
    for (int64_t c = 0; c < classes; ++c) {
      const A* source = b_row;
      const int64_t row = first_class(block) + c;
      if (layers->feedback)
        source = static_cast<const A*>(layers->feedback) + row * layers->feedback_row + column;
      else
        feedback_row(b_row, FeedbackKey{p.seed, layers->stream, p.distribution}, row, column,
                     columns);
      for (int64_t j = 0; j < columns; j += Tile::columns) {
        A* target = panel + j * classes + c * Tile::columns;
        const int64_t count = min(Tile::columns, columns - j);
        if (count < Tile::columns) clear(target, Tile::columns);
        __builtin_memcpy(target, source + j, count * sizeof(A));
      }
    }
  }

  // The product of one block of classes for a tile's height of rows from `row`. Rows after the last
  // one are computed as copies of it, and not used.
  void multiply_rows(int64_t row, int64_t last_row, int64_t block, A* out) {
    const int64_t classes = class_count(block);
    const A* error[Tile::rows];
    for (int r = 0; r < Tile::rows; ++r)
      error[r] = static_cast<const A*>(p.error) + min(row + r, last_row) * p.error_row +
                 first_class(block) * p.error_column;
    for (int64_t j = 0; j < columns; j += Tile::columns)
      multiply<tile_vectors>(error, p.error_column, panel + j * classes, classes,
                             out + j * Tile::rows, Tile::columns, block > 0);
  }

  void gate_layers(int64_t row, int64_t rows, int64_t chunk, const A* signal) {
    for (int64_t i = 0; i < plan.group_layers; ++i) {
      const ProjectGateLayer& layer = layers[i];
      if (layer.columns <= column) continue;
      gate_rows(layer.kind,
                GateBlock<A, T>{
                    signal, static_cast<const T*>(layer.saved) + row * layer.saved_row + column,
                    static_cast<T*>(layer.delta) + row * layer.columns + column,
                    bias_partial(layer, chunk), Tile::rows * Tile::columns, Tile::columns,
                    layer.saved_row, layer.columns, rows, layer_columns(layer),
                    static_cast<A>(layer.scale), static_cast<A>(layer.param)});
    }
  }

  int64_t layer_columns(const ProjectGateLayer& layer) const {
    return min(columns, layer.columns - column);
  }
  A* bias_partial(const ProjectGateLayer& layer, int64_t chunk) const {
    return static_cast<A*>(layer.bias_partial) + chunk * layer.columns + column;
  }

  void clear_bias(int64_t chunk) {
    for (int64_t i = 0; i < plan.group_layers; ++i)
      if (layers[i].columns > column)
        clear(bias_partial(layers[i], chunk), layer_columns(layers[i]));
  }

  // One task. With several blocks of classes the product of the whole chunk stays in scratch, so
  // that each block of B is packed once; else that of one row of tiles does.
  void run(int64_t chunk, bool packed) {
    clear_bias(chunk);
    const int64_t first = chunk * plan.chunk_rows;
    const int64_t rows = min(plan.chunk_rows, p.rows - first);
    for (int64_t block = 0; block < plan.class_blocks; ++block) {
      if (!packed) pack(block);
      for (int64_t row = 0; row < rows; row += Tile::rows) {
        A* out = product + (plan.class_blocks > 1 ? row * plan.block_columns : 0);
        multiply_rows(first + row, first + rows - 1, block, out);
        if (block == plan.class_blocks - 1)
          gate_layers(first + row, min(Tile::rows, rows - row), chunk, out);
      }
    }
  }
};

}  // namespace

void project_gate(const ProjectGateParams& p, const ProjectGatePlan& plan, int64_t begin,
                  int64_t end, void* scratch) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    int64_t packed = -1;  // strip whose only block is in the panel
    for (int64_t task = begin; task < end; ++task) {
      const int64_t strip = task / plan.chunks;
      StripWork<T>(p, plan, strip, static_cast<Accumulator<T>*>(scratch))
          .run(task % plan.chunks, strip == packed);
      packed = plan.class_blocks == 1 ? strip : -1;
    }
  });
}

}  // namespace fastdfa::FASTDFA_CPU
