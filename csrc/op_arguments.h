// The arguments of the ops, the same on every device: their checks, the params structs that the
// kernels take, and the results. Nothing is written before every argument has been checked.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <vector>

#include "activate.h"
#include "fill_feedback.h"
#include "gate.h"
#include "gemm.h"
#include "project_gate.h"

namespace fastdfa {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string text(const Tensor& t) {
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

inline std::string element(const char* name, size_t i) {
  return std::string(name) + "[" + std::to_string(i) + "]";
}

inline DType accumulation(DType dtype) {
  return dtype == DType::float64 ? DType::float64 : DType::float32;
}

inline ScalarType accumulation_type(DType dtype) {
  return dtype == DType::float64 ? ScalarType::Double : ScalarType::Float;
}

struct Device {
  int32_t type, index;

  static Device of(const Tensor& t) {
    int32_t type;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
    return {type, type == aoti_torch_device_type_cpu() ? 0 : t.get_device_index()};
  }
  bool operator==(const Device&) const = default;
};

inline std::string text(Device device) {
  if (device.type == aoti_torch_device_type_cpu()) return "the CPU";
  const bool cuda = device.type == aoti_torch_device_type_cuda();
  return (cuda ? "cuda:" : "device type " + std::to_string(device.type) + ":") +
         std::to_string(device.index);
}

// One call of an op: its name, for the error texts, and the device that all its tensors must be on.
struct OpCall {
  const char* op;
  Device device;

  void check_device(const std::string& name, const Tensor& t) const {
    const Device got = Device::of(t);
    STD_TORCH_CHECK(got == device, op, ": ", name, " must be on ", text(device), ", got ",
                    text(got));
  }

  void check_matrix(const std::string& name, const Tensor& t) const {
    check_device(name, t);
    STD_TORCH_CHECK(t.dim() == 2, op, ": ", name, " must have two dimensions, got shape ", text(t));
  }

  void check_dtype(const std::string& name, const Tensor& t, ScalarType expected) const {
    STD_TORCH_CHECK(t.scalar_type() == expected, op, ": ", name, " must have dtype ",
                    torch::headeronly::toString(expected), ", got ",
                    torch::headeronly::toString(t.scalar_type()));
  }

  DType dtype_of(const std::string& name, const Tensor& t) const {
    switch (t.scalar_type()) {
      case ScalarType::Float:
        return DType::float32;
      case ScalarType::Double:
        return DType::float64;
      case ScalarType::BFloat16:
        return DType::bfloat16;
      case ScalarType::Half:
        return DType::float16;
      default:
        STD_TORCH_CHECK(false, op, ": ", name,
                        " must be float32, float64, bfloat16 or float16, got dtype ",
                        torch::headeronly::toString(t.scalar_type()));
    }
  }

  Activation activation_of(int64_t kind) const {
    STD_TORCH_CHECK(kind >= 0 && kind < activation_count, op, ": kind must be in 0 .. ",
                    activation_count - 1, ", got ", kind);
    return static_cast<Activation>(kind);
  }

  Distribution distribution_of(int64_t distribution) const {
    STD_TORCH_CHECK(distribution >= 0 && distribution < distribution_count, op,
                    ": distribution must be in 0 .. ", distribution_count - 1, ", got ",
                    distribution);
    return static_cast<Distribution>(distribution);
  }

  uint32_t stream_of(int64_t stream) const {
    STD_TORCH_CHECK(stream >= 0 && stream <= UINT32_MAX, op,
                    ": stream must be in 0 .. 2^32 - 1, got ", stream);
    return static_cast<uint32_t>(stream);
  }

  // A contiguous tensor, by the direct call: a fifth of the time of the dispatcher's.
  Tensor empty(const std::vector<int64_t>& sizes, ScalarType type) const {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t i = sizes.size(); i-- > 1;)
      strides[i - 1] = strides[i] * (sizes[i] > 1 ? sizes[i] : 1);
    const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()),
                                                    sizes.data(), strides.data(), dtype,
                                                    device.type, device.index, &handle));
    return Tensor(handle);
  }

  // Contiguous matrices that lie one behind the other in one buffer.
  std::vector<Tensor> empty_run(int64_t count, int64_t rows, int64_t columns,
                                ScalarType type) const {
    const Tensor buffer = empty({count * rows, columns}, type);
    if (count == 1) return {buffer};
    const int64_t sizes[] = {rows, columns}, strides[] = {max(1, columns), 1};
    std::vector<Tensor> parts;
    for (int64_t i = 0; i < count; ++i) {
      AtenTensorHandle part;
      TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(buffer.get(), 2, sizes, strides,
                                                            i * rows * columns, &part));
      parts.push_back(Tensor(part));
    }
    return parts;
  }
};

// Whether b lies right behind a in one buffer, both contiguous matrices of one shape.
inline bool follows(const Tensor& a, const Tensor& b) {
  const int64_t bytes = a.numel() * static_cast<int64_t>(a.element_size());
  return a.size(0) == b.size(0) && a.size(1) == b.size(1) && a.is_contiguous() &&
         b.is_contiguous() && b.storage_offset() == a.storage_offset() + a.numel() &&
         b.data_ptr() == static_cast<char*>(a.data_ptr()) + bytes;
}

// The kernels want neighbouring columns side by side. Only odd callers pay for a copy.
inline Tensor with_unit_columns(const Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

inline Tensor as_type(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

// The bias gradients of a call, summed in a fixed order: within chunks of rows by the kernel, then
// over the chunks. Where there is one chunk only, its sum is the result.
struct BiasSums {
  std::vector<Tensor> grads;          // [n_l] each, accumulation type
  std::vector<SumChunksParams> sums;  // the second stage, one for each layer
  bool second_stage;
  Tensor partials;  // of all layers, each from a multiple of 256 bytes

  BiasSums(const OpCall& call, const std::vector<int64_t>& columns, int64_t chunks, DType dtype)
      : second_stage(chunks != 1) {
    const ScalarType type = accumulation_type(dtype);
    std::vector<int64_t> offsets;
    int64_t elements = 0;
    for (int64_t n : columns) {
      grads.push_back(call.empty({n}, type));
      offsets.push_back(elements);
      elements += round_up(chunks * n, 64);
    }
    if (second_stage) partials = call.empty({elements}, type);
    for (size_t l = 0; l < columns.size(); ++l) {
      void* const sum = grads[l].data_ptr();
      sums.push_back({second_stage ? at(partials, offsets[l]) : sum, sum, chunks, columns[l],
                      accumulation(dtype)});
    }
  }

  // Where the kernel puts the sums of layer l: [chunks, n_l].
  void* partial(size_t l) const { return const_cast<void*>(sums[l].partial); }

 private:
  static void* at(const Tensor& t, int64_t element) {
    return static_cast<char*>(t.data_ptr()) + element * static_cast<int64_t>(t.element_size());
  }
};

// fill_feedback_ ------------------------------------------------------------------------------

inline FillFeedbackParams fill_feedback_params(const OpCall& call, const Tensor& out, int64_t seed,
                                               int64_t stream, int64_t distribution) {
  call.check_matrix("out", out);
  FillFeedbackParams p{};
  p.dtype = call.dtype_of("out", out);
  p.key = {static_cast<uint64_t>(seed), call.stream_of(stream), call.distribution_of(distribution)};
  p.classes = out.size(0), p.columns = out.size(1);
  STD_TORCH_CHECK(p.columns <= 1 || out.stride(1) == 1, call.op,
                  ": out must have unit stride along its columns, got stride ", out.stride(1));
  STD_TORCH_CHECK(p.classes <= 1 || p.columns == 0 || out.stride(0) >= p.columns, call.op,
                  ": the rows of out must not overlap, got row stride ", out.stride(0), " for ",
                  p.columns, " columns");
  p.out = out.data_ptr(), p.out_row = out.stride(0);
  return p;
}

// project_gate --------------------------------------------------------------------------------

// As in the schema.
struct ProjectGateArguments {
  Tensor error;
  std::vector<Tensor> feedback;
  int64_t seed;
  std::vector<int64_t> streams;
  int64_t distribution;
  std::vector<Tensor> saved;
  std::vector<int64_t> kinds;
  std::vector<double> params, scales;
  bool sum_error, allow_tf32;

  bool shared() const { return (feedback.empty() ? streams.size() : feedback.size()) == 1; }
};

inline void check_lengths(const OpCall& call, const ProjectGateArguments& a) {
  const size_t layers = a.saved.size();
  const auto check_length = [&](const char* name, size_t length) {
    STD_TORCH_CHECK(length == layers, call.op, ": ", name, " must have one entry for each of the ",
                    layers, " layers, got ", length);
  };
  check_length("kinds", a.kinds.size());
  check_length("params", a.params.size());
  check_length("scales", a.scales.size());
  STD_TORCH_CHECK(a.feedback.size() <= 1 || a.feedback.size() == layers, call.op,
                  ": feedback must hold no matrix, one, or one for each of the ", layers,
                  " layers, got ", a.feedback.size());
  STD_TORCH_CHECK(!a.feedback.empty() || a.streams.size() == 1 || a.streams.size() == layers,
                  call.op, ": streams must hold one number, or one for each of the ", layers,
                  " layers, where feedback is generated, got ", a.streams.size());
}

inline void check_feedback(const OpCall& call, const ProjectGateArguments& a, size_t i,
                           int64_t columns) {
  const Tensor& b = a.feedback[i];
  const std::string name = element("feedback", i);
  call.check_matrix(name, b);
  if (i > 0) {
    call.check_dtype(name, b, a.feedback[0].scalar_type());
  } else if (b.scalar_type() != a.saved[0].scalar_type()) {
    call.check_dtype(name, b, accumulation_type(call.dtype_of("saved[0]", a.saved[0])));
  }
  STD_TORCH_CHECK(b.size(0) == a.error.size(1) && b.size(1) >= columns, call.op, ": ", name,
                  " must have shape [", a.error.size(1), ", >= ", columns, "], got ", text(b));
}

inline void check_project_gate(const OpCall& call, const ProjectGateArguments& a) {
  call.check_matrix("error", a.error);
  call.dtype_of("error", a.error);
  call.distribution_of(a.distribution);
  for (int64_t stream : a.streams) call.stream_of(stream);
  check_lengths(call, a);
  int64_t widest = 0;
  for (size_t l = 0; l < a.saved.size(); ++l) {
    const Tensor& saved = a.saved[l];
    const std::string name = element("saved", l);
    call.check_matrix(name, saved);
    call.dtype_of(name, saved);
    call.check_dtype(name, saved, a.saved[0].scalar_type());
    STD_TORCH_CHECK(saved.size(0) == a.error.size(0), call.op, ": ", name, " must have ",
                    a.error.size(0), " rows, as error has, got shape ", text(saved));
    STD_TORCH_CHECK(call.activation_of(a.kinds[l]) == Activation::identity || a.params[l] >= 0,
                    call.op, ": ", element("params", l), " must not be negative, got ",
                    a.params[l]);
    widest = max(widest, saved.size(1));
  }
  for (size_t i = 0; !a.saved.empty() && i < a.feedback.size(); ++i)
    check_feedback(call, a, i, a.feedback.size() == 1 ? widest : a.saved[i].size(1));
}

// What the kernels take, made of checked arguments; it keeps the tensors that it points into.
class ProjectGateWork {
 public:
  ProjectGateParams p{};

  ProjectGateWork(const OpCall& call, ProjectGateArguments arguments)
      : a(std::move(arguments)), layers(a.saved.size()) {
    p.dtype = call.dtype_of("saved[0]", a.saved[0]);
    p.error = a.error.data_ptr(), p.error_dtype = call.dtype_of("error", a.error);
    p.rows = a.error.size(0), p.classes = a.error.size(1);
    p.error_row = a.error.stride(0), p.error_column = a.error.stride(1);
    p.feedback_dtype = accumulation(p.dtype);
    if (!a.feedback.empty()) p.feedback_dtype = call.dtype_of("feedback[0]", a.feedback[0]);
    p.layers = layers.data(), p.layer_count = static_cast<int64_t>(layers.size());
    p.shared = a.shared(), p.allow_tf32 = a.allow_tf32;
    p.seed = static_cast<uint64_t>(a.seed), p.distribution = call.distribution_of(a.distribution);
    for (Tensor& b : a.feedback) b = with_unit_columns(b);
    for (size_t l = 0; l < layers.size(); ++l) set_layer(call, l);
  }
  ProjectGateWork(const ProjectGateWork&) = delete;

  int64_t elements() const {
    int64_t columns = 0;
    for (const ProjectGateLayer& layer : layers) columns += layer.columns;
    return p.rows * columns;
  }

  // Makes the results: the plan has cut the rows into so many chunks. Deltas lie as what was saved
  // does: one behind the other, where a chain made the outputs so, as one batched product makes the
  // weight gradients of such layers.
  void allocate(const OpCall& call, int64_t chunks) {
    std::vector<int64_t> columns;
    for (const ProjectGateLayer& layer : layers) columns.push_back(layer.columns);
    bias.emplace(call, columns, chunks, p.dtype);
    for (size_t first = 0, l = 1; l <= layers.size(); ++l) {
      if (l < layers.size() && follows(a.saved[l - 1], a.saved[l])) continue;
      const int64_t count = static_cast<int64_t>(l - first);
      for (Tensor& delta :
           call.empty_run(count, p.rows, columns[first], a.saved[first].scalar_type()))
        results.push_back(std::move(delta));
      first = l;
    }
    for (size_t l = 0; l < layers.size(); ++l)
      layers[l].delta = results[l].data_ptr(), layers[l].bias_partial = bias->partial(l);
    results.insert(results.end(), bias->grads.begin(), bias->grads.end());
  }

  std::vector<Tensor> results;  // the deltas, then the bias gradients
  std::optional<BiasSums> bias;

 private:
  void set_layer(const OpCall& call, size_t l) {
    ProjectGateLayer& layer = layers[l];
    layer.kind = call.activation_of(a.kinds[l]);
    if (layer.kind != Activation::identity) a.saved[l] = with_unit_columns(a.saved[l]);
    layer.columns = a.saved[l].size(1);
    layer.saved = a.saved[l].data_ptr(), layer.saved_row = a.saved[l].stride(0);
    layer.param = a.params[l];
    layer.scale = a.scales[l] * (a.sum_error ? static_cast<double>(p.rows) : 1.0);
    if (a.feedback.empty()) {
      layer.stream = call.stream_of(a.streams[p.shared ? 0 : l]);
    } else {
      const Tensor& b = a.feedback[p.shared ? 0 : l];
      layer.feedback = b.data_ptr(), layer.feedback_row = b.stride(0);
    }
  }

  ProjectGateArguments a;
  std::vector<ProjectGateLayer> layers;
};

// gate ----------------------------------------------------------------------------------------

inline void check_gate(const OpCall& call, const Tensor& grad, const Tensor& saved, int64_t kind) {
  call.check_matrix("grad", grad);
  call.check_matrix("saved", saved);
  call.dtype_of("grad", grad);
  call.check_dtype("saved", saved, grad.scalar_type());
  STD_TORCH_CHECK(grad.size(0) == saved.size(0) && grad.size(1) == saved.size(1), call.op,
                  ": saved must have the shape of grad, ", text(grad), ", got ", text(saved));
  call.activation_of(kind);
}

// As ProjectGateWork.
class GateWork {
 public:
  GateParams p{};

  GateWork(const OpCall& call, const Tensor& grad, const Tensor& saved, int64_t kind, double param)
      : grad(with_unit_columns(grad)), saved(saved) {
    p.dtype = call.dtype_of("grad", grad);
    p.kind = call.activation_of(kind), p.param = param;
    if (p.kind != Activation::identity) this->saved = with_unit_columns(saved);
    p.grad = this->grad.data_ptr(), p.grad_row = this->grad.stride(0);
    p.saved = this->saved.data_ptr(), p.saved_row = this->saved.stride(0);
    p.rows = grad.size(0), p.columns = grad.size(1);
  }

  void allocate(const OpCall& call, int64_t chunks) {
    delta = call.empty({p.rows, p.columns}, grad.scalar_type());
    bias.emplace(call, std::vector{p.columns}, chunks, p.dtype);
    p.delta = delta.data_ptr(), p.bias_partial = bias->partial(0);
  }

  Tensor delta;
  std::optional<BiasSums> bias;

 private:
  Tensor grad, saved;
};

// activate_ -----------------------------------------------------------------------------------

// `bias` becomes contiguous: it must outlive the params.
inline ActivateParams activate_params(const OpCall& call, const Tensor& x,
                                      std::optional<Tensor>& bias, int64_t kind, double param) {
  call.check_device("x", x);
  ActivateParams p{};
  p.dtype = p.bias_dtype = call.dtype_of("x", x);
  STD_TORCH_CHECK(x.dim() >= 1, call.op, ": x must have at least one dimension, got shape ",
                  text(x));
  STD_TORCH_CHECK(x.is_contiguous(), call.op, ": x must be contiguous, got shape ", text(x));
  p.kind = call.activation_of(kind);
  STD_TORCH_CHECK(derivative_from_output(p.kind), call.op,
                  ": kind must be one whose derivative is a function of the output (0 .. 6), got ",
                  kind);
  p.param = param;
  p.x = x.data_ptr();
  p.elements = x.numel(), p.columns = x.size(x.dim() - 1);
  if (!bias) return p;
  call.check_device("bias", *bias);
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == p.columns, call.op,
                  ": bias must have shape [", p.columns, "], got ", text(*bias));
  if (bias->scalar_type() != x.scalar_type())
    call.check_dtype("bias", *bias, accumulation_type(p.dtype));
  p.bias_dtype = call.dtype_of("bias", *bias);
  bias = torch::stable::contiguous(*bias);
  p.bias = bias->data_ptr();
  return p;
}

// linear_chain, weight_gradients ---------------------------------------------------------------

// A matrix as the products read it, one of its strides being 1.
inline Tensor with_a_unit_stride(const Tensor& t) {
  return t.stride(0) == 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

inline void check_gemm_operand(const OpCall& call, const std::string& name, const Tensor& t,
                               ScalarType type) {
  call.check_matrix(name, t);
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16,
      call.op, ": ", name, " must be float32, float64 or bfloat16, got dtype ",
      torch::headeronly::toString(type));
  call.check_dtype(name, t, type);
}

// Of weights, biases and gradients.
inline ScalarType wide_type(ScalarType type) {
  return type == ScalarType::BFloat16 ? ScalarType::Float : type;
}

inline void set_a(GemmProblem& g, const Tensor& a) {
  g.a = a.data_ptr(), g.rows = a.size(0), g.depth = a.size(1);
  g.a_row = a.stride(0), g.a_column = a.stride(1);
}

// Of the transposed matrix.
inline void set_a_transposed(GemmProblem& g, const Tensor& a) {
  g.a = a.data_ptr(), g.rows = a.size(1), g.depth = a.size(0);
  g.a_row = a.stride(1), g.a_column = a.stride(0);
}

// The products of a chain, one after the other; each reads the result of the one before.
class LinearChainWork {
 public:
  LinearChainWork(const OpCall& call, const Tensor& input, const std::vector<Tensor>& weights,
                  const std::vector<std::optional<Tensor>>& biases,
                  const std::vector<int64_t>& kinds, const std::vector<double>& params)
      : x(input), weights(weights), biases(biases) {
    check(call, input, kinds, params);
    x = with_a_unit_stride(x);
    for (size_t l = 0; l < weights.size(); ++l) {
      const Tensor w = this->weights[l] = with_a_unit_stride(weights[l]);
      GemmProblem g{};
      set_a(g, results.empty() ? x : results.back());
      g.b = w.data_ptr(), g.b_row = w.stride(1), g.b_column = w.stride(0);
      g.columns = w.size(0), g.c_row = w.size(0);
      results.push_back(call.empty({g.rows, g.columns}, input.scalar_type()));
      g.c = results.back().data_ptr();
      if (auto& bias = this->biases[l]) {
        bias = torch::stable::contiguous(*bias);
        g.bias = bias->data_ptr();
      }
      g.kind = call.activation_of(kinds[l]), g.param = params[l];
      problems.push_back(g);
    }
  }

  std::vector<GemmProblem> problems;
  std::vector<Tensor> results;

 private:
  void check(const OpCall& call, const Tensor& input, const std::vector<int64_t>& kinds,
             const std::vector<double>& params) const {
    const size_t layers = weights.size();
    STD_TORCH_CHECK(biases.size() == layers && kinds.size() == layers && params.size() == layers,
                    call.op, ": biases, kinds and params must have one entry for each of the ",
                    layers, " weights, got ", biases.size(), ", ", kinds.size(), " and ",
                    params.size());
    const ScalarType type = input.scalar_type();
    check_gemm_operand(call, "x", input, type);
    int64_t inputs = input.size(1);
    for (size_t l = 0; l < layers; ++l) {
      const std::string name = element("weights", l);
      check_gemm_operand(call, name, weights[l], wide_type(type));
      STD_TORCH_CHECK(weights[l].size(1) == inputs, call.op, ": ", name, " must have ", inputs,
                      " columns, as its input has, got shape ", text(weights[l]));
      inputs = weights[l].size(0);
      if (biases[l]) check_bias(call, element("biases", l), *biases[l], inputs, wide_type(type));
      STD_TORCH_CHECK(derivative_from_output(call.activation_of(kinds[l])), call.op,
                      ": kind must be one whose derivative is a function of the output (0 .. 6), "
                      "got ",
                      kinds[l]);
    }
  }

  static void check_bias(const OpCall& call, const std::string& name, const Tensor& bias,
                         int64_t columns, ScalarType type) {
    call.check_device(name, bias);
    STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == columns, call.op, ": ", name,
                    " must have shape [", columns, "], got ", text(bias));
    call.check_dtype(name, bias, type);
  }

  // What the problems point into.
  Tensor x;
  std::vector<Tensor> weights;
  std::vector<std::optional<Tensor>> biases;
};

// Independent products.
class WeightGradientsWork {
 public:
  WeightGradientsWork(const OpCall& call, std::vector<Tensor> deltas_, std::vector<Tensor> inputs_)
      : deltas(std::move(deltas_)), inputs(std::move(inputs_)) {
    check(call);
    for (size_t l = 0; l < deltas.size(); ++l) {
      const Tensor d = deltas[l] = with_a_unit_stride(deltas[l]);
      const Tensor x = inputs[l] = with_a_unit_stride(inputs[l]);
      GemmProblem g{};
      set_a_transposed(g, d);
      g.b = x.data_ptr(), g.b_row = x.stride(0), g.b_column = x.stride(1);
      g.columns = g.c_row = x.size(1);
      results.push_back(call.empty({g.rows, g.columns}, wide_type(d.scalar_type())));
      g.c = results.back().data_ptr();
      problems.push_back(g);
    }
  }

  std::vector<GemmProblem> problems;
  std::vector<Tensor> results;

 private:
  void check(const OpCall& call) const {
    STD_TORCH_CHECK(deltas.size() == inputs.size(), call.op,
                    ": inputs must have one entry for each of the ", deltas.size(), " deltas, got ",
                    inputs.size());
    for (size_t l = 0; l < deltas.size(); ++l) {
      const ScalarType type = deltas[0].scalar_type();
      check_gemm_operand(call, element("deltas", l), deltas[l], type);
      check_gemm_operand(call, element("inputs", l), inputs[l], type);
      STD_TORCH_CHECK(deltas[l].size(0) == inputs[l].size(0), call.op, ": ", element("inputs", l),
                      " must have ", deltas[l].size(0), " rows, as its delta has, got shape ",
                      text(inputs[l]));
    }
  }

  std::vector<Tensor> deltas, inputs;
};

}  // namespace fastdfa
