// What every op shares, the same on each device: the call, which checks single arguments and makes
// results, and the words of the error texts. Each op's own checks are in the header of its name
// beside this one; nothing is written before every argument has been checked.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <exception>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "../activation.h"
#include "../philox.h"

namespace fastdfa {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string text(const int64_t* sizes, int64_t dimensions) {
  std::string s = "[";
  for (int64_t i = 0; i < dimensions; ++i) s += (i ? ", " : "") + std::to_string(sizes[i]);
  return s + "]";
}

inline std::string text(const Tensor& t) { return text(t.sizes().data(), t.dim()); }

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

// No operand has more elements, nor more along a dimension: products of two such numbers do not
// overflow. In memory these are 2 TiB at least; a view that repeats an element can have any size.
constexpr int64_t most_elements = int64_t{1} << 40;

// The elements of a shape, 0 where one dimension is; -1 where they are more than an operand's.
inline int64_t elements_of(const int64_t* sizes, int64_t dimensions) {
  int64_t elements = 1;
  for (int64_t d = 0; d < dimensions; ++d) {
    if (sizes[d] > most_elements || elements > most_elements / max(1, sizes[d])) return -1;
    elements *= sizes[d];
  }
  return elements;
}

// The memory of a tensor with elements, in bytes: rows of `width`, one every `row`, from `begin` to
// `end`.
struct Span {
  intptr_t begin, end;
  int64_t row, width;

  static Span of(const Tensor& t) {
    const int64_t bytes = static_cast<int64_t>(t.element_size());
    int64_t width = bytes;
    for (int64_t d = 1; d < t.dim(); ++d) width += bytes * (t.size(d) - 1) * t.stride(d);
    const int64_t row = t.dim() > 0 && t.size(0) > 1 ? bytes * t.stride(0) : 0;
    const intptr_t begin = reinterpret_cast<intptr_t>(t.data_ptr());
    return {begin, begin + width + (row ? row * (t.size(0) - 1) : 0), row, width};
  }

  // Whether they may share a byte. Rows that are as far apart may lie between each other.
  bool meets(const Span& other) const {
    if (end <= other.begin || other.end <= begin) return false;
    if (row == 0 || row != other.row) return true;
    const int64_t shift = ((other.begin - begin) % row + row) % row;
    return shift < width || shift + other.width > row;
  }
};

// One call of an op: its name, for the error texts, and the device that all its tensors must be on.
struct OpCall {
  const char* op;
  Device device;

  // Every operand of every op comes here first, and nothing of it has been read before. A view can
  // reach past its storage: where this was freed, as sharded parameters' is, or made smaller, or
  // where the view was made by a compiler that does not check.
  void check_operand(const std::string& name, const Tensor& t) const {
    int32_t layout;
    int64_t *sizes, *strides;
    const bool strided = aoti_torch_get_layout(t.get(), &layout) == TORCH_SUCCESS &&
                         layout == aoti_torch_layout_strided() &&
                         aoti_torch_get_sizes(t.get(), &sizes) == TORCH_SUCCESS &&
                         aoti_torch_get_strides(t.get(), &strides) == TORCH_SUCCESS;
    STD_TORCH_CHECK(strided, op, ": ", name,
                    " must be a dense tensor, got a sparse, nested or opaque one");
    const Device got = Device::of(t);
    STD_TORCH_CHECK(got == device, op, ": ", name, " must be on ", text(device), ", got ",
                    text(got));
    const int64_t dimensions = t.dim(), elements = elements_of(sizes, dimensions);
    STD_TORCH_CHECK(elements >= 0, op, ": ", name, " must have at most 2^40 elements, got shape ",
                    text(t));
    if (elements == 0) return;
    int64_t first = t.storage_offset(), end = first + 1, held;
    bool inside = first >= 0;
    for (int64_t d = 0; d < dimensions; ++d) {
      int64_t distance;
      inside = inside && !__builtin_mul_overflow(sizes[d] - 1, strides[d], &distance) &&
               !__builtin_add_overflow(end, distance, &end);
    }
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &held));
    held /= static_cast<int64_t>(t.element_size());
    STD_TORCH_CHECK(inside && end <= held, op, ": ", name,
                    " must lie within its storage, which holds ", held, " elements, got shape ",
                    text(t), " from element ", first, " on: was its memory freed?");
  }

  using Named = std::pair<const char*, const Tensor*>;  // null: not given

  // Where the op writes no element may be another one too, of this operand or of what is read.
  void check_written(std::initializer_list<Named> written,
                     std::initializer_list<Named> read) const {
    for (const Named* w = written.begin(); w != written.end(); ++w) {
      if (!w->second || w->second->numel() == 0) continue;
      const Tensor& t = *w->second;
      const Span span = Span::of(t);
      STD_TORCH_CHECK(t.size(0) == 1 || span.row >= span.width, op, ": the rows of ", w->first,
                      " must not overlap, got shape ", text(t), " with stride ", t.stride(0),
                      " between them");
      for (const Named* other = w + 1; other != written.end(); ++other)
        check_apart(w->first, span, *other);
      for (const Named& other : read) check_apart(w->first, span, other);
    }
  }

  void check_matrix(const std::string& name, const Tensor& t) const {
    check_operand(name, t);
    STD_TORCH_CHECK(t.dim() == 2, op, ": ", name, " must have two dimensions, got shape ", text(t));
  }

  ScalarType type_of(const std::string& name, const Tensor& t) const {
    try {
      return t.scalar_type();
    } catch (const std::exception&) {  // such as quantized: torch's stable ABI has no name for it
      STD_TORCH_CHECK(false, op, ": ", name,
                      " must be float32, float64, bfloat16 or float16, got an unknown dtype");
    }
  }

  void check_dtype(const std::string& name, const Tensor& t, ScalarType expected) const {
    const ScalarType got = type_of(name, t);
    STD_TORCH_CHECK(got == expected, op, ": ", name, " must have dtype ",
                    torch::headeronly::toString(expected), ", got ",
                    torch::headeronly::toString(got));
  }

  // Of n entries, in the dtype of the matrix that it belongs to, or in its accumulation type.
  void check_vector(const std::string& name, const Tensor& t, int64_t n, DType dtype) const {
    check_operand(name, t);
    STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == n, op, ": ", name, " must have shape [", n,
                    "], got ", text(t));
    if (dtype_of(name, t) != dtype) check_dtype(name, t, accumulation_type(dtype));
  }

  DType dtype_of(const std::string& name, const Tensor& t) const {
    const ScalarType type = type_of(name, t);
    switch (type) {
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
                        torch::headeronly::toString(type));
    }
  }

  Activation activation_of(int64_t kind, double param) const {
    STD_TORCH_CHECK(kind >= 0 && kind < activation_count, op, ": kind must be in 0 .. ",
                    activation_count - 1, ", got ", kind);
    const Activation activation = static_cast<Activation>(kind);
    STD_TORCH_CHECK(activation == Activation::identity || param >= 0, op,
                    ": param must not be negative, got ", param);
    return activation;
  }

  Activation activation_from_output(int64_t kind, double param) const {
    const Activation activation = activation_of(kind, param);
    STD_TORCH_CHECK(
        derivative_from_output(activation), op,
        ": kind must be one whose derivative is a function of the output (0 .. 6), got ", kind);
    return activation;
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
    const int64_t dimensions = static_cast<int64_t>(sizes.size());
    const bool fits = elements_of(sizes.data(), dimensions) >= 0;
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t i = sizes.size(); fits && i-- > 1;)
      strides[i - 1] = strides[i] * (sizes[i] > 1 ? sizes[i] : 1);
    const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
    AtenTensorHandle handle;
    STD_TORCH_CHECK(
        fits && aoti_torch_empty_strided(dimensions, sizes.data(), strides.data(), dtype,
                                         device.type, device.index, &handle) == TORCH_SUCCESS,
        op, ": no memory for a result of shape ", text(sizes.data(), dimensions));
    return Tensor(handle);
  }

  // A copy of an operand that the kernels cannot read as it lies.
  template <class F> Tensor copy(const Tensor& t, const F& make) const {
    try {
      return make();
    } catch (const std::exception&) {
      STD_TORCH_CHECK(false, op, ": no memory for a copy of an operand of shape ", text(t));
    }
  }

  Tensor contiguous(const Tensor& t) const {
    return copy(t, [&] { return torch::stable::contiguous(t); });
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

 private:
  void check_apart(const char* name, const Span& written, const Named& other) const {
    if (!other.second || other.second->numel() == 0) return;
    STD_TORCH_CHECK(!written.meets(Span::of(*other.second)), op, ": ", name,
                    " must share no memory with ", other.first, ", as it is written");
  }
};

// The kernels want neighbouring columns side by side. Only odd callers pay for a copy.
inline Tensor with_unit_columns(const OpCall& call, const Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : call.contiguous(t);
}

inline Tensor as_type(const OpCall& call, const Tensor& t, ScalarType type) {
  if (t.scalar_type() == type) return t;
  return call.copy(t, [&] { return torch::stable::to(t, type); });
}

}  // namespace fastdfa
