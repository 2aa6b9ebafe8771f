// Checks that keep every memory access in bounds, and the views the kernels take. The Python wrappers check first and
// raise precise exception types; these hold for direct calls of the ops.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "dtype.h"

namespace mtl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, float64, bfloat16 or float16, got another dtype");
  }
}

inline void check_cpu_matrix(const Tensor& t, const char* name, DType type) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
  STD_TORCH_CHECK(t.dim() == 2, name, ": expected a matrix, got ", t.dim(), " dimensions");
  STD_TORCH_CHECK(dtype_of(t, name) == type, name, ": expected the dtype of x, got another");
}

// Whether a tensor is on the device of another.
inline bool beside(const Tensor& t, const Tensor& other) {
  return t.get_device_index() == other.get_device_index() && t.is_cpu() == other.is_cpu();
}

inline void check_size(int64_t got, int64_t expected, const char* what) {
  STD_TORCH_CHECK(got == expected, what, ": expected ", expected, ", got ", got);
}

}  // namespace mtl
