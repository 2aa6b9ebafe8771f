// The backward of aggregate_linear for linear reductions, as in cpu/aggregate_linear_backward.cpp: along the edges
// turned around, run by run of rows of x,
//
//   z = A^T g [S, K]      dx = z W (+ g W_root)      dW = z^T x      dW_root = g^T x
//
// The root's part where x is the root too. The kernels are in gather.cuh and block_products.cuh.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "blocks.h"
#include "gather.h"

namespace mtl::cuda {
namespace {

const char* const kName = "aggregate_linear_backward";

struct Backward {
  const Tensor &grad, &x;
  DType type;
  GatherJob job;  // of grad
  Blocks blocks, roots;
  bool need_x, need_weight;
  Tensor dx, dw;
  cudaStream_t stream;

  bool with_root() const { return roots.count() > 0; }

  // Slices of the rows for dW: enough blocks for a device, each of at least 256 rows, by the shapes alone.
  int64_t slices(int64_t rows) const {
    int64_t tiles = 0;
    for (const Tensor& w : blocks.weights) tiles += ((w.size(0) + 127) / 128) * ((w.size(1) + 127) / 128);
    return std::max<int64_t>(1, std::min(256 / std::max<int64_t>(1, tiles), rows / 256));
  }

  template <class Engine>
  void run() {
    using T = typename Engine::Element;
    using Sum = typename Engine::Sum;
    using Wide = SumsEngine<Engine>;
    constexpr bool kSame = sizeof(T) == sizeof(Sum);
    const ScalarType wide = sums_dtype(type);
    const int64_t rows = x.size(0), d = x.size(1), columns = blocks.k(), dw_size = dw.size(0);
    T* const to = need_x ? static_cast<T*>(dx.mutable_data_ptr()) : nullptr;

    const bool own_roots = need_x && with_root() && !kSame;
    const int64_t step = rows_at_once(rows, static_cast<int64_t>(sizeof(Sum)) * (columns + (own_roots ? d : 0)));
    const Tensor z = empty_on(x, {step, columns}, wide);
    std::optional<Tensor> roots_sums, parts;
    if (own_roots) roots_sums = empty_on(x, {step, d}, wide);
    const int64_t cuts = library_multiplies<T, T, Sum, T>(blocks) ? 1 : slices(step);
    Sum* sums = nullptr;
    if (need_weight && dw_size > 0) {
      parts = empty_on(x, {cuts, dw_size}, wide);
      sums = static_cast<Sum*>(parts->mutable_data_ptr());
    }
    Gathering neighbours({job, type, type}, x);
    for (int64_t first = 0; first < rows; first += step) {
      const int64_t last = std::min(rows, first + step);
      GatherTarget target;
      target.wide = z.mutable_data_ptr();
      neighbours.rows(first, last, target);
      const Rows<Sum> own{static_cast<const Sum*>(target.wide), last - first, columns, 1};
      if (need_x) {
        T* const stored = to + first * d;
        Added<Sum> add;
        if (with_root()) {
          Sum* const into =
              own_roots ? static_cast<Sum*>(roots_sums->mutable_data_ptr()) : reinterpret_cast<Sum*>(stored);
          multiply_blocks<Engine, false, T>(roots, rows_of<T>(grad, first, last), {}, into, stream, kName);
          add = {into, d};
        }
        multiply_blocks<Wide, false, T>(blocks, own, add, stored, stream, kName);
      }
      if (sums)
        multiply_gradients<Wide, T>(blocks, own, rows_of<T>(x, first, last), sums, first > 0, cuts, dw_size, stream,
                                    kName);
    }
    if (!sums) return;
    if (with_root())
      multiply_gradients<Engine, T>(roots, rows_of<T>(grad, 0, rows), rows_of<T>(x, 0, rows), sums + dw_size / 2, false,
                                    cuts, dw_size, stream, kName);
    check_launch(sum_parts(sums, cuts, dw_size, static_cast<T*>(dw.mutable_data_ptr()), stream), kName);
  }
};

std::tuple<Tensor, Tensor> aggregate_linear_backward(
    const Tensor& grad, const Tensor& x, const Tensor& source_ptr, const Tensor& source_index,
    const std::optional<Tensor>& source_place, const std::optional<Tensor>& edge_weight,
    const std::optional<Tensor>& factors, const std::vector<Tensor>& weights, const std::vector<Tensor>& root_weights,
    bool need_x, bool need_weight) {
  const DType type = dtype_of(x, "x");
  check_device_matrix(x, "x", type, x);
  GatherJob job = job_of(grad, type, neighbours_of(source_ptr, source_index, source_place, grad.size(0), x),
                         Reduce::kSum, "grad", x);
  const Blocks blocks(weights, "weights", type, x), roots(root_weights, "root_weights", type, x);
  set_coefficients(job, edge_weight, factors, sums_dtype(type), x);
  const int64_t n = x.size(0), d = x.size(1);
  check_size(job.graph.rows, n, "source_ptr: rows");
  check_size(blocks.d(), d, "weights: columns");
  check_size(grad.size(1), blocks.k(), "grad: size of dimension 1");
  if (roots.count() > 0) {
    check_size(grad.size(0), n, "grad: size of dimension 0, where x is the root too");
    check_size(static_cast<int64_t>(roots.count()), static_cast<int64_t>(blocks.count()), "root_weights: number");
    for (size_t b = 0; b < blocks.count(); ++b) {
      check_size(roots.rows[b + 1], blocks.rows[b + 1], "root_weights: rows as of weights");
      check_size(roots.columns[b + 1], blocks.columns[b + 1], "root_weights: columns as of weights");
    }
  }
  int64_t dw_size = 0;
  for (const std::vector<Tensor>* each : {&weights, &root_weights})
    for (const Tensor& w : *each) dw_size += w.size(0) * w.size(1);
  const DeviceGuard guard(x);
  const bool nothing = n == 0 || blocks.k() == 0;
  const auto result = [&](const std::vector<int64_t>& sizes) {
    return nothing ? zeros_on(x, sizes, x.scalar_type()) : empty_on(x, sizes, x.scalar_type());
  };
  Tensor dx = result(need_x ? std::vector<int64_t>{n, d} : std::vector<int64_t>{0});
  Tensor dw = result({need_weight ? dw_size : 0});
  if (nothing) return {dx, dw};
  Backward backward{grad, x, type, job, blocks, roots, need_x, need_weight, dx, dw, stream_of(x)};
  with_engine(type, false, [&](auto engine) {
    using Engine = decltype(engine);
    if constexpr (!std::is_same_v<Engine, TensorTf32>) backward.template run<Engine>();
  });
  return {dx, dw};
}

}  // namespace
}  // namespace mtl::cuda

STABLE_TORCH_LIBRARY_IMPL(torch_mtl_pyg, MTL_CUDA_KEY, m) {
  m.impl("aggregate_linear_backward", TORCH_BOX(&mtl::cuda::aggregate_linear_backward));
}
