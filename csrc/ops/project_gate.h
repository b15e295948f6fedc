// The arguments of project_gate, their checks and its results.
#pragma once

#include <optional>

#include "../project_gate.h"
#include "bias_sums.h"

namespace fastdfa {

// Whether b lies right behind a in one buffer, both contiguous matrices of one shape.
inline bool follows(const Tensor& a, const Tensor& b) {
  const int64_t bytes = a.numel() * static_cast<int64_t>(a.element_size());
  return a.size(0) == b.size(0) && a.size(1) == b.size(1) && a.is_contiguous() &&
         b.is_contiguous() && b.storage_offset() == a.storage_offset() + a.numel() &&
         b.data_ptr() == static_cast<char*>(a.data_ptr()) + bytes;
}

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
  } else if (call.type_of(name, b) != a.saved[0].scalar_type()) {
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
    call.activation_of(a.kinds[l], a.params[l]);
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
    for (Tensor& b : a.feedback) b = with_unit_columns(call, b);
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
    layer.kind = call.activation_of(a.kinds[l], a.params[l]);
    if (layer.kind != Activation::identity) a.saved[l] = with_unit_columns(call, a.saved[l]);
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

}  // namespace fastdfa
