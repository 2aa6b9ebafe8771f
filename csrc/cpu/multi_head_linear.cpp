// multi_head_linear on the CPU: checks, allocation, sharing out the work. The products are in products.h.
//
//   forward    y  [N, K] = x W^T + bias
//   backward   dx [N, D] = g W        dW [K, D] = g^T x        db [K] = sum of the rows of g
//
// Determinism: an element of y or dx is one chain over p, an element of dW a sum over fixed slices of the rows. The
// slices depend on the shape alone, so every result is bitwise equal whatever the number of threads.
#include <torch/csrc/stable/library.h>

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

Tensor multi_head_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const DType type = dtype_of(x, "x");
  check_cpu_matrix(x, "x", type);
  check_cpu_matrix(weight, "weight", type);
  check_size(weight.size(1), x.size(1), "weight: size of dimension 1");
  const Kernels& k = kernels();
  const int64_t heads = weight.size(0);
  Buffer wide_bias;
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->is_cpu() && bias->dim() == 1 && dtype_of(*bias, "bias") == type,
                    "bias: expected a CPU vector of the dtype of x");
    check_size(bias->size(0), heads, "bias: size of dimension 0");
    wide_bias = make_buffer(heads * accumulator_bytes(type));
    k.widen(type, bias->const_data_ptr(), heads, bias->stride(0), wide_bias.get());
  }
  Tensor out = empty(x, {x.size(0), heads});
  multiply(k, type, Columns(type, {matrix(x)}), transposed(matrix(weight)), wide_bias.get(), out.mutable_data_ptr());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> multi_head_linear_backward(const std::vector<Tensor>& grads, const Tensor& x,
                                                              const Tensor& weight, bool need_x, bool need_weight,
                                                              bool need_bias) {
  const DType type = dtype_of(x, "x");
  check_cpu_matrix(x, "x", type);
  check_cpu_matrix(weight, "weight", type);
  check_size(weight.size(1), x.size(1), "weight: size of dimension 1");
  std::vector<Matrix> parts;
  for (const Tensor& grad : grads) {
    check_cpu_matrix(grad, "grads", type);
    check_size(grad.size(0), x.size(0), "grads: size of dimension 0");
    parts.push_back(matrix(grad));
  }
  const Columns g(type, std::move(parts));
  check_size(g.cols(), weight.size(0), "grads: sum of the sizes of dimension 1");
  const Kernels& k = kernels();
  const Matrix xm = matrix(x), w = matrix(weight);
  Tensor dx = need_x ? empty(x, {xm.rows, xm.cols}) : empty(x, {0});
  Tensor dw = need_weight ? empty(x, {w.rows, w.cols}) : empty(x, {0});
  Tensor db = need_bias ? empty(x, {w.rows}) : empty(x, {0});

  linear_backward(k, type, g, xm, w, need_x ? dx.mutable_data_ptr() : nullptr,
                  need_weight ? dw.mutable_data_ptr() : nullptr, need_bias ? db.mutable_data_ptr() : nullptr);
  return {dx, dw, db};
}

}  // namespace
}  // namespace mtl

STABLE_TORCH_LIBRARY_IMPL(torch_mtl_pyg, CPU, m) {
  m.impl("multi_head_linear", TORCH_BOX(&mtl::multi_head_linear));
  m.impl("multi_head_linear_backward", TORCH_BOX(&mtl::multi_head_linear_backward));
}
