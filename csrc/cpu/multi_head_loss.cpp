// multi_head_loss on the CPU: checks, allocation, sharing out the rows. What happens in a tile of rows is in
// loss_tile.h.
//
//   losses [T], their weighted sum, counts [T], Gramian [T, T], dx [N, D], dW [K, D], db [K]
//
// Determinism: the rows are cut into slices that depend on the shape alone, and the parts of the slices are added in
// order, so every result is bitwise equal whatever the number of threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "../common/checks.h"
#include "buffer.h"
#include "host.h"
#include "isa.h"
#include "tasks.h"

namespace mtl {
namespace {

using torch::stable::parallel_for;

// ---- How the rows are shared out, from the shape alone.
struct Plan {
  // What one core's second-level cache keeps of a tile, in bytes; sizes of other blocks, in columns and rows.
  static constexpr int64_t kTileBytes = 352 << 10, kGroupColumns = 384, kMaxRows = 192, kMinRows = 32, kMaxSlices = 32;
  int64_t n, slices, tile_rows, widest_group = 0;
  std::vector<LossGroup> groups;

  Plan(const Tasks& tasks, int64_t d, DType type, bool need_weight, bool need_gramian) : n(tasks.n) {
    const int64_t k = tasks.k, wanted = (k + kGroupColumns - 1) / kGroupColumns,
                  size = (k + wanted - 1) / std::max<int64_t>(1, wanted);
    LossGroup group{0, 0, 0, 0, nullptr, nullptr, nullptr};
    for (const TaskSpec& task : tasks.specs) {
      if (group.end > group.begin && task.begin + task.width - group.begin > size) close(group);
      ++group.last_task;
      group.end = task.begin + task.width;
    }
    close(group);
    // A row of x, of its copy and of the logits; dx passes by.
    const int64_t row = accumulator_bytes(type) * (2 * d + (need_gramian ? 2 * k : widest_group));
    tile_rows = std::clamp<int64_t>(kTileBytes / row / 16 * 16, kMinRows, kMaxRows);
    // A slice costs sums of its own, written and read once: where they are large, 512 rows pay for them, and 1024 where
    // there are 16 slices already.
    const int64_t sums = (need_weight ? k * d : 0) + (need_gramian ? k * k : 0);
    const int64_t wished = sums > 65536 ? std::min(n / 512, std::max<int64_t>(16, n / 1024)) : n / 128;
    slices = std::clamp<int64_t>(wished, 1, kMaxSlices);
    slices = std::clamp<int64_t>((int64_t(1) << 24) / std::max<int64_t>(1, sums), 1, slices);
    if (slices > 1 && slices % 2) --slices;  // few threads get equal shares
    tile_rows = std::max<int64_t>(1, std::min(tile_rows, (n + slices - 1) / slices));
  }
  int64_t row(int64_t slice) const { return slice * (n / slices) + std::min(slice, n % slices); }

 private:
  void close(LossGroup& group) {
    groups.push_back(group);
    widest_group = std::max(widest_group, group.end - group.begin);
    group = {group.last_task, group.last_task, group.end, group.end, nullptr, nullptr, nullptr};
  }
};

// What the labels of a task come to: their number, and what the sum of the losses is divided by.
struct LabelCount {
  int64_t count = 0;
  double norm = 0;
};

// Checks all labels, and counts them: the norms must be known before the first gradient.
std::vector<LabelCount> count_all(const Kernels& k, const Tasks& tasks, const Plan& plan, const LossJob& job) {
  const int64_t count = static_cast<int64_t>(tasks.specs.size());
  std::vector<int64_t> counts(plan.slices * count, 0), wrong(plan.slices, -1);
  std::vector<double> norms(plan.slices * count, 0.0);
  parallel_for(0, plan.slices, grain(16 * count * tasks.n / plan.slices), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      wrong[i] = k.count_labels(job, count, plan.row(i), plan.row(i + 1), &counts[i * count], &norms[i * count]);
  });
  for (int64_t task : wrong)
    if (task >= 0) refuse_label(tasks.specs[task], task, tasks.n);
  std::vector<LabelCount> total(count);
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t i = 0; i < plan.slices; ++i) {
      total[t].count += counts[i * count + t];
      total[t].norm += norms[i * count + t];
    }
    const TaskSpec& task = tasks.specs[t];
    if (task.loss != Loss::kCrossEntropy || !task.numbers) total[t].norm = static_cast<double>(total[t].count);
  }
  return total;
}

// G[i, j] = sum over the blocks of S * (W W^T), from S on and above the diagonal.
template <class T>
void gramian_of(const Kernels& k, DType type, const std::vector<TaskSpec>& specs, const Matrix& weight, const T* s,
                T* out) {
  const int64_t tasks = static_cast<int64_t>(specs.size()), columns = weight.rows;
  const Buffer panels = pack(k, type, transposed(weight));
  parallel_for(0, tasks, grain(columns * columns * (weight.cols + 1) / tasks), [&](int64_t begin, int64_t end) {
    constexpr int64_t kRows = 64;
    const Buffer scratch = make_buffer(k.rows_scratch_bytes(type)), block = make_buffer(kRows * columns * sizeof(T));
    std::vector<double> row(tasks);
    for (int64_t i = begin; i < end; ++i) {
      std::fill(row.begin(), row.end(), 0.0);
      const int64_t first = specs[i].begin, last = first + specs[i].width;
      for (int64_t a0 = first; a0 < last; a0 += kRows) {
        const int64_t rows = std::min(kRows, last - a0);
        k.rows(type, weight.part(type, a0, a0 + rows, 0, weight.cols), panels.get(), columns, nullptr, false,
               block.get(), columns, scratch.get());
        for (int64_t a = a0; a < a0 + rows; ++a) {
          const T *p = static_cast<const T*>(block.get()) + (a - a0) * columns, *q = s + a * columns;
          for (int64_t j = i; j < tasks; ++j) {
            double sum = 0;
            const int64_t from = std::max(a, specs[j].begin);
            for (int64_t b = from; b < specs[j].begin + specs[j].width; ++b)
              sum += static_cast<double>(q[b]) * static_cast<double>(p[b]) * (j == i && b > a ? 2 : 1);
            row[j] += sum;
          }
        }
      }
      for (int64_t j = i; j < tasks; ++j) out[i * tasks + j] = out[j * tasks + i] = static_cast<T>(row[j]);
    }
  });
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Results multi_head_loss(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                        const std::vector<Tensor>& targets, const Tensor& integers, const Tensor& reals,
                        const Tensor& task_weight, bool need_x, bool need_weight, bool need_bias, bool need_gramian) {
  const DType type = dtype_of(x, "x");
  check_cpu_matrix(x, "x", type);
  check_cpu_matrix(weight, "weight", type);
  check_size(weight.size(1), x.size(1), "weight: size of dimension 1");
  const Kernels& k = kernels();
  const Matrix xm = matrix(x), w = matrix(weight);
  const int64_t n = xm.rows, d = xm.cols, columns = w.rows, acc = accumulator_bytes(type);
  const Tasks tasks(integers, reals, targets, x, type);
  const int64_t count = static_cast<int64_t>(tasks.specs.size());
  check_size(columns, tasks.k, "weight: size of dimension 0");
  STD_TORCH_CHECK(task_weight.is_cpu() && task_weight.dim() == 1 && task_weight.size(0) == count &&
                      task_weight.is_contiguous() && task_weight.scalar_type() == ScalarType::Double,
                  "task_weight: expected a contiguous CPU vector [", count, "] of float64");
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->is_cpu() && bias->dim() == 1 && dtype_of(*bias, "bias") == type,
                    "bias: expected a CPU vector of the dtype of x");
    check_size(bias->size(0), columns, "bias: size of dimension 0");
  }
  STD_TORCH_CHECK(!need_gramian || !(need_x || need_weight || need_bias),
                  "need_gramian: expected no gradients together with the Gramian");
  Plan plan(tasks, d, type, need_weight, need_gramian);
  std::vector<double> scale(count);
  const LossJob job{columns,
                    d,
                    plan.tile_rows,
                    plan.widest_group,
                    tasks.specs.data(),
                    scale.data(),
                    plan.groups.data(),
                    static_cast<int64_t>(plan.groups.size()),
                    tasks.matrix,
                    xm.col_stride == 1 || d == 1,
                    need_x,
                    need_weight,
                    need_bias,
                    need_gramian};
  const std::vector<LabelCount> counts = count_all(k, tasks, plan, job);

  const ScalarType wide = type == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  Tensor per_task = empty({count}, wide), total = empty({}, wide), number = empty({count}, ScalarType::Long);
  Tensor gram = need_gramian ? empty({count, count}, wide) : empty({0}, wide);
  Tensor dx = need_x ? empty(x, {n, d}) : empty(x, {0});
  Tensor dw = need_weight ? empty(x, {columns, d}) : empty(x, {0});
  Tensor db = need_bias ? empty(x, {columns}) : empty(x, {0});

  // Weights as panels, group by group.
  const double* v = static_cast<const double*>(task_weight.const_data_ptr());
  for (int64_t t = 0; t < count; ++t) {
    const bool outside = tasks.specs[t].loss == Loss::kOutside;
    scale[t] = outside ? 1.0 : counts[t].norm > 0 ? (need_gramian ? 1.0 : v[t]) / counts[t].norm : 0.0;
  }
  std::vector<Buffer> buffers;
  for (LossGroup& group : plan.groups) {
    const int64_t width = group.end - group.begin, padded = width + 64;
    const Matrix rows = w.part(type, group.begin, group.end, 0, d);
    buffers.push_back(pack(k, type, transposed(rows)));
    group.logit_panels = buffers.back().get();
    if (need_x) {
      buffers.push_back(pack(k, type, rows));
      group.weight_panels = buffers.back().get();
    }
    buffers.push_back(make_buffer(padded * acc));
    std::memset(buffers.back().get(), 0, padded * acc);
    group.bias = buffers.back().get();
    if (bias.has_value()) {
      const char* from = static_cast<const char*>(bias->const_data_ptr());
      k.widen(type, from + group.begin * bias->stride(0) * element_bytes(type), width, bias->stride(0),
              buffers.back().get());
    }
  }
  // The sums of a slice: dW, db, S.
  const int64_t of_weight = need_weight ? columns * d : 0, of_bias = need_bias ? columns : 0;
  const int64_t part = of_weight + of_bias + (need_gramian ? columns * columns : 0);
  const bool direct = plan.slices == 1 && element_bytes(type) == acc && !need_gramian;
  const Buffer parts = direct ? Buffer() : make_buffer(plan.slices * part * acc);
  std::vector<double> loss(plan.slices * count, 0.0);
  char* const dx_out = need_x ? static_cast<char*>(dx.mutable_data_ptr()) : nullptr;
  char* const dw_out = need_weight ? static_cast<char*>(dw.mutable_data_ptr()) : nullptr;
  char* const db_out = need_bias ? static_cast<char*>(db.mutable_data_ptr()) : nullptr;

  parallel_for(0, plan.slices, grain(n * columns * (d + 8) / plan.slices), [&](int64_t begin, int64_t end) {
    const Buffer scratch = make_buffer(k.loss_scratch_bytes(type, job));
    for (int64_t slice = begin; slice < end; ++slice) {
      char* const own = direct ? nullptr : static_cast<char*>(parts.get()) + slice * part * acc;
      LossSums sums{loss.data() + slice * count, direct ? dw_out : own, direct ? db_out : own + of_weight * acc,
                    direct ? nullptr : own + (of_weight + of_bias) * acc, true};
      // Tiles of nearly equal height, in whole vectors: a short one would pay for its products' sums all the same.
      const int64_t first = plan.row(slice), end_row = plan.row(slice + 1), rows = end_row - first;
      const int64_t tiles = std::max<int64_t>(1, (rows + plan.tile_rows - 1) / plan.tile_rows);
      const int64_t step = std::min(plan.tile_rows, ((rows + tiles - 1) / tiles + 15) / 16 * 16);
      if (rows == 0) {  // no tile will write the sums
        if (of_weight) std::memset(sums.weight, 0, of_weight * acc);
        if (need_gramian) std::memset(sums.gram, 0, columns * columns * acc);
      }
      if (of_bias) std::memset(sums.bias, 0, of_bias * acc);
      for (int64_t r = first; r < end_row; r += step, sums.fresh = false) {
        const int64_t last = std::min(r + step, end_row);
        k.loss_tile(type, job, xm.part(type, r, last, 0, d), r, std::min(step, end_row - last), sums,
                    dx_out ? dx_out + r * d * element_bytes(type) : nullptr, scratch.get());
      }
    }
  });

  if (!direct) {
    const char* from = static_cast<const char*>(parts.get());
    if (need_weight)
      parallel_for(0, of_weight, grain(4 * plan.slices),
                   [&](int64_t begin, int64_t end) { k.sum_parts(type, from, plan.slices, part, begin, end, dw_out); });
    if (need_bias) k.sum_parts(type, from + of_weight * acc, plan.slices, part, 0, of_bias, db_out);
  }
  with_accumulator(type, [&](auto zero) {
    using T = decltype(zero);
    T* out = static_cast<T*>(per_task.mutable_data_ptr());
    int64_t* numbers = static_cast<int64_t*>(number.mutable_data_ptr());
    double weighted = 0;
    for (int64_t t = 0; t < count; ++t) {
      double sum = 0;
      for (int64_t slice = 0; slice < plan.slices; ++slice) sum += loss[slice * count + t];
      const bool none = !(counts[t].norm > 0);
      const double mean = none ? 0.0 : sum / counts[t].norm;
      out[t] = static_cast<T>(mean);
      numbers[t] = counts[t].count;
      weighted += v[t] * mean;
    }
    *static_cast<T*>(total.mutable_data_ptr()) = static_cast<T>(weighted);
    if (need_gramian) {
      // S of the first slice takes the others' in order.
      T* s = static_cast<T*>(parts.get()) + of_weight + of_bias;
      const DType as = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;
      parallel_for(0, columns * columns, grain(4 * plan.slices),
                   [&](int64_t begin, int64_t end) { k.sum_parts(as, s, plan.slices, part, begin, end, s); });
      const Buffer copy = make_buffer(columns * d * acc);
      for (int64_t row = 0; row < columns; ++row) {
        const Matrix one = w.part(type, row, row + 1, 0, d);
        k.widen(type, one.data, d, one.col_stride, static_cast<T*>(copy.get()) + row * d);
      }
      gramian_of<T>(k, as, tasks.specs, {copy.get(), columns, d, d, 1}, s, static_cast<T*>(gram.mutable_data_ptr()));
    }
  });
  return {per_task, total, number, gram, dx, dw, db};
}

}  // namespace
}  // namespace mtl

STABLE_TORCH_LIBRARY_IMPL(torch_mtl_pyg, CPU, m) { m.impl("multi_head_loss", TORCH_BOX(&mtl::multi_head_loss)); }
