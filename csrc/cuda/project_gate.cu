// delta_l = scale_l * (error B_l) * f'_l(saved_l) and its column sums, for many layers in a launch.
//
// A block makes a tile of the product e B, on fp32 units (few_classes) or on tensor cores
// (tensor_cores), hands it to its threads, each with 16 bytes of columns, and gates it for every
// layer that shares B: saved is read and delta written once, the product never leaves the chip.
#include "device.h"
#include "kernels.h"
#include "project_gate.h"

namespace fastdfa::cuda {
namespace {

struct Layer {
  const void* saved;  // [rows, columns]; not read for identity
  void* delta;        // [rows, columns]
  void* partial;      // [chunks, columns]
  int64_t saved_row, delta_row, partial_row, columns;
  double scale, param;
  Activation kind;
  bool whole;  // saved and delta are accessed 16 bytes at a time
};

// Layers that share a matrix B, or a panel of its columns.
struct Group {
  const void* feedback;  // [classes, columns]
  int64_t feedback_row, columns;
  int64_t first_strip;
  int first_layer, layers;
};

struct Launch {
  const void* error;  // [rows, classes]
  int64_t error_row, error_column;
  int64_t rows, classes;
  int64_t chunk_rows, chunks, strips;
  DType error_dtype, feedback_dtype;
  int group_count, layer_count;
  int group_layers;  // most layers of a group
  Group groups[launch_layers];
  Layer layers[launch_layers];
};
static_assert(sizeof(Launch) <= 32764 - 4096, "kernel parameters take 32,764 bytes at most");

// -- what both kernels share ---------------------------------------------------------------------

// One strip of columns x one chunk of rows.
struct Item {
  const Group& group;
  int64_t column, chunk;
};

// Strips next to each other run at the same time: they read the same rows of e.
__device__ __forceinline__ Item find_item(const Launch& p, int64_t index, int strip_columns) {
  const int64_t strip = index % p.strips;
  int first = 0, last = p.group_count - 1;
  while (first < last) {
    const int middle = (first + last + 1) / 2;
    if (p.groups[middle].first_strip <= strip) {
      first = middle;
    } else {
      last = middle - 1;
    }
  }
  const Group& group = p.groups[first];
  return {group, (strip - group.first_strip) * strip_columns, index / p.strips};
}

// Element i of an array of a type known at run time.
template <class A> __device__ __forceinline__ A load_any(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::float32:
      return static_cast<A>(static_cast<const float*>(data)[i]);
    case DType::float64:
      return static_cast<A>(static_cast<const double*>(data)[i]);
    case DType::bfloat16:
      return static_cast<A>(widen(static_cast<const bfloat16*>(data)[i]));
    default:
      return static_cast<A>(widen(static_cast<const float16*>(data)[i]));
  }
}

// The part of a tile that is common to both kernels: T of saved and delta, Tile its sizes.
template <class T, class Tile> struct Epilogue {
  using A = Accumulator<T>;
  static constexpr int threads = Tile::across * Tile::down;
  static constexpr int width = Pack<T>::size;  // columns of a thread
  static constexpr int batch = Tile::batch;
  static_assert(Tile::thread_rows % batch == 0);
  struct Shared {
    A partial[2][Tile::down][Tile::columns];
    // One for each layer of a group; behind them lies what a kernel wants.
    A sums[1][Tile::columns];
  };
  static constexpr size_t shared_bytes(int64_t rows) {
    return sizeof(Shared) + (rows - 1) * Tile::columns * sizeof(A);
  }

  // Where a column of the tile lies in a row of shared memory: neighbouring threads take
  // neighbouring packs, so that 16-byte accesses meet no bank conflict.
  __device__ static int place(int column) {
    constexpr int pack = Pack<A>::size;
    return column % width / pack * (Tile::across * pack) + column / width * pack + column % pack;
  }

  __device__ static int across() { return threadIdx.x % Tile::across; }
  __device__ static int down() { return threadIdx.x / Tile::across; }

  // The thread's columns of a row of shared memory.
  __device__ __forceinline__ static void load_columns(const A* row, A (&values)[width]) {
    constexpr int pack = Pack<A>::size;
#pragma unroll
    for (int i = 0; i < width / pack; ++i) {
      const Pack<A> part =
          *reinterpret_cast<const Pack<A>*>(row + (i * Tile::across + across()) * pack);
#pragma unroll
      for (int k = 0; k < pack; ++k) values[i * pack + k] = part.v[k];
    }
  }
  __device__ __forceinline__ static void store_columns(A* row, const A (&values)[width]) {
    constexpr int pack = Pack<A>::size;
#pragma unroll
    for (int i = 0; i < width / pack; ++i) {
      Pack<A> part;
#pragma unroll
      for (int k = 0; k < pack; ++k) part.v[k] = values[i * pack + k];
      *reinterpret_cast<Pack<A>*>(row + (i * Tile::across + across()) * pack) = part;
    }
  }

  // Gates `batch` rows for one layer, and adds them up.
  template <Activation kind>
  __device__ __forceinline__ static void gate(const Layer& layer, int64_t row, int64_t rows,
                                              int64_t column, const A (&product)[batch][width],
                                              const Pack<T> (&saved)[batch], A (&sum)[width]) {
    const A scale = static_cast<A>(layer.scale);
    [[maybe_unused]] const A param = static_cast<A>(layer.param);
#pragma unroll
    for (int r = 0; r < batch; ++r) {
      if (row + r >= rows) continue;  // also keeps rows apart: mixed, they need twice the registers
      Pack<T> delta;
#pragma unroll
      for (int i = 0; i < width; ++i) {
        A d = product[r][i] * scale;
        if constexpr (kind != Activation::identity)
          d *= derivative<kind>(static_cast<A>(widen(saved[r].v[i])), param);
        sum[i] += d;
        narrow(d, delta.v[i]);
      }
      store_pack(static_cast<T*>(layer.delta) + (row + r) * layer.delta_row, column, layer.columns,
                 Tile::cheap || layer.whole, delta);
    }
  }

  // read(r, values): the thread's columns of its row r of the product.
  template <class Read>
  __device__ __forceinline__ static void gate_layer(const Layer& layer, int64_t first_row,
                                                    int64_t rows, int64_t column, const Read& read,
                                                    A (&sum)[width]) {
#pragma unroll Tile::unroll
    for (int b = 0; b < Tile::thread_rows; b += batch) {
      const int64_t row = first_row + b;
      Pack<T> saved[batch] = {};
      if (layer.kind != Activation::identity) {
#pragma unroll
        for (int r = 0; r < batch; ++r)
          if (row + r < rows)
            saved[r] = load_pack(static_cast<const T*>(layer.saved) + (row + r) * layer.saved_row,
                                 column, layer.columns, Tile::cheap || layer.whole);
      }
      A product[batch][width];
#pragma unroll
      for (int r = 0; r < batch; ++r) read(b + r, product[r]);
      dispatch_activation(layer.kind, [&](auto kind) {
        constexpr Activation value = decltype(kind)::value;
        if constexpr (!Tile::cheap || derivative_is_cheap(value))
          gate<value>(layer, row, rows, column, product, saved, sum);
      });
    }
  }

  // Gates the tile that begins at `row` for every layer of the group; `turn` alternates between two
  // buffers, so that one barrier a layer is enough.
  template <class Read>
  __device__ __forceinline__ static void gate_tile(const Launch& p, const Item& item, int64_t row,
                                                   bool first_tile, const Read& read,
                                                   Shared& shared, int& turn) {
    const int64_t column = item.column + across() * width;
    for (int l = 0; l < item.group.layers; ++l) {
      const Layer& layer = p.layers[item.group.first_layer + l];
      if (item.column >= layer.columns) continue;
      A sum[width] = {};
      gate_layer(layer, row + down() * Tile::thread_rows, p.rows, column, read, sum);
      store_columns(shared.partial[turn][down()], sum);
      __syncthreads();
      for (int j = threadIdx.x; j < Tile::columns; j += threads) {
        A total = first_tile ? A(0) : shared.sums[l][j];
#pragma unroll
        for (int d = 0; d < Tile::down; ++d) total += shared.partial[turn][d][place(j)];
        shared.sums[l][j] = total;
      }
      turn ^= 1;
    }
  }

  // Each sum is written by the thread that made it.
  __device__ __forceinline__ static void store_sums(const Launch& p, const Item& item,
                                                    const Shared& shared) {
    for (int l = 0; l < item.group.layers; ++l) {
      const Layer& layer = p.layers[item.group.first_layer + l];
      A* row = static_cast<A*>(layer.partial) + item.chunk * layer.partial_row;
      for (int j = threadIdx.x; j < Tile::columns; j += threads)
        if (item.column + j < layer.columns) row[item.column + j] = shared.sums[l][j];
    }
  }
};

// -- few classes: fp32 (fp64) units --------------------------------------------------------------

template <class T, bool cheap> struct FewClassesKernel {
  using Tile = FewClasses<T, cheap>;
  using Epilogue = cuda::Epilogue<T, Tile>;
  using A = Accumulator<T>;
  static constexpr int width = Epilogue::width, rows = Tile::thread_rows;
  static constexpr int most_depth = 32;  // classes at a time; B stays where there are no more

  struct Shared {
    A error[most_depth][Tile::rows + Pack<A>::size];  // transposed
    typename Epilogue::Shared epilogue;
  };
  static size_t shared_bytes(const Launch& p) {
    return offsetof(Shared, epilogue) + Epilogue::shared_bytes(p.group_layers + depth(p));
  }
  FASTDFA_INLINE static int depth(const Launch& p) {
    return static_cast<int>(min(p.classes, most_depth));
  }
  // B is behind the sums.
  __device__ static A* feedback(const Launch& p, Shared& shared, int c) {
    return shared.epilogue.sums[p.group_layers + c];
  }

  __device__ static void load_error(const Launch& p, int64_t row, int64_t first, Shared& shared) {
#pragma unroll 1  // registers are better spent on the product
    for (int i = threadIdx.x; i < Tile::rows * most_depth; i += Epilogue::threads) {
      const int r = i / most_depth, c = i % most_depth;
      const bool inside = row + r < p.rows && first + c < p.classes;
      const int64_t at = (row + r) * p.error_row + (first + c) * p.error_column;
      shared.error[c][r] = inside ? load_any<A>(p.error, p.error_dtype, at) : A(0);
    }
  }

  __device__ static void load_feedback(const Launch& p, const Item& item, int64_t first,
                                       Shared& shared) {
    const Group& group = item.group;
#pragma unroll 1
    for (int i = threadIdx.x; i < Tile::columns * depth(p); i += Epilogue::threads) {
      const int c = i / Tile::columns, j = i % Tile::columns;
      const bool inside = first + c < p.classes && item.column + j < group.columns;
      const int64_t at = (first + c) * group.feedback_row + item.column + j;
      feedback(p, shared, c)[Epilogue::place(j)] =
          inside ? load_any<A>(group.feedback, p.feedback_dtype, at) : A(0);
    }
  }

  __device__ __forceinline__ static void multiply(const Launch& p, Shared& shared, int classes,
                                                  A (&product)[rows][width]) {
    constexpr int pack = Pack<A>::size;
#pragma unroll 2
    for (int c = 0; c < classes; ++c) {
      A b[width];
      Epilogue::load_columns(feedback(p, shared, c), b);
#pragma unroll
      for (int r = 0; r < rows; r += pack) {
        const Pack<A> e =
            *reinterpret_cast<const Pack<A>*>(&shared.error[c][Epilogue::down() * rows + r]);
#pragma unroll
        for (int k = 0; k < pack; ++k)
#pragma unroll
          for (int i = 0; i < width; ++i) product[r + k][i] += e.v[k] * b[i];
      }
    }
  }

  __device__ static void run(const Launch& p) {
    Shared& shared = *static_cast<Shared*>(shared_memory());
    int turn = 0;
    for (int64_t index = blockIdx.x; index < p.strips * p.chunks; index += gridDim.x) {
      const Item item = find_item(p, index, Tile::columns);
      const int64_t begin = item.chunk * p.chunk_rows, end = min(begin + p.chunk_rows, p.rows);
      for (int64_t row = begin; row < end; row += Tile::rows) {
        A product[rows][width] = {};
        for (int64_t first = 0; first < p.classes; first += most_depth) {
          __syncthreads();
          load_error(p, row, first, shared);
          if (row == begin || p.classes > most_depth) load_feedback(p, item, first, shared);
          __syncthreads();
          multiply(p, shared, static_cast<int>(min(most_depth, p.classes - first)), product);
        }
        const auto read = [&](int r, A(&values)[width]) {
#pragma unroll
          for (int i = 0; i < width; ++i) values[i] = product[r][i];
        };
        Epilogue::gate_tile(p, item, row, row == begin, read, shared.epilogue, turn);
      }
      Epilogue::store_sums(p, item, shared.epilogue);
    }
  }
};

template <class T, bool cheap>
__global__ void __launch_bounds__(128, cheap ? 5 : 3) few_classes(FASTDFA_PARAMS Launch p) {
  FewClassesKernel<T, cheap>::run(p);
}

// -- many classes: tensor cores ------------------------------------------------------------------

template <class T> struct TensorCoreKernel {
  using Tile = TensorCores<T>;
  using Epilogue = cuda::Epilogue<T, Tile>;
  static constexpr int pack = Pack<T>::size;
  static constexpr int depth = 4 * pack;                // classes of a stage: 64 bytes
  static constexpr int step = sizeof(T) == 2 ? 16 : 8;  // classes of a matrix instruction
  static constexpr int stages = 3;
  // A warp computes 64 x 32 of the tile, the 8 warps of a block lie 2 x 4.
  static constexpr int warp_rows = 64, warp_columns = 32, warps_across = 4;
  static constexpr int high = warp_rows / 16, wide = warp_columns / 8;
  using Sums = float[high][wide][4];

  // Padded rows: the matrix rows of an instruction begin in different banks.
  struct Stage {
    T error[Tile::rows][depth + pack];
    T feedback[depth][Tile::columns + 8];
  };
  struct Shared {
    union {
      Stage stage[stages];
      float product[Tile::rows][Tile::columns + 4];
    };
    typename Epilogue::Shared epilogue;
  };
  static size_t shared_bytes(const Launch& p) {
    return offsetof(Shared, epilogue) + Epilogue::shared_bytes(p.group_layers);
  }

  // The operands of a tile. Sizes in 32 bits, from the tile's corner on: registers are scarce.
  struct Operands {
    const T *error, *feedback;
    int64_t error_row, feedback_row;
    int rows, columns, classes;
  };
  __device__ __forceinline__ static Operands operands(const Launch& p, const Item& item,
                                                      int64_t row) {
    const Group& group = item.group;
    return {static_cast<const T*>(p.error) + row * p.error_row,
            static_cast<const T*>(group.feedback) + item.column,
            p.error_row,
            group.feedback_row,
            static_cast<int>(min(p.rows - row, Tile::rows)),
            static_cast<int>(min(group.columns - item.column, Tile::columns)),
            static_cast<int>(p.classes)};
  }

  // Begins to copy the classes [first, first + depth).
  __device__ __forceinline__ static void copy(const Operands& from, int first, Stage& stage) {
    constexpr int error_packs = depth / pack, feedback_packs = Tile::columns / pack;
#pragma unroll
    for (int i = 0; i < Tile::rows * error_packs; i += Epilogue::threads) {
      const int r = (i + threadIdx.x) / error_packs, c = (i + threadIdx.x) % error_packs * pack;
      copy_async(&stage.error[r][c], from.error + r * from.error_row + (first + c),
                 r < from.rows && first + c < from.classes);
    }
#pragma unroll
    for (int i = 0; i < depth * feedback_packs; i += Epilogue::threads) {
      const int c = (i + threadIdx.x) / feedback_packs;
      const int j = (i + threadIdx.x) % feedback_packs * pack;
      copy_async(&stage.feedback[c][j], from.feedback + (first + c) * from.feedback_row + j,
                 first + c < from.classes && j < from.columns);
    }
  }

  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int warp_row() { return threadIdx.x / 32 / warps_across * warp_rows; }
  __device__ static int warp_column() { return threadIdx.x / 32 % warps_across * warp_columns; }

  // a: 16 rows of the error; b: all columns of the warp; `step` classes from k on.
  __device__ __forceinline__ static void load_error(const Stage& stage, int m, int k,
                                                    uint32_t (&a)[4]) {
    const int row = warp_row() + 16 * m;
    if constexpr (sizeof(T) == 2) {
      load_matrices(a, &stage.error[row + lane() % 16][k + lane() / 16 * 8]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[i] = round_to_tf32(stage.error[row + lane() / 4 + i % 2 * 8][k + lane() % 4 + i / 2 * 4]);
    }
  }
  __device__ __forceinline__ static void load_feedback(const Stage& stage, int k,
                                                       uint32_t (&b)[wide][2]) {
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int n = 0; n < wide; n += 2) {
        uint32_t r[4];
        load_matrices_transposed(
            r, &stage.feedback[k + lane() % 16][warp_column() + 8 * n + lane() / 16 * 8]);
        b[n][0] = r[0], b[n][1] = r[1], b[n + 1][0] = r[2], b[n + 1][1] = r[3];
      }
    } else {
#pragma unroll
      for (int n = 0; n < wide; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          b[n][i] = round_to_tf32(
              stage.feedback[k + lane() % 4 + 4 * i][warp_column() + 8 * n + lane() / 4]);
    }
  }

  __device__ __forceinline__ static void multiply(const Stage& stage, Sums& sums) {
#pragma unroll
    for (int k = 0; k < depth; k += step) {
      uint32_t b[wide][2];
      load_feedback(stage, k, b);
#pragma unroll
      for (int m = 0; m < high; ++m) {
        uint32_t a[4];
        load_error(stage, m, k, a);
#pragma unroll
        for (int n = 0; n < wide; ++n) multiply_add<T>(sums[m][n], a, b[n]);
      }
    }
  }

  // From the layout of the instruction to shared memory, where threads find whole packs.
  __device__ __forceinline__ static void store(const Sums& sums, Shared& shared) {
    const int group = lane() / 4, place = lane() % 4;
#pragma unroll
    for (int m = 0; m < high; ++m)
#pragma unroll
      for (int n = 0; n < wide; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = warp_row() + 16 * m + group + i / 2 * 8;
          const int column = warp_column() + 8 * n + 2 * place + i % 2;
          shared.product[row][Epilogue::place(column)] = sums[m][n][i];
        }
  }

  __device__ __forceinline__ static void make_product(const Launch& p, const Item& item,
                                                      int64_t row, Shared& shared) {
    Sums sums = {};
    const int blocks = static_cast<int>(ceil_div(p.classes, depth));
    const Operands from = operands(p, item, row);
#pragma unroll
    for (int s = 0; s < stages - 1; ++s) {
      copy(from, s * depth, shared.stage[s]);
      commit_copies();
    }
    for (int block = 0; block < blocks; ++block) {
      wait_copies<stages - 2>();
      __syncthreads();
      const int next = block + stages - 1;
      if (next < blocks) copy(from, next * depth, shared.stage[next % stages]);
      commit_copies();
      multiply(shared.stage[block % stages], sums);
    }
    wait_copies<0>();
    __syncthreads();
    store(sums, shared);
    __syncthreads();
  }

  __device__ static void run(const Launch& p) {
    Shared& shared = *static_cast<Shared*>(shared_memory());
    int turn = 0;
    for (int64_t index = blockIdx.x; index < p.strips * p.chunks; index += gridDim.x) {
      const int64_t begin = index / p.strips * p.chunk_rows;
      const int64_t end = min(begin + p.chunk_rows, p.rows);
      for (int64_t row = begin; row < end; row += Tile::rows) {
        make_product(p, find_item(p, index, Tile::columns), row, shared);
        // Found again rather than kept in registers, of which the product needs all.
        forget(index);
        forget(row);
        const Item item = find_item(p, index, Tile::columns);
        const bool first_tile = row == item.chunk * p.chunk_rows;
        const auto read = [&](int r, float (&values)[Epilogue::width]) {
          const int line = Epilogue::down() * Tile::thread_rows + r;
          Epilogue::load_columns(shared.product[line], values);
        };
        Epilogue::gate_tile(p, item, row, first_tile, read, shared.epilogue, turn);
      }
      Epilogue::store_sums(p, find_item(p, index, Tile::columns), shared.epilogue);
    }
  }
};

template <class T> __global__ void __launch_bounds__(256, 2) tensor_cores(FASTDFA_PARAMS Launch p) {
  TensorCoreKernel<T>::run(p);
}

// -- the padded copy of e ------------------------------------------------------------------------

struct PadError {
  const void* error;  // [rows, classes]
  void* out;          // [rows, padded]
  int64_t error_row, error_column;
  int64_t rows, classes, padded;
  DType error_dtype;
};

template <class T> __global__ void __launch_bounds__(256) pad_error(FASTDFA_PARAMS PadError p) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < p.rows * p.padded;
       i += stride) {
    const int64_t r = i / p.padded, c = i % p.padded;
    float e = 0;
    if (c < p.classes)
      e = load_any<float>(p.error, p.error_dtype, r * p.error_row + c * p.error_column);
    narrow(e, static_cast<T*>(p.out)[i]);
  }
}

// -- from the layers of a call to launches -------------------------------------------------------

template <class Kernel>
cudaError_t launch_items(void (*kernel)(Launch), const Launch& p, Stream stream) {
  const unsigned blocks = static_cast<unsigned>(min(p.strips * p.chunks, most_blocks));
  return launch(kernel, dim3(blocks), dim3(Kernel::Epilogue::threads), Kernel::shared_bytes(p),
                stream, p);
}

bool is_cheap(const Launch& p) {
  for (int l = 0; l < p.layer_count; ++l)
    if (!p.layers[l].whole || !derivative_is_cheap(p.layers[l].kind)) return false;
  return true;
}

template <class T> cudaError_t launch_few_classes(const Launch& p, Stream stream) {
  if (is_cheap(p)) return launch_items<FewClassesKernel<T, true>>(few_classes<T, true>, p, stream);
  return launch_items<FewClassesKernel<T, false>>(few_classes<T, false>, p, stream);
}

const char* shifted(const void* data, int64_t elements, DType dtype) {
  return static_cast<const char*>(data) + elements * bytes_of(dtype);
}
char* shifted(void* data, int64_t elements, DType dtype) {
  return static_cast<char*>(data) + elements * bytes_of(dtype);
}

// Fills launches with groups of layers, for one window of rows at a time.
class Launcher {
 public:
  Launcher(const ProjectGateParams& p, const ProjectGatePlan& plan, void* scratch, Stream stream)
      : p_(p), plan_(plan), stream_(stream) {
    copied_error_ = static_cast<char*>(scratch);
    panel_ = copied_error_ + plan.error_bytes;
    panel_dtype_ = plan.tensor_cores || p.dtype == DType::float64 ? p.dtype : DType::float32;
    generated_ = plan.panel_columns > 0;
  }

  cudaError_t run() {
    for (int64_t row = 0; row < p_.rows && ok(); row += plan_.window_rows) {
      begin_window(row, min(plan_.window_rows, p_.rows - row));
      for (int64_t first = 0; first < p_.layer_count && ok(); first += plan_.group_layers)
        add_group(first, min(plan_.group_layers, p_.layer_count - first));
      flush();
    }
    return code_;
  }

 private:
  bool ok() const { return code_ == cudaSuccess; }
  void check(cudaError_t code) {
    if (ok()) code_ = code;
  }

  void begin_window(int64_t row, int64_t rows) {
    row_ = row;
    launch_.error = shifted(p_.error, row * p_.error_row, p_.error_dtype);
    launch_.error_row = p_.error_row, launch_.error_column = p_.error_column;
    launch_.error_dtype = p_.error_dtype;
    launch_.feedback_dtype = generated_ ? panel_dtype_ : p_.feedback_dtype;
    launch_.rows = rows, launch_.classes = p_.classes;
    launch_.chunk_rows = plan_.chunk_rows, launch_.chunks = ceil_div(rows, plan_.chunk_rows);
    if (plan_.copies_error) copy_error();
  }

  void copy_error() {
    const PadError copy{launch_.error, copied_error_, p_.error_row,         p_.error_column,
                        launch_.rows,  p_.classes,    plan_.padded_classes, p_.error_dtype};
    const int64_t blocks = min(ceil_div(copy.rows * copy.padded, 256), most_blocks);
    const auto kernel = p_.dtype == DType::bfloat16  ? pad_error<bfloat16>
                        : p_.dtype == DType::float16 ? pad_error<float16>
                                                     : pad_error<float>;
    check(launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(256), 0, stream_, copy));
    launch_.error = copied_error_;
    launch_.error_row = plan_.padded_classes, launch_.error_column = 1;
    launch_.error_dtype = p_.dtype;
  }

  // Layers [first, first + count) read one B: dense and whole, or generated panel by panel.
  void add_group(int64_t first, int64_t count) {
    int64_t columns = 0;
    for (int64_t l = first; l < first + count; ++l) columns = max(columns, p_.layers[l].columns);
    const ProjectGateLayer& reader = p_.layers[first];
    if (!generated_)
      return add_panel(first, count, 0, columns, reader.feedback, reader.feedback_row);
    for (int64_t column = 0; column < columns && ok();) {
      if (panel_used_ == plan_.panel_columns) flush();
      const int64_t wanted = round_up(columns - column, plan_.strip_columns);
      const int64_t taken = min(wanted, plan_.panel_columns - panel_used_);
      if (launch_.layer_count + count > launch_layers) flush();
      char* const panel =
          shifted(static_cast<void*>(panel_), panel_used_ * p_.classes, panel_dtype_);
      check(static_cast<cudaError_t>(fill_feedback({panel,
                                                    taken,
                                                    p_.classes,
                                                    taken,
                                                    panel_dtype_,
                                                    {p_.seed, reader.stream, p_.distribution},
                                                    column},
                                                   stream_)));
      add_panel(first, count, column, min(taken, columns - column), panel, taken);
      panel_used_ += taken;
      column += taken;
    }
  }

  // The columns [column, column + columns) of the layers that have them.
  void add_panel(int64_t first, int64_t count, int64_t column, int64_t columns,
                 const void* feedback, int64_t feedback_row) {
    if (launch_.layer_count + count > launch_layers) flush();
    if (columns == 0) return;
    Group& group = launch_.groups[launch_.group_count++];
    group = {feedback, feedback_row, columns, launch_.strips, launch_.layer_count, 0};
    launch_.strips += ceil_div(columns, plan_.strip_columns);
    for (int64_t l = first; l < first + count; ++l)
      if (p_.layers[l].columns > column) {
        launch_.layers[launch_.layer_count++] = layer(p_.layers[l], column, columns);
        ++group.layers;
      }
    launch_.group_layers = static_cast<int>(max(launch_.group_layers, group.layers));
  }

  Layer layer(const ProjectGateLayer& from, int64_t column, int64_t columns) const {
    const DType sums = p_.dtype == DType::float64 ? DType::float64 : DType::float32;
    const int64_t chunk = row_ / plan_.chunk_rows;
    Layer layer{};
    layer.saved = shifted(from.saved, row_ * from.saved_row + column, p_.dtype);
    layer.delta = shifted(from.delta, row_ * from.columns + column, p_.dtype);
    layer.partial = shifted(from.bias_partial, chunk * from.columns + column, sums);
    layer.saved_row = from.saved_row;
    layer.delta_row = layer.partial_row = from.columns;
    layer.columns = min(columns, from.columns - column);
    layer.scale = from.scale, layer.param = from.param, layer.kind = from.kind;
    const int64_t pack = 16 / bytes_of(p_.dtype);
    layer.whole =
        layer.columns % pack == 0 && aligned(layer.delta, layer.delta_row, p_.dtype) &&
        (from.kind == Activation::identity || aligned(layer.saved, layer.saved_row, p_.dtype));
    return layer;
  }

  // Launches what has been collected.
  void flush() {
    if (ok() && launch_.strips > 0) check(launch_collected());
    launch_.group_count = launch_.layer_count = launch_.group_layers = 0;
    launch_.strips = 0;
    panel_used_ = 0;
  }

  cudaError_t launch_collected() const {
    if (plan_.tensor_cores) {
      if (p_.dtype == DType::bfloat16)
        return launch_items<TensorCoreKernel<bfloat16>>(tensor_cores<bfloat16>, launch_, stream_);
      if (p_.dtype == DType::float16)
        return launch_items<TensorCoreKernel<float16>>(tensor_cores<float16>, launch_, stream_);
      return launch_items<TensorCoreKernel<float>>(tensor_cores<float>, launch_, stream_);
    }
    cudaError_t code = cudaSuccess;
    dispatch_dtype(p_.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      code = launch_few_classes<T>(launch_, stream_);
    });
    return code;
  }

  const ProjectGateParams& p_;
  const ProjectGatePlan& plan_;
  const Stream stream_;
  char *copied_error_, *panel_;
  DType panel_dtype_;
  bool generated_;
  int64_t row_ = 0, panel_used_ = 0;
  Launch launch_{};
  cudaError_t code_ = cudaSuccess;
};

}  // namespace

int project_gate(const ProjectGateParams& p, const ProjectGatePlan& plan, void* scratch,
                 Stream stream) {
  return Launcher(p, plan, scratch, stream).run();
}

const char* error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace fastdfa::cuda
