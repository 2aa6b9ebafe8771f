// What a kernel needs to know of the tasks: their losses, options and labels. No torch.
#pragma once

#include <stdint.h>

namespace mtl {

// In the order of torch_mtl_pyg/task.py; kOutside: gradients at the logits that come from elsewhere, as labels.
enum class Loss : int {
  kNone = 0,
  kCrossEntropy = 1,
  kBce = 2,
  kMse = 3,
  kL1 = 4,
  kHuber = 5,
  kPoissonNll = 6,
  kGaussianNll = 7,
  kOutside = 8
};

enum class LabelType : int { kFloat32, kFloat64, kBFloat16, kFloat16, kInt64, kInt32, kInt16, kInt8, kUInt8, kBool };

// Label c of row r lies at data + (r * row_stride + c * col_stride) elements; null: the task has no labels.
struct Labels {
  const void* data;
  LabelType type;
  int64_t row_stride, col_stride, columns;
};

struct TaskSpec {
  Loss loss;
  int64_t begin, width;    // its columns of the packed logits
  int64_t missing;         // the class that stands for a missing label
  double option;           // label smoothing, or Huber's delta
  const double* numbers;   // class weights or positive weights [width], or null
  double numbers_sum;      // of the class weights
  Labels labels;

  bool counts() const { return loss != Loss::kNone && labels.data != nullptr; }
};

// What a label stands for besides NaN, in labels of integers; and in float labels that could never have this value.
constexpr int64_t kMissing = -100;
inline int64_t missing_of(const TaskSpec& task) { return task.loss == Loss::kCrossEntropy ? task.missing : kMissing; }
inline bool floats_have_missing(const TaskSpec& task) {
  return task.loss == Loss::kCrossEntropy || task.loss == Loss::kBce;
}

}  // namespace mtl
