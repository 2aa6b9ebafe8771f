// Turns label tensors into what the kernels read, and explains what is wrong with a label.
#pragma once

#include <cmath>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../common/checks.h"
#include "../common/losses.h"

namespace mtl {
namespace {

#include "labels.h"

inline LabelType label_type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return LabelType::kFloat32;
    case ScalarType::Double:
      return LabelType::kFloat64;
    case ScalarType::BFloat16:
      return LabelType::kBFloat16;
    case ScalarType::Half:
      return LabelType::kFloat16;
    case ScalarType::Long:
      return LabelType::kInt64;
    case ScalarType::Int:
      return LabelType::kInt32;
    case ScalarType::Short:
      return LabelType::kInt16;
    case ScalarType::Char:
      return LabelType::kInt8;
    case ScalarType::Byte:
      return LabelType::kUInt8;
    case ScalarType::Bool:
      return LabelType::kBool;
    default:
      STD_TORCH_CHECK(false, "targets: expected a floating-point, integer or bool dtype, got another");
  }
}

inline int64_t label_columns(const TaskSpec& task) {
  if (task.loss == Loss::kCrossEntropy) return 1;
  return task.loss == Loss::kGaussianNll ? task.width / 2 : task.width;
}

// The labels of task t in a tensor of its own: [N], [N, 1] or [N, columns].
inline Labels own_labels(const Tensor& y, const TaskSpec& task, size_t t, const Tensor& x) {
  const int64_t columns = label_columns(task), n = x.size(0);
  const bool fits =
      (y.dim() == 2 && y.size(0) == n && y.size(1) == columns) || (y.dim() == 1 && y.size(0) == n && columns == 1);
  STD_TORCH_CHECK(beside(y, x) && fits, "targets[", t, "]: expected a tensor [", n, ", ", columns,
                  "] on the device of x");
  return {y.const_data_ptr(), label_type_of(y), y.stride(0), y.dim() == 2 ? y.stride(1) : 0, columns};
}

// Whether a number stands for a missing label: never in bool, and in floats where it could be no label.
inline bool has_missing_number(Loss loss, LabelType type) {
  if (type == LabelType::kBool) return loss == Loss::kCrossEntropy;  // an ignore_index of 0 or 1
  const bool floating = type == LabelType::kFloat32 || type == LabelType::kFloat64 || type == LabelType::kBFloat16 ||
                        type == LabelType::kFloat16;
  return !floating || loss == Loss::kCrossEntropy || loss == Loss::kBce;
}

// A number as labels of this type hold it: rounded to the bits they have.
inline int64_t rounded_to(LabelType type, int64_t value) {
  const int bits = type == LabelType::kBFloat16 ? 8 : type == LabelType::kFloat16 ? 11 : 24;
  if (type != LabelType::kBFloat16 && type != LabelType::kFloat16 && type != LabelType::kFloat32) return value;
  int exponent = 0;
  const double fraction = std::frexp(static_cast<double>(value), &exponent);
  return static_cast<int64_t>(std::ldexp(std::nearbyint(std::ldexp(fraction, bits)), exponent - bits));
}

inline bool can_have(const TaskSpec& task, double v) {
  switch (task.loss) {
    case Loss::kNone:
      return false;
    case Loss::kCrossEntropy:
      return v >= 0 && v < static_cast<double>(task.width) && std::trunc(v) == v;
    case Loss::kBce:
      return v >= 0 && v <= 1;
    case Loss::kPoissonNll:
      return v >= 0 && std::isfinite(v);
    default:
      return std::isfinite(v);
  }
}

// Finds the label that the task cannot have, and says so.
[[noreturn]] inline void refuse_label(const TaskSpec& task, int64_t t, int64_t n) {
  for (int64_t c = 0; c < task.labels.columns; ++c)
    for (int64_t r = 0; r < n; ++r) {
      double v;
      with_label_type(task.labels, [&](auto* labels) {
        v = static_cast<double>(label_value(labels[r * task.labels.row_stride + c * task.labels.col_stride]));
      });
      if (v != v || (task.missing_number && v == static_cast<double>(task.missing)) || can_have(task, v)) continue;
      const std::string wanted = task.loss == Loss::kNone ? "no labels"
                                 : task.loss == Loss::kCrossEntropy
                                     ? "classes in [0, " + std::to_string(task.width) + ")"
                                 : task.loss == Loss::kBce        ? "labels in [0, 1]"
                                 : task.loss == Loss::kPoissonNll ? "finite counts of at least 0"
                                                                  : "finite numbers";
      std::ostringstream message;  // without the place in this source, which says nothing to a user
      message << "targets: expected " << wanted << " for task " << t << ", got " << v << " in row " << r;
      throw std::runtime_error(message.str());
    }
  STD_TORCH_CHECK(false, "targets: expected other labels for task ", t);
}

}  // namespace
}  // namespace mtl
