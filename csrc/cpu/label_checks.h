// Turns label tensors into what the kernels read, and checks every value before a kernel does.
#pragma once

#include <cmath>
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
inline Labels own_labels(const Tensor& y, const TaskSpec& task, size_t t, int64_t n) {
  const int64_t columns = label_columns(task);
  const bool fits = (y.dim() == 2 && y.size(0) == n && y.size(1) == columns) ||
                    (y.dim() == 1 && y.size(0) == n && columns == 1);
  STD_TORCH_CHECK(y.is_cpu() && fits, "targets[", t, "]: expected a CPU tensor [", n, ", ", columns, "]");
  return {y.const_data_ptr(), label_type_of(y), y.stride(0), y.dim() == 2 ? y.stride(1) : 0, columns};
}

// What a slice of rows holds of one task's labels.
struct LabelCount {
  int64_t count = 0;
  double norm = 0;  // cross-entropy: the sum of the class weights of the labels
};

[[noreturn]] inline void refuse(const TaskSpec& task, int64_t t, int64_t row, double value) {
  const bool classes = task.loss == Loss::kCrossEntropy;
  const std::string wanted = classes                          ? "classes in [0, " + std::to_string(task.width) + ")"
                             : task.loss == Loss::kBce        ? "labels in [0, 1]"
                             : task.loss == Loss::kPoissonNll ? "finite counts of at least 0"
                                                              : "finite numbers";
  STD_TORCH_CHECK(false, "targets: expected ", wanted, " for task ", t, ", got ", value, " in row ", row);
}

// A task without a loss has no labels.
template <class L>
inline void refuse_any(const TaskSpec& task, int64_t t, const L* labels, int64_t first, int64_t last) {
  for (int64_t r = first; r < last; ++r) {
    const auto v = label_value(labels[r * task.labels.row_stride]);
    const bool missing = v != v || (LabelTraits<L>::integer && !LabelTraits<L>::boolean && v == decltype(v)(kMissing));
    STD_TORCH_CHECK(missing, "targets: expected no labels for task ", t, ", which has no loss, got one in row ", r);
  }
}

template <class L>
inline void count_labels(const TaskSpec& task, int64_t t, const L* labels, int64_t first, int64_t last,
                         LabelCount& sum) {
  using V = decltype(label_value(L{}));
  const bool by_number = has_missing_number<L>(task);
  const V missing = static_cast<V>(missing_of(task));
  for (int64_t c = 0; c < task.labels.columns; ++c) {
    const L* column = labels + c * task.labels.col_stride;
    int64_t count = 0;
    double norm = 0;
    for (int64_t r = first; r < last; ++r) {
      const V v = label_value(column[r * task.labels.row_stride]);
      if (v != v || (by_number && v == missing)) continue;
      ++count;
      bool good;
      switch (task.loss) {
        case Loss::kCrossEntropy:
          good = v >= V(0) && v < static_cast<V>(task.width) && static_cast<V>(static_cast<int64_t>(v)) == v;
          if (good && task.numbers) norm += task.numbers[static_cast<int64_t>(v)];
          break;
        case Loss::kBce:
          good = v >= V(0) && v <= V(1);
          break;
        case Loss::kPoissonNll:
          good = v >= V(0) && std::isfinite(static_cast<double>(v));
          break;
        case Loss::kOutside:
          good = true;
          break;
        default:
          good = std::isfinite(static_cast<double>(v));
      }
      if (!good) refuse(task, t, r, static_cast<double>(v));
    }
    sum.count += count;
    sum.norm += task.loss == Loss::kCrossEntropy && task.numbers ? norm : static_cast<double>(count);
  }
}

}  // namespace
}  // namespace mtl
