// grouped_linear on the CPU: a linear layer per group of rows, all groups below each other in one result.
//
//   forward    y_t  [N_t, C] = x_t W_t^T + b_t
//   backward   dx_t [N_t, F_t] = g_t W_t    dW_t [C, F_t] = g_t^T x_t    db_t [C] = sum of the rows of g_t
//
// Groups that are a good part of the work are shared out inside, one after the other; the others are shared out as they
// are. Each group is the product of linear_host.h, whose values do not depend on who computes them, so every result is
// bitwise equal whatever the number of threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../common/checks.h"
#include "buffer.h"
#include "columns.h"
#include "host.h"
#include "isa.h"
#include "linear_host.h"

namespace mtl {
namespace {

// Work to begin a group with: scratch memory, short loops. In multiply-adds.
constexpr int64_t kGroupWork = 1 << 14;

struct Groups {
  DType type;
  std::vector<Matrix> x, weight;
  std::vector<int64_t> begin{0};  // first row of each group in the result, and the end
  int64_t columns;

  Groups(const std::vector<Tensor>& xs, const std::vector<Tensor>& weights) {
    STD_TORCH_CHECK(!xs.empty(), "xs: expected at least one group, got none");
    check_size(static_cast<int64_t>(weights.size()), static_cast<int64_t>(xs.size()), "weights: number of groups");
    type = dtype_of(xs[0], "xs");
    for (size_t t = 0; t < xs.size(); ++t) {
      check_cpu_matrix(xs[t], "xs", type);
      check_cpu_matrix(weights[t], "weights", type);
      check_size(weights[t].size(0), weights[0].size(0), "weights: size of dimension 0");
      check_size(weights[t].size(1), xs[t].size(1), "weights: size of dimension 1");
      x.push_back(matrix(xs[t]));
      weight.push_back(matrix(weights[t]));
      begin.push_back(begin.back() + x.back().rows);
    }
    columns = weights[0].size(0);
  }
  int64_t count() const { return static_cast<int64_t>(x.size()); }
  int64_t product(int64_t t) const { return x[t].rows * x[t].cols * columns; }
};

// f(t) for every group; `work` holds multiply-adds.
template <class F>
void for_each_group(const std::vector<int64_t>& work, const F& f) {
  const int64_t count = static_cast<int64_t>(work.size());
  const int64_t threads = std::max<int64_t>(1, static_cast<int64_t>(torch::stable::get_num_threads()));
  int64_t total = 0;
  for (const int64_t w : work) total += w;
  std::vector<int64_t> rest, ends;
  int64_t done = 0;
  for (int64_t t = 0; t < count; ++t) {
    // More than a quarter of a thread's share: as a whole, it would keep one thread busy when the others are through.
    if (threads > 1 && work[t] >= 4 * kThreadWork && work[t] > total / threads / 4) {
      f(t);
    } else {
      rest.push_back(t);
      ends.push_back(done += work[t]);
    }
  }
  const int64_t parts = std::clamp<int64_t>(done / kThreadWork, 1, threads);
  const auto border = [&](int64_t part) {
    return std::upper_bound(ends.begin(), ends.end(), done / parts * part + done % parts * part / parts) - ends.begin();
  };
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    const int64_t end = last == parts ? static_cast<int64_t>(rest.size()) : border(last);
    for (int64_t i = first == 0 ? 0 : border(first); i < end; ++i) f(rest[i]);
  });
}

Tensor grouped_linear(const std::vector<Tensor>& xs, const std::vector<Tensor>& weights,
                      const std::optional<Tensor>& bias) {
  const Groups groups(xs, weights);
  const DType type = groups.type;
  const Kernels& k = kernels();
  const int64_t count = groups.count(), columns = groups.columns, acc = accumulator_bytes(type);
  Buffer wide_bias;
  if (bias.has_value()) {
    check_cpu_matrix(*bias, "bias", type);
    check_size(bias->size(0), count, "bias: size of dimension 0");
    check_size(bias->size(1), columns, "bias: size of dimension 1");
    wide_bias = make_buffer(count * columns * acc);
    const Matrix b = matrix(*bias);
    for (int64_t t = 0; t < count; ++t)
      k.widen(type, b.part(type, t, t + 1, 0, columns).data, columns, b.col_stride,
              static_cast<char*>(wide_bias.get()) + t * columns * acc);
  }
  Tensor out = empty(xs[0], {groups.begin.back(), columns});
  char* const to = static_cast<char*>(out.mutable_data_ptr());
  std::vector<int64_t> work;
  for (int64_t t = 0; t < count; ++t)
    work.push_back(kGroupWork + groups.product(t) + 4 * groups.x[t].cols * columns + 4 * groups.x[t].rows * columns);
  for_each_group(work, [&](int64_t t) {
    const void* own_bias = bias.has_value() ? static_cast<const char*>(wide_bias.get()) + t * columns * acc : nullptr;
    multiply(k, type, Columns(type, {groups.x[t]}), transposed(groups.weight[t]), own_bias,
             to + groups.begin[t] * columns * element_bytes(type));
  });
  return out;
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor> grouped_linear_backward(
    const Tensor& grad, const std::vector<Tensor>& xs, const std::vector<Tensor>& weights,
    const std::vector<bool>& need_xs, const std::vector<bool>& need_weights, bool need_bias) {
  const Groups groups(xs, weights);
  const DType type = groups.type;
  const Kernels& k = kernels();
  const int64_t count = groups.count(), columns = groups.columns;
  check_cpu_matrix(grad, "grad", type);
  check_size(grad.size(0), groups.begin.back(), "grad: size of dimension 0");
  check_size(grad.size(1), columns, "grad: size of dimension 1");
  check_size(static_cast<int64_t>(need_xs.size()), count, "need_xs: number of groups");
  check_size(static_cast<int64_t>(need_weights.size()), count, "need_weights: number of groups");
  const Matrix g = matrix(grad);
  std::vector<Tensor> dxs, dws;
  std::vector<int64_t> work;
  for (int64_t t = 0; t < count; ++t) {
    const Matrix &x = groups.x[t], &w = groups.weight[t];
    dxs.push_back(need_xs[t] ? empty(grad, {x.rows, x.cols}) : empty(grad, {0}));
    dws.push_back(need_weights[t] ? empty(grad, {w.rows, w.cols}) : empty(grad, {0}));
    work.push_back(kGroupWork + groups.product(t) * (need_xs[t] + need_weights[t]) + 8 * x.cols * columns +
                   x.rows * (x.cols + columns));
  }
  Tensor db = need_bias ? empty(grad, {count, columns}) : empty(grad, {0});
  // Pointers first: threads share no handle.
  std::vector<void*> dx_to, dw_to;
  for (int64_t t = 0; t < count; ++t) {
    dx_to.push_back(need_xs[t] ? dxs[t].mutable_data_ptr() : nullptr);
    dw_to.push_back(need_weights[t] ? dws[t].mutable_data_ptr() : nullptr);
  }
  char* const db_to = need_bias ? static_cast<char*>(db.mutable_data_ptr()) : nullptr;
  for_each_group(work, [&](int64_t t) {
    const Columns own(type, {g.part(type, groups.begin[t], groups.begin[t + 1], 0, columns)});
    linear_backward(k, type, own, groups.x[t], groups.weight[t], dx_to[t], dw_to[t],
                    db_to ? db_to + t * columns * element_bytes(type) : nullptr);
  });
  return {std::move(dxs), std::move(dws), std::move(db)};
}

}  // namespace
}  // namespace mtl

STABLE_TORCH_LIBRARY_IMPL(torch_mtl_pyg, CPU, m) {
  m.impl("grouped_linear", TORCH_BOX(&mtl::grouped_linear));
  m.impl("grouped_linear_backward", TORCH_BOX(&mtl::grouped_linear_backward));
}
