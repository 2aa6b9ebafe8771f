// A linear layer per group of rows, all groups below each other in one result, and its backward: checks, allocation,
// launches. The kernels are in grouped_gemm.cuh: one launch for many groups.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "engines.h"
#include "grouped_gemm.cuh"
#include "host.h"

namespace mtl::cuda {
namespace {

struct Groups {
  DType type;
  std::vector<int64_t> begin{0};  // first row of each group in the result, and the end
  int64_t columns;

  Groups(const std::vector<Tensor>& xs, const std::vector<Tensor>& weights) {
    STD_TORCH_CHECK(!xs.empty(), "xs: expected at least one group, got none");
    check_size(static_cast<int64_t>(weights.size()), static_cast<int64_t>(xs.size()), "weights: number of groups");
    type = dtype_of(xs[0], "xs");
    for (size_t t = 0; t < xs.size(); ++t) {
      check_device_matrix(xs[t], "xs", type, xs[0]);
      check_device_matrix(weights[t], "weights", type, xs[0]);
      check_size(weights[t].size(0), weights[0].size(0), "weights: size of dimension 0");
      check_size(weights[t].size(1), xs[t].size(1), "weights: size of dimension 1");
      begin.push_back(begin.back() + xs[t].size(0));
    }
    columns = weights[0].size(0);
  }
  int64_t count() const { return static_cast<int64_t>(begin.size()) - 1; }
  int64_t rows(size_t t) const { return begin[t + 1] - begin[t]; }
};

// Of the gradient of a weight.
int64_t tiles_of(int64_t m, int64_t n) { return (m + 127) / 128 * ((n + 127) / 128); }

Tensor grouped_linear(const std::vector<Tensor>& xs, const std::vector<Tensor>& weights,
                      const std::optional<Tensor>& bias) {
  const Groups groups(xs, weights);
  const int64_t columns = groups.columns;
  if (bias.has_value()) {
    check_device_matrix(*bias, "bias", groups.type, xs[0]);
    check_size(bias->size(0), groups.count(), "bias: size of dimension 0");
    check_size(bias->size(1), columns, "bias: size of dimension 1");
  }
  const DeviceGuard guard(xs[0]);
  const cudaStream_t stream = stream_of(xs[0]);
  Tensor out = empty_on(xs[0], {groups.begin.back(), columns}, xs[0].scalar_type());
  with_own_engine(groups.type, [&](auto engine) {
    using Engine = decltype(engine);
    using T = typename Engine::Element;
    std::vector<GroupedJob<T, typename Engine::Sum>> jobs;
    for (size_t t = 0; t < xs.size(); ++t) {
      const auto row = static_cast<int64_t>(t);
      const T* const own =
          bias.has_value() ? static_cast<const T*>(bias->const_data_ptr()) + row * bias->stride(0) : nullptr;
      T* const to = static_cast<T*>(out.mutable_data_ptr()) + groups.begin[t] * columns;
      jobs.push_back({view<T>(xs[t]), view<T>(weights[t]), own, own ? bias->stride(1) : 0, to, nullptr, groups.rows(t),
                      columns, xs[t].size(1), 1, 0});
    }
    check_launch(grouped_gemm<Engine, false, false>(jobs, stream), "grouped_linear");
  });
  return out;
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor> grouped_linear_backward(
    const Tensor& grad, const std::vector<Tensor>& xs, const std::vector<Tensor>& weights,
    const std::vector<bool>& need_xs, const std::vector<bool>& need_weights, bool need_bias) {
  const Groups groups(xs, weights);
  const int64_t count = groups.count(), columns = groups.columns;
  check_device_matrix(grad, "grad", groups.type, xs[0]);
  check_size(grad.size(0), groups.begin.back(), "grad: size of dimension 0");
  check_size(grad.size(1), columns, "grad: size of dimension 1");
  check_size(static_cast<int64_t>(need_xs.size()), count, "need_xs: number of groups");
  check_size(static_cast<int64_t>(need_weights.size()), count, "need_weights: number of groups");
  const DeviceGuard guard(xs[0]);
  const cudaStream_t stream = stream_of(xs[0]);
  const char* const name = "grouped_linear_backward";
  const ScalarType own = grad.scalar_type(),
                   wide = groups.type == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  using Sizes = std::vector<int64_t>;
  std::vector<Tensor> dxs, dws;
  // Slices of the rows of each group, for enough blocks in all, by the shapes alone.
  int64_t units = 0;
  for (size_t t = 0; t < xs.size(); ++t) units += groups.rows(t) * tiles_of(columns, xs[t].size(1));
  constexpr int64_t kBlocks = 512, kLeast = 256;
  const int64_t rows_of_slice = std::max(kLeast, units / kBlocks);
  std::vector<int> slices;
  int64_t part_count = 0, column_parts = 0;
  for (size_t t = 0; t < xs.size(); ++t) {
    const int64_t rows = groups.rows(t), inputs = xs[t].size(1);
    dxs.push_back(empty_on(grad, need_xs[t] ? Sizes{rows, inputs} : Sizes{0}, own));
    dws.push_back(empty_on(grad, need_weights[t] ? Sizes{columns, inputs} : Sizes{0}, own));
    slices.push_back(static_cast<int>(std::clamp<int64_t>(rows / rows_of_slice, 1, kBlocks)));
    if (need_weights[t] && slices[t] > 1) part_count += slices[t] * columns * inputs;
    if (need_bias) column_parts += slices[t] * columns;
  }
  Tensor db = empty_on(grad, need_bias ? Sizes{count, columns} : Sizes{0}, own);
  Tensor parts = empty_on(grad, {part_count + column_parts}, wide);
  with_own_engine(groups.type, [&](auto engine) {
    using Engine = decltype(engine);
    using T = typename Engine::Element;
    using Sum = typename Engine::Sum;
    const T* const from = static_cast<const T*>(grad.const_data_ptr());
    Sum* at = static_cast<Sum*>(parts.mutable_data_ptr());
    std::vector<GroupedJob<T, Sum>> back, outer;
    JobList<ColumnJob<T, Sum>> columns_of(grouped_columns_kernel<T, Sum>, 0, stream);
    std::vector<SumJob<T, Sum>> sums;
    for (size_t t = 0; t < xs.size(); ++t) {
      const int64_t rows = groups.rows(t), inputs = xs[t].size(1);
      const auto g = view_of<T>(from + groups.begin[t] * grad.stride(0), rows, columns, grad.stride(0), grad.stride(1));
      if (need_xs[t])
        back.push_back({g, view<T>(weights[t]), nullptr, 0, static_cast<T*>(dxs[t].mutable_data_ptr()), nullptr, rows,
                        inputs, columns, 1, 0});
      if (need_weights[t]) {
        T* const out = static_cast<T*>(dws[t].mutable_data_ptr());
        Sum* const own_parts = slices[t] > 1 ? at : nullptr;
        outer.push_back({g, view<T>(xs[t]), nullptr, 0, out, own_parts, columns, inputs, rows, slices[t], 0});
        if (own_parts) {
          sums.push_back({at, out, columns * inputs, slices[t], 0});
          at += slices[t] * columns * inputs;
        }
      }
      if (need_bias) {
        check_launch(columns_of.add({g, at, slices[t], 0}, (columns + 31) / 32 * slices[t]), name);
        sums.push_back(
            {at, static_cast<T*>(db.mutable_data_ptr()) + static_cast<int64_t>(t) * columns, columns, slices[t], 0});
        at += slices[t] * columns;
      }
    }
    check_launch(grouped_gemm<Engine, false, true>(back, stream), name);
    check_launch(grouped_gemm<Engine, true, true>(outer, stream), name);
    check_launch(columns_of.flush(), name);
    JobList<SumJob<T, Sum>> list(grouped_sum_kernel<T, Sum>, 0, stream);
    for (const SumJob<T, Sum>& job : sums) check_launch(list.add(job, (job.size + kThreads - 1) / kThreads), name);
    check_launch(list.flush(), name);
  });
  return {std::move(dxs), std::move(dws), std::move(db)};
}

}  // namespace
}  // namespace mtl::cuda

STABLE_TORCH_LIBRARY_IMPL(torch_mtl_pyg, MTL_CUDA_KEY, m) {
  m.impl("grouped_linear", TORCH_BOX(&mtl::cuda::grouped_linear));
  m.impl("grouped_linear_backward", TORCH_BOX(&mtl::cuda::grouped_linear_backward));
}
