// What every op shares, the same on each device: the call, which checks single arguments and makes
// results, and the words of the error texts. Each op's own checks are in the header of its name
// beside this one; nothing is written before every argument has been checked.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <string>
#include <vector>

#include "../activation.h"
#include "../philox.h"

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

  // Of n entries, in the dtype of the matrix that it belongs to, or in its accumulation type.
  void check_vector(const std::string& name, const Tensor& t, int64_t n, DType dtype) const {
    check_device(name, t);
    STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == n, op, ": ", name, " must have shape [", n,
                    "], got ", text(t));
    if (dtype_of(name, t) != dtype) check_dtype(name, t, accumulation_type(dtype));
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

  Activation activation_from_output(int64_t kind) const {
    const Activation activation = activation_of(kind);
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

// The kernels want neighbouring columns side by side. Only odd callers pay for a copy.
inline Tensor with_unit_columns(const Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

inline Tensor as_type(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

}  // namespace fastdfa
