// The ops on the CPU: checks, allocation, and the cutting of work into tasks for parallel_for.
// Nothing is written before every argument has been checked.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace fastdfa {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Elements that are worth a thread of their own: some 10 us.
constexpr int64_t grain_elements = 32768;

const CpuKernels& kernels() { return cpu_kernels(capability()); }

std::string text(const Tensor& t) {
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

std::string element(const char* name, size_t i) {
  return std::string(name) + "[" + std::to_string(i) + "]";
}

DType dtype_of(const char* op, const std::string& name, const Tensor& t) {
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

ScalarType accumulation_type(DType dtype) {
  return dtype == DType::float64 ? ScalarType::Double : ScalarType::Float;
}

void check_cpu(const char* op, const std::string& name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, " must be on the CPU");
}

void check_matrix(const char* op, const std::string& name, const Tensor& t) {
  check_cpu(op, name, t);
  STD_TORCH_CHECK(t.dim() == 2, op, ": ", name, " must have two dimensions, got shape ", text(t));
}

void check_dtype(const char* op, const std::string& name, const Tensor& t, ScalarType expected) {
  STD_TORCH_CHECK(t.scalar_type() == expected, op, ": ", name, " must have dtype ",
                  torch::headeronly::toString(expected), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
}

Activation activation_of(const char* op, int64_t kind) {
  STD_TORCH_CHECK(kind >= 0 && kind < activation_count, op, ": kind must be in 0 .. ",
                  activation_count - 1, ", got ", kind);
  return static_cast<Activation>(kind);
}

Distribution distribution_of(const char* op, int64_t distribution) {
  STD_TORCH_CHECK(distribution >= 0 && distribution < distribution_count, op,
                  ": distribution must be in 0 .. ", distribution_count - 1, ", got ",
                  distribution);
  return static_cast<Distribution>(distribution);
}

uint32_t stream_of(const char* op, int64_t stream) {
  STD_TORCH_CHECK(stream >= 0 && stream <= UINT32_MAX, op,
                  ": stream must be in 0 .. 2^32 - 1, got ", stream);
  return static_cast<uint32_t>(stream);
}

// A contiguous tensor, by the direct call: a fifth of the time of the dispatcher's.
Tensor empty(const std::vector<int64_t>& sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;)
    strides[i - 1] = strides[i] * (sizes[i] > 1 ? sizes[i] : 1);
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()),
                                                         sizes.data(), strides.data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// The kernels want neighbouring columns side by side. Only odd callers pay for a copy.
Tensor with_unit_columns(const Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

// Runs f(begin, end) over tasks that together handle `elements`.
template <class F> void for_tasks(int64_t tasks, int64_t elements, const F& f) {
  if (tasks == 0) return;
  const int64_t each = max(1, elements / tasks);
  torch::stable::parallel_for(0, tasks, max(1, grain_elements / each), f);
}

// Where the chunks of a bias gradient are summed: the result itself if there is one chunk only.
Tensor partial_sums(const Tensor& bias_grad, int64_t chunks) {
  if (chunks == 1) return bias_grad;
  return empty({chunks, bias_grad.size(0)}, bias_grad.scalar_type());
}

void finish_bias_grads(const std::vector<Tensor>& partials, const std::vector<Tensor>& bias_grads,
                       int64_t offset, int64_t chunks, DType dtype) {
  if (chunks == 1) return;
  int64_t elements = 0;
  for (const Tensor& t : partials) elements += t.numel();
  for_tasks(static_cast<int64_t>(partials.size()), elements, [&](int64_t begin, int64_t end) {
    for (int64_t l = begin; l < end; ++l) {
      const Tensor& sum = bias_grads[offset + l];
      kernels().sum_chunks({partials[l].data_ptr(), sum.data_ptr(), chunks, sum.size(0), dtype});
    }
  });
}

void fill_feedback_(Tensor out, int64_t seed, int64_t stream, int64_t distribution) {
  const char* op = "fill_feedback_";
  check_matrix(op, "out", out);
  FillFeedbackParams p{};
  p.dtype = dtype_of(op, "out", out);
  p.key = {static_cast<uint64_t>(seed), stream_of(op, stream), distribution_of(op, distribution)};
  p.classes = out.size(0), p.columns = out.size(1);
  STD_TORCH_CHECK(p.columns <= 1 || out.stride(1) == 1, op,
                  ": out must have unit stride along its columns, got stride ", out.stride(1));
  STD_TORCH_CHECK(p.classes <= 1 || p.columns == 0 || out.stride(0) >= p.columns, op,
                  ": the rows of out must not overlap, got row stride ", out.stride(0), " for ",
                  p.columns, " columns");
  p.out = out.data_ptr(), p.out_row = out.stride(0);
  for_tasks(fill_tasks(p), 4 * out.numel(),
            [&](int64_t begin, int64_t end) { kernels().fill_feedback(p, begin, end); });
}

void check_project_gate(const Tensor& error, const std::vector<Tensor>& feedback,
                        const std::vector<int64_t>& streams, const std::vector<Tensor>& saved,
                        const std::vector<int64_t>& kinds, const std::vector<double>& params,
                        const std::vector<double>& scales) {
  const char* op = "project_gate";
  const size_t layers = saved.size();
  check_matrix(op, "error", error);
  dtype_of(op, "error", error);
  const auto check_length = [&](const char* name, size_t length) {
    STD_TORCH_CHECK(length == layers, op, ": ", name, " must have one entry for each of the ",
                    layers, " layers, got ", length);
  };
  check_length("kinds", kinds.size());
  check_length("params", params.size());
  check_length("scales", scales.size());
  STD_TORCH_CHECK(feedback.size() <= 1 || feedback.size() == layers, op,
                  ": feedback must hold no matrix, one, or one for each of the ", layers,
                  " layers, got ", feedback.size());
  STD_TORCH_CHECK(!feedback.empty() || streams.size() == 1 || streams.size() == layers, op,
                  ": streams must hold one number, or one for each of the ", layers,
                  " layers, where feedback is generated, got ", streams.size());
  int64_t widest = 0;
  for (size_t l = 0; l < layers; ++l) {
    check_matrix(op, element("saved", l), saved[l]);
    dtype_of(op, element("saved", l), saved[l]);
    check_dtype(op, element("saved", l), saved[l], saved[0].scalar_type());
    STD_TORCH_CHECK(saved[l].size(0) == error.size(0), op, ": ", element("saved", l), " must have ",
                    error.size(0), " rows, as error has, got shape ", text(saved[l]));
    activation_of(op, kinds[l]);
    widest = max(widest, saved[l].size(1));
  }
  for (size_t l = 0; layers > 0 && l < feedback.size(); ++l) {
    const Tensor& b = feedback[l];
    check_matrix(op, element("feedback", l), b);
    check_dtype(op, element("feedback", l), b,
                accumulation_type(dtype_of(op, "saved[0]", saved[0])));
    const int64_t columns = feedback.size() == 1 ? widest : saved[l].size(1);
    STD_TORCH_CHECK(b.size(0) == error.size(1) && b.size(1) >= columns, op, ": ",
                    element("feedback", l), " must have shape [", error.size(1), ", >= ", columns,
                    "], got ", text(b));
  }
}

std::vector<Tensor> project_gate(Tensor error, std::vector<Tensor> feedback, int64_t seed,
                                 std::vector<int64_t> streams, int64_t distribution,
                                 std::vector<Tensor> saved, std::vector<int64_t> kinds,
                                 std::vector<double> params, std::vector<double> scales,
                                 bool sum_error) {
  const char* op = "project_gate";
  check_project_gate(error, feedback, streams, saved, kinds, params, scales);
  ProjectGateParams p{};
  p.distribution = distribution_of(op, distribution);
  for (int64_t& stream : streams) stream = stream_of(op, stream);
  if (saved.empty()) return {};

  const int64_t count = static_cast<int64_t>(saved.size());
  p.dtype = dtype_of(op, "saved[0]", saved[0]);
  const ScalarType accumulation = accumulation_type(p.dtype);
  if (error.scalar_type() != accumulation) error = torch::stable::to(error, accumulation);
  for (Tensor& b : feedback) b = with_unit_columns(b);
  p.error = error.data_ptr();
  p.rows = error.size(0), p.classes = error.size(1);
  p.error_row = error.stride(0), p.error_column = error.stride(1);
  p.layer_count = count;
  p.seed = static_cast<uint64_t>(seed);
  p.shared = (feedback.empty() ? streams.size() : feedback.size()) == 1;

  std::vector<ProjectGateLayer> layers(count);
  std::vector<Tensor> out(2 * count), partials(count);
  p.layers = layers.data();
  int64_t elements = 0;
  for (int64_t l = 0; l < count; ++l) {
    ProjectGateLayer& layer = layers[l];
    layer.kind = activation_of(op, kinds[l]);
    if (layer.kind != Activation::identity) saved[l] = with_unit_columns(saved[l]);
    layer.columns = saved[l].size(1);
    layer.saved = saved[l].data_ptr(), layer.saved_row = saved[l].stride(0);
    layer.param = params[l];
    layer.scale = scales[l] * (sum_error ? static_cast<double>(p.rows) : 1.0);
    if (feedback.empty()) {
      layer.stream = static_cast<uint32_t>(streams[p.shared ? 0 : l]);
    } else {
      const Tensor& b = feedback[p.shared ? 0 : l];
      layer.feedback = b.data_ptr(), layer.feedback_row = b.stride(0);
    }
    elements += p.rows * layer.columns;
  }
  const ProjectGatePlan plan = plan_project_gate(p);
  for (int64_t l = 0; l < count; ++l) {
    ProjectGateLayer& layer = layers[l];
    out[l] = empty({p.rows, layer.columns}, saved[l].scalar_type());
    out[count + l] = empty({layer.columns}, accumulation);
    partials[l] = partial_sums(out[count + l], plan.chunks);
    layer.delta = out[l].data_ptr(), layer.bias_partial = partials[l].data_ptr();
  }

  const int64_t scratch_elements = project_gate_scratch(plan);
  const Tensor scratch = empty(
      {static_cast<int64_t>(torch::stable::get_num_threads()), scratch_elements}, accumulation);
  char* const scratch_data = static_cast<char*>(scratch.data_ptr());
  const int64_t scratch_bytes = scratch_elements * static_cast<int64_t>(scratch.element_size());
  const int64_t work = elements + p.rows * p.classes * plan.strips * plan.block_columns / 16;
  for_tasks(plan.strips * plan.chunks, work, [&](int64_t begin, int64_t end) {
    uint32_t thread = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_thread_idx(&thread));
    kernels().project_gate(p, plan, begin, end, scratch_data + thread * scratch_bytes);
  });
  finish_bias_grads(partials, out, count, plan.chunks, p.dtype);
  return out;
}

std::tuple<Tensor, Tensor> gate(Tensor grad, Tensor saved, int64_t kind, double param) {
  const char* op = "gate";
  check_matrix(op, "grad", grad);
  check_matrix(op, "saved", saved);
  GateParams p{};
  p.dtype = dtype_of(op, "grad", grad);
  check_dtype(op, "saved", saved, grad.scalar_type());
  STD_TORCH_CHECK(grad.size(0) == saved.size(0) && grad.size(1) == saved.size(1), op,
                  ": saved must have the shape of grad, ", text(grad), ", got ", text(saved));
  p.kind = activation_of(op, kind);
  p.param = param;
  grad = with_unit_columns(grad);
  if (p.kind != Activation::identity) saved = with_unit_columns(saved);
  p.grad = grad.data_ptr(), p.grad_row = grad.stride(0);
  p.saved = saved.data_ptr(), p.saved_row = saved.stride(0);
  p.rows = grad.size(0), p.columns = grad.size(1);
  const Tensor delta = empty({p.rows, p.columns}, grad.scalar_type());
  const Tensor bias_grad = empty({p.columns}, accumulation_type(p.dtype));
  const Tensor partial = partial_sums(bias_grad, gate_chunks(p));
  p.delta = delta.data_ptr(), p.bias_partial = partial.data_ptr();
  for_tasks(gate_tasks(p), delta.numel(),
            [&](int64_t begin, int64_t end) { kernels().gate(p, begin, end); });
  finish_bias_grads({partial}, {bias_grad}, 0, gate_chunks(p), p.dtype);
  return {delta, bias_grad};
}

void activate_(Tensor x, std::optional<Tensor> bias, int64_t kind, double param) {
  const char* op = "activate_";
  check_cpu(op, "x", x);
  ActivateParams p{};
  p.dtype = p.bias_dtype = dtype_of(op, "x", x);
  STD_TORCH_CHECK(x.dim() >= 1, op, ": x must have at least one dimension, got shape ", text(x));
  STD_TORCH_CHECK(x.is_contiguous(), op, ": x must be contiguous, got shape ", text(x));
  p.kind = activation_of(op, kind);
  STD_TORCH_CHECK(derivative_from_output(p.kind), op,
                  ": kind must be one whose derivative is a function of the output (0 .. 6), got ",
                  kind);
  p.param = param;
  p.x = x.data_ptr();
  p.elements = x.numel(), p.columns = x.size(x.dim() - 1);
  if (bias) {
    check_cpu(op, "bias", *bias);
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == p.columns, op, ": bias must have shape [",
                    p.columns, "], got ", text(*bias));
    if (bias->scalar_type() != x.scalar_type())
      check_dtype(op, "bias", *bias, accumulation_type(p.dtype));
    p.bias_dtype = dtype_of(op, "bias", *bias);
    bias = torch::stable::contiguous(*bias);
    p.bias = bias->data_ptr();
  }
  torch::stable::parallel_for(0, p.elements, grain_elements, [&](int64_t begin, int64_t end) {
    kernels().activate(p, begin, end);
  });
}

}  // namespace
}  // namespace fastdfa

STABLE_TORCH_LIBRARY_IMPL(fastdfa, CPU, m) {
  m.impl("fill_feedback_", TORCH_BOX(&fastdfa::fill_feedback_));
  m.impl("project_gate", TORCH_BOX(&fastdfa::project_gate));
  m.impl("gate", TORCH_BOX(&fastdfa::gate));
  m.impl("activate_", TORCH_BOX(&fastdfa::activate_));
}
