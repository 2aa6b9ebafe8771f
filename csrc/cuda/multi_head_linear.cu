// All heads as one product, and its backward: checks, allocation, launches. The products are those of PyTorch's library
// but for few columns that are no whole pieces of 16 bytes, where the kernel of gemm.cuh is faster.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "columns.cuh"
#include "engines.h"
#include "gemm.cuh"
#include "host.h"
#include "library.h"

namespace mtl::cuda {
namespace {

Tensor multi_head_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const DType type = dtype_of(x, "x");
  check_device_matrix(x, "x", type, x);
  check_device_matrix(weight, "weight", type, x);
  check_size(weight.size(1), x.size(1), "weight: size of dimension 1");
  if (bias.has_value()) check_device_vector(*bias, "bias", type, x, weight.size(0));
  const DeviceGuard guard(x);
  const int64_t n = x.size(0), d = x.size(1), k = weight.size(0);
  Tensor y = empty_on(x, {n, k}, x.scalar_type());
  const bool few = element_bytes(type) == 2 && k <= 32 && k % 8 != 0;
  if (!few && n > 0 && k > 0 && d > 0) {
    const Tensor turned_weight = turned(weight);
    if (bias.has_value() ? library_product(x, turned_weight, *bias, y) : library_product(x, turned_weight, y)) return y;
  }
  check_launch(with_engine(type, tf32_allowed,
                           [&](auto engine) {
                             using Element = typename decltype(engine)::Element;
                             GemmJob<Element, Element> job{view<Element>(x),
                                                           view<Element>(weight),
                                                           nullptr,
                                                           0,
                                                           static_cast<Element*>(y.mutable_data_ptr()),
                                                           n,
                                                           k,
                                                           d};
                             if (bias.has_value()) {
                               job.bias = static_cast<const Element*>(bias->const_data_ptr());
                               job.bias_stride = bias->stride(0);
                             }
                             return gemm<decltype(engine), Element, false, false>(job, 1, stream_of(x));
                           }),
               "multi_head_linear");
  return y;
}

// The gradients of all heads as one matrix.
Tensor joined(const std::vector<Tensor>& grads, const Tensor& x, int64_t k, DType type) {
  int64_t columns = 0;
  for (const Tensor& grad : grads) {
    check_device_matrix(grad, "grads", type, x);
    check_size(grad.size(0), x.size(0), "grads: size of dimension 0");
    columns += grad.size(1);
  }
  check_size(columns, k, "grads: sum of the sizes of dimension 1");
  if (grads.size() == 1) return grads[0];
  Tensor all = empty_on(x, {x.size(0), k}, x.scalar_type());
  with_engine(type, false, [&](auto engine) {
    using T = typename decltype(engine)::Element;
    int64_t begin = 0;
    for (size_t g = 0; g < grads.size();) {
      Matrices<T> matrices{};
      unsigned count = 0;
      int64_t widest = 1;
      for (; g < grads.size() && count < kMatrices; ++g, ++count) {
        const Tensor& grad = grads[g];
        matrices.one[count] = {static_cast<const T*>(grad.const_data_ptr()), grad.stride(0), grad.stride(1), begin,
                               grad.size(1)};
        begin += grad.size(1);
        widest = std::max(widest, grad.size(1));
      }
      const int64_t blocks = std::clamp<int64_t>((x.size(0) * widest + kThreads - 1) / kThreads, 1, 4096);
      check_launch(launch(copy_columns_kernel<T>, dim3(static_cast<unsigned>(blocks), count), dim3(kThreads), 0,
                          stream_of(x), matrices, x.size(0), static_cast<T*>(all.mutable_data_ptr()), k),
                   "multi_head_linear_backward");
    }
  });
  return all;
}

std::tuple<Tensor, Tensor, Tensor> multi_head_linear_backward(const std::vector<Tensor>& grads, const Tensor& x,
                                                              const Tensor& weight, bool need_x, bool need_weight,
                                                              bool need_bias) {
  const DType type = dtype_of(x, "x");
  check_device_matrix(x, "x", type, x);
  check_device_matrix(weight, "weight", type, x);
  check_size(weight.size(1), x.size(1), "weight: size of dimension 1");
  const DeviceGuard guard(x);
  const int64_t n = x.size(0), d = x.size(1), k = weight.size(0);
  const Tensor grad = joined(grads, x, k, type);
  const cudaStream_t stream = stream_of(x);
  const char* const name = "multi_head_linear_backward";
  Tensor dx = empty_on(x, need_x ? std::vector<int64_t>{n, d} : std::vector<int64_t>{0}, x.scalar_type());
  Tensor dw = empty_on(x, need_weight ? std::vector<int64_t>{k, d} : std::vector<int64_t>{0}, x.scalar_type());
  Tensor db = empty_on(x, {need_bias ? k : 0}, x.scalar_type());
  const ScalarType wide = type == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  with_engine(type, tf32_allowed, [&](auto engine) {
    using Engine = decltype(engine);
    using T = typename Engine::Element;
    using Sum = typename Engine::Sum;
    const auto g = view<T>(grad);
    const bool some = n > 0 && k > 0 && d > 0;
    if (need_x && !(some && library_product(grad, weight, dx)))
      check_launch(gemm<Engine, T, false, true>(
                       {g, view<T>(weight), nullptr, 0, static_cast<T*>(dx.mutable_data_ptr()), n, d, k}, 1, stream),
                   name);
    const int64_t slices = row_slices(n, k, d);
    if (need_weight && k * d > 0 && !(some && library_product(turned(grad), x, dw))) {
      Tensor parts = empty_on(x, {slices, k * d}, wide);
      Sum* const sums = static_cast<Sum*>(parts.mutable_data_ptr());
      check_launch(gemm<Engine, Sum, true, true>({g, view<T>(x), nullptr, 0, sums, k, d, n}, slices, stream), name);
      check_launch(sum_parts(sums, slices, k * d, static_cast<T*>(dw.mutable_data_ptr()), stream), name);
    }
    if (need_bias && k > 0) {
      Tensor parts = empty_on(x, {slices, k}, wide);
      Sum* const sums = static_cast<Sum*>(parts.mutable_data_ptr());
      check_launch(column_sums(g, slices, sums, stream), name);
      check_launch(sum_parts(sums, slices, k, static_cast<T*>(db.mutable_data_ptr()), stream), name);
    }
  });
  return {dx, dw, db};
}

}  // namespace
}  // namespace mtl::cuda

STABLE_TORCH_LIBRARY_IMPL(torch_mtl_pyg, MTL_CUDA_KEY, m) {
  m.impl("multi_head_linear", TORCH_BOX(&mtl::cuda::multi_head_linear));
  m.impl("multi_head_linear_backward", TORCH_BOX(&mtl::cuda::multi_head_linear_backward));
}
