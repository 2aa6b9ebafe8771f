// A linear layer per group of rows, all groups below each other in one result, and its backward: checks, allocation,
// launches. The kernels are in gemm.cuh: a product for each group.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "engines.h"
#include "gemm.cuh"
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
  with_engine(groups.type, false, [&](auto engine) {
    using Engine = decltype(engine);
    using T = typename Engine::Element;
    T* const to = static_cast<T*>(out.mutable_data_ptr());
    for (size_t t = 0; t < xs.size(); ++t) {
      GemmJob<T, T> job{view<T>(xs[t]), view<T>(weights[t]), nullptr, 0, to + groups.begin[t] * columns, groups.rows(t),
                        columns,        xs[t].size(1)};
      if (bias.has_value()) {
        job.bias = static_cast<const T*>(bias->const_data_ptr()) + static_cast<int64_t>(t) * bias->stride(0);
        job.bias_stride = bias->stride(1);
      }
      check_launch(gemm<Engine, T, false, false>(job, 1, stream), "grouped_linear");
    }
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
  int64_t most = 0;  // numbers in the parts of a group
  for (size_t t = 0; t < xs.size(); ++t) {
    const int64_t rows = groups.rows(t), inputs = xs[t].size(1);
    dxs.push_back(empty_on(grad, need_xs[t] ? Sizes{rows, inputs} : Sizes{0}, own));
    dws.push_back(empty_on(grad, need_weights[t] ? Sizes{columns, inputs} : Sizes{0}, own));
    const int64_t sums = std::max(need_weights[t] ? columns * inputs : 0, need_bias ? columns : 0);
    most = std::max(most, row_slices(rows, columns, inputs) * sums);
  }
  Tensor db = empty_on(grad, need_bias ? Sizes{count, columns} : Sizes{0}, own);
  // Groups follow each other in the stream, and share the memory of their parts.
  Tensor parts = empty_on(grad, {most}, wide);
  with_engine(groups.type, false, [&](auto engine) {
    using Engine = decltype(engine);
    using T = typename Engine::Element;
    using Sum = typename Engine::Sum;
    const T* const from = static_cast<const T*>(grad.const_data_ptr());
    Sum* const sums = static_cast<Sum*>(parts.mutable_data_ptr());
    for (size_t t = 0; t < xs.size(); ++t) {
      const int64_t rows = groups.rows(t), inputs = xs[t].size(1), slices = row_slices(rows, columns, inputs);
      const auto g = view_of<T>(from + groups.begin[t] * grad.stride(0), rows, columns, grad.stride(0), grad.stride(1));
      if (need_xs[t])
        check_launch(gemm<Engine, T, false, true>({g, view<T>(weights[t]), nullptr, 0,
                                                   static_cast<T*>(dxs[t].mutable_data_ptr()), rows, inputs, columns},
                                                  1, stream),
                     name);
      if (need_weights[t] && columns * inputs > 0) {
        check_launch(
            gemm<Engine, Sum, true, true>({g, view<T>(xs[t]), nullptr, 0, sums, columns, inputs, rows}, slices, stream),
            name);
        check_launch(sum_parts(sums, slices, columns * inputs, static_cast<T*>(dws[t].mutable_data_ptr()), stream),
                     name);
      }
      if (need_bias && columns > 0) {
        T* const to = static_cast<T*>(db.mutable_data_ptr()) + static_cast<int64_t>(t) * columns;
        check_launch(column_sums(g, slices, sums, stream), name);
        check_launch(sum_parts(sums, slices, columns, to, stream), name);
      }
    }
  });
  return {std::move(dxs), std::move(dws), std::move(db)};
}

}  // namespace
}  // namespace mtl::cuda

STABLE_TORCH_LIBRARY_IMPL(torch_mtl_pyg, MTL_CUDA_KEY, m) {
  m.impl("grouped_linear", TORCH_BOX(&mtl::cuda::grouped_linear));
  m.impl("grouped_linear_backward", TORCH_BOX(&mtl::cuda::grouped_linear_backward));
}
