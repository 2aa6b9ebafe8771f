// The tasks of an op as the kernels read them: losses, options and labels, checked.
#pragma once

#include <vector>

#include "host.h"
#include "label_checks.h"

namespace mtl {
namespace {

struct Tasks {
  std::vector<TaskSpec> specs;
  int64_t n = 0, k = 0;
  Labels matrix{};  // its col_stride is 0 where every task has a tensor of its own

  // Every row has labels of every task.
  Tasks(const Tensor& integers, const Tensor& reals, const std::vector<Tensor>& targets, const Tensor& x, DType type)
      : n(x.size(0)) {
    int64_t outside = 0;
    read_specs(integers, &reals);
    for (const TaskSpec& task : specs) outside += task.loss == Loss::kOutside;
    const int64_t count = static_cast<int64_t>(specs.size());
    const int64_t given = static_cast<int64_t>(targets.size()) - outside;
    const bool one = given == 1 && count > 1;
    STD_TORCH_CHECK(given == count || one, "targets: expected 1 or ", count, " tensors, got ", given);
    if (one)
      read_matrix(targets[0], x);
    else
      read_each(targets, x);
    auto own = targets.begin() + given;
    for (TaskSpec& task : specs) {
      if (task.loss == Loss::kOutside) {
        STD_TORCH_CHECK(dtype_of(*own, "targets") == type, "targets: expected gradients of the dtype of x");
        task.labels = own_labels(*own++, task, &task - specs.data(), x);
      }
      find_missing(task);
    }
    check_classes(x);
  }
  // Each row has labels of one task: y is [N] or [N, W], of which a task reads the first columns. Whether there are
  // enough of them is to be checked for the tasks that occur.
  Tasks(const Tensor& integers, const Tensor& reals, const Tensor& y, const Tensor& x) : n(x.size(0)) {
    read_specs(integers, &reals);
    STD_TORCH_CHECK(beside(y, x) && (y.dim() == 1 || y.dim() == 2) && y.size(0) == n, "targets: expected a tensor [", n,
                    "] or [", n, ", W] on the device of x");
    for (TaskSpec& task : specs) {
      STD_TORCH_CHECK(task.loss != Loss::kOutside, "integers: expected no gradients from outside for routed rows");
      if (task.loss == Loss::kNone) continue;
      task.labels = {y.const_data_ptr(), label_type_of(y), y.stride(0), y.dim() == 2 ? y.stride(1) : 0,
                     label_columns(task)};
      find_missing(task);
    }
    check_classes(x);
  }
  // Widths alone.
  explicit Tasks(const Tensor& integers) { read_specs(integers, nullptr); }
  // The gradients of all outputs in the place of labels: one matrix, or one for each task.
  Tasks(const Tensor& integers, const std::vector<Tensor>& grads, bool routed, const Tensor& x, DType type)
      : n(x.size(0)) {
    read_specs(integers, nullptr);
    const bool one = grads.size() == 1;
    STD_TORCH_CHECK(one || (grads.size() == specs.size() && !routed), "grads: expected 1 or ", specs.size(),
                    " matrices, got ", grads.size());
    int64_t widest = 0;
    for (TaskSpec& task : specs) {
      const Tensor& grad = grads[one ? 0 : &task - specs.data()];
      STD_TORCH_CHECK(beside(grad, x) && grad.dim() == 2 && grad.size(0) == n && dtype_of(grad, "grads") == type,
                      "grads: expected matrices of ", n, " rows, and the dtype and device of x");
      const int64_t first = one && !routed ? task.begin : 0;
      check_size(grad.size(1) - first - task.width >= 0, true, "grads: whether they have the columns of all tasks");
      task.loss = Loss::kOutside;
      task.labels = {static_cast<const char*>(grad.const_data_ptr()) + first * grad.stride(1) * element_bytes(type),
                     label_type_of(grad), grad.stride(0), grad.stride(1), task.width};
      widest = std::max(widest, task.width);
    }
    if (one) check_size(grads[0].size(1), routed ? widest : k, "grads: size of dimension 1");
    if (!one)
      for (size_t t = 0; t < grads.size(); ++t)
        check_size(grads[t].size(1), specs[t].width, "grads: size of dimension 1");
  }

 private:
  void read_specs(const Tensor& integers, const Tensor* reals) {
    STD_TORCH_CHECK(integers.is_cpu() && integers.dim() == 2 && integers.size(1) == 4 && integers.is_contiguous() &&
                        integers.scalar_type() == ScalarType::Long,
                    "integers: expected a contiguous CPU tensor [T, 4] of int64");
    STD_TORCH_CHECK(!reals || (reals->is_cpu() && reals->dim() == 1 && reals->is_contiguous() &&
                               reals->size(0) >= integers.size(0) && reals->scalar_type() == ScalarType::Double),
                    "reals: expected a contiguous CPU vector of at least T float64");
    const int64_t* row = static_cast<const int64_t*>(integers.const_data_ptr());
    const double* numbers = reals ? static_cast<const double*>(reals->const_data_ptr()) : nullptr;
    const int64_t count = integers.size(0), places = reals ? reals->size(0) : 0;
    const int64_t widest = (int64_t(1) << 62) / std::max<int64_t>(1, count);  // so that their sum is a number
    specs.resize(count);
    for (int64_t t = 0; t < count; ++t, row += 4) {
      STD_TORCH_CHECK(row[0] >= 0 && row[0] <= static_cast<int64_t>(Loss::kOutside) && row[1] >= 1 &&
                          row[1] <= widest &&
                          (!reals || row[3] < 0 || (row[3] >= count && row[1] <= places && row[3] <= places - row[1])),
                      "integers: expected a kind, a width of at least 1, a label and a place in reals in row ", t);
      const Loss loss = reals ? static_cast<Loss>(row[0]) : Loss::kNone;
      STD_TORCH_CHECK(loss != Loss::kGaussianNll || row[1] % 2 == 0,
                      "integers: expected an even width of gaussian_nll, two outputs a label, in row ", t);
      const double* own = !reals || row[3] < 0 ? nullptr : numbers + row[3];
      const int64_t missing = loss == Loss::kCrossEntropy ? row[2] : kMissing;
      TaskSpec& task = specs[t];
      task = {loss, k, row[1], missing, false, reals ? numbers[t] : 0.0, own, 0.0, {}};
      if (own)
        for (int64_t c = 0; c < task.width; ++c) task.numbers_sum += own[c];
      k += task.width;
    }
  }
  // Kernels keep a class in the type of sums, and float32 cannot tell all of those beyond 2^24 apart.
  void check_classes(const Tensor& x) const {
    const bool wide = x.scalar_type() == ScalarType::Double;
    for (const TaskSpec& task : specs) {
      if (task.loss != Loss::kCrossEntropy) continue;
      const LabelType type = task.labels.type;
      const bool exact = wide || !task.labels.data ||
                         !(type == LabelType::kInt64 || type == LabelType::kInt32 || type == LabelType::kFloat64);
      const int64_t most = exact ? INT32_MAX : (int64_t(1) << 24) + 1;
      STD_TORCH_CHECK(task.width <= most, "targets: expected at most ", most, " classes",
                      exact ? "" : " of labels of this dtype for an embedding that is not float64", ", got ",
                      task.width, " for task ", &task - specs.data());
    }
  }
  static void find_missing(TaskSpec& task) {
    if (!task.labels.data) return;
    task.missing = rounded_to(task.labels.type, task.missing);
    task.missing_number = task.loss != Loss::kOutside && has_missing_number(task.loss, task.labels.type);
  }
  void read_matrix(const Tensor& y, const Tensor& x) {
    const int64_t count = static_cast<int64_t>(specs.size());
    STD_TORCH_CHECK(beside(y, x) && y.dim() == 2 && y.size(0) == n && y.size(1) == count,
                    "targets: expected a matrix [", n, ", ", count, "] on the device of x");
    const LabelType type = label_type_of(y);
    matrix = {y.const_data_ptr(), type, y.stride(0), y.stride(1), count};
    const int64_t bytes = type == LabelType::kFloat64 || type == LabelType::kInt64                            ? 8
                          : type == LabelType::kFloat32 || type == LabelType::kInt32                          ? 4
                          : type == LabelType::kInt8 || type == LabelType::kUInt8 || type == LabelType::kBool ? 1
                                                                                                              : 2;
    for (int64_t t = 0; t < count; ++t) {
      STD_TORCH_CHECK(specs[t].loss == Loss::kNone || specs[t].loss == Loss::kOutside || label_columns(specs[t]) == 1,
                      "targets: expected a tensor per task, since task ", t, " has several labels a row");
      specs[t].labels = {static_cast<const char*>(y.const_data_ptr()) + t * y.stride(1) * bytes, type, y.stride(0), 0,
                         1};
    }
  }
  void read_each(const std::vector<Tensor>& targets, const Tensor& x) {
    for (size_t t = 0; t < specs.size(); ++t) {
      const Tensor& y = targets[t];
      if (y.dim() == 3 || specs[t].loss == Loss::kOutside) continue;  // no labels
      STD_TORCH_CHECK(specs[t].loss != Loss::kNone, "targets: expected no labels for task ", t, ", which has no loss");
      specs[t].labels = own_labels(y, specs[t], t, x);
    }
  }
};

}  // namespace
}  // namespace mtl
