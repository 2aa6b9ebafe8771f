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
  int64_t begin, width;   // its columns of the packed logits
  int64_t missing;        // the number that stands for a missing label, where there is one
  bool missing_number;    // whether there is one
  double option;          // label smoothing, or Huber's delta
  const double* numbers;  // class weights or positive weights [width], or null
  double numbers_sum;     // of the class weights
  Labels labels;

  bool counts() const { return loss != Loss::kNone && labels.data != nullptr; }
};

// The number that stands for a missing label besides NaN: in integer labels, and in float labels of tasks that could
// never have this value.
constexpr int64_t kMissing = -100;

}  // namespace mtl
