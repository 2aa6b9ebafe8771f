// Aggregation and projection to all tasks, as in cpu/aggregate_linear.cpp:
//
//   out [R, K] = (A x) W^T + root W_root^T + bias        with the coefficients of the edges as A
//
// Either way round: A x is gathered and multiplied run by run of rows, as many as let the sums stay in the second-level
// cache, or x W^T is gathered where its rows are shorter. The kernels are in gather.cuh and block_products.cuh.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "blocks.h"
#include "gather.h"

namespace mtl::cuda {
namespace {

const char* const kName = "aggregate_linear";

struct Forward {
  const Tensor& x;
  DType type;
  GatherJob job;  // of x
  Blocks blocks, roots;
  const std::optional<Tensor>& root;
  const std::optional<Tensor>& bias;
  bool project_first, keep;
  Tensor out, aggregated;
  cudaStream_t stream;

  template <class Engine>
  void run() {
    using T = typename Engine::Element;
    using Sum = typename Engine::Sum;
    constexpr bool kSame = sizeof(T) == sizeof(Sum);
    const ScalarType wide = sums_dtype(type);
    const int64_t rows = job.graph.rows, d = job.columns, columns = blocks.k();
    T* const to = static_cast<T*>(out.mutable_data_ptr());
    T* const kept = keep ? static_cast<T*>(aggregated.mutable_data_ptr()) : nullptr;

    std::optional<Tensor> wide_bias, projected, sums, roots_sums;
    Added<Sum> bias_sums;
    if (bias.has_value() && columns > 0) {
      wide_bias = empty_on(x, {columns}, wide);
      Sum* const own = static_cast<Sum*>(wide_bias->mutable_data_ptr());
      const dim3 grid(static_cast<unsigned>((columns + kThreads - 1) / kThreads));
      check_launch(launch(widen_kernel<T, Sum>, grid, dim3(kThreads), 0, stream,
                          static_cast<const T*>(bias->const_data_ptr()), bias->stride(0), columns, own),
                   kName);
      bias_sums.data = own;
    }
    GatherCall call{job, type, type};
    if (project_first) {
      projected = empty_on(x, {x.size(0), columns}, wide);
      multiply_blocks<Engine, true, T>(blocks, rows_of<T>(x, 0, x.size(0)), {},
                                       static_cast<Sum*>(projected->mutable_data_ptr()), stream, kName);
      call.job.x = projected->const_data_ptr();
      call.job.columns = call.job.row_stride = columns;
      call.in = type == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    }
    Gathering neighbours(call, x);

    // What exists for a run of rows alone.
    const bool own_sums = !project_first && !(kSame && keep), own_roots = root.has_value() && !kSame;
    const int64_t step =
        rows_at_once(rows, static_cast<int64_t>(sizeof(Sum)) * ((own_sums ? d : 0) + (own_roots ? columns : 0)));
    if (own_sums) sums = empty_on(x, {step, d}, wide);
    if (own_roots) roots_sums = empty_on(x, {step, columns}, wide);
    for (int64_t first = 0; first < rows; first += step) {
      const int64_t last = std::min(rows, first + step);
      T* const stored = to + first * columns;
      Added<Sum> add = bias_sums;
      if (root.has_value()) {
        Sum* const into =
            own_roots ? static_cast<Sum*>(roots_sums->mutable_data_ptr()) : reinterpret_cast<Sum*>(stored);
        multiply_blocks<Engine, true, T>(roots, rows_of<T>(*root, first, last), add, into, stream, kName);
        add = {into, columns};
      }
      GatherTarget target;
      if (project_first) {
        target.out = stored;
        target.add = add.data;
        target.add_row = add.row;
        neighbours.rows(first, last, target);
        continue;
      }
      if (keep) target.out = kept + first * d;
      if (own_sums) target.wide = sums->mutable_data_ptr();
      neighbours.rows(first, last, target);
      const Sum* const h = static_cast<const Sum*>(own_sums ? target.wide : target.out);
      multiply_blocks<SumsEngine<Engine>, true, T>(blocks, Rows<Sum>{h, last - first, d, 1}, add, stored, stream,
                                                   kName);
    }
  }
};

std::tuple<Tensor, Tensor> aggregate_linear(const Tensor& x, const Tensor& ptr, const Tensor& index,
                                            const std::optional<Tensor>& place,
                                            const std::optional<Tensor>& edge_weight,
                                            const std::vector<Tensor>& weights, const std::optional<Tensor>& root,
                                            const std::vector<Tensor>& root_weights, const std::optional<Tensor>& bias,
                                            int64_t reduce, bool project_first, bool keep) {
  const DType type = dtype_of(x, "x");
  GatherJob job = job_of(x, type, neighbours_of(ptr, index, place, x.size(0), x), reduce_of(reduce), "x", x);
  set_coefficients(job, edge_weight, std::nullopt, sums_dtype(type), x);
  const Blocks blocks(weights, "weights", type, x), roots(root_weights, "root_weights", type, x);
  const int64_t rows = job.graph.rows, columns = blocks.k(), d = job.columns;
  check_size(blocks.d(), d, "weights: columns");
  STD_TORCH_CHECK(root.has_value() == (roots.count() > 0), "root: expected it together with root_weights");
  STD_TORCH_CHECK(!project_first || (!keep && (job.reduce == Reduce::kSum || job.reduce == Reduce::kMean)),
                  "project_first: expected a linear reduction, and nothing to keep");
  if (root.has_value()) {
    check_device_matrix(*root, "root", type, x);
    check_size(root->size(0), rows, "root: size of dimension 0");
    check_size(roots.d(), root->size(1), "root_weights: columns");
    check_size(roots.k(), columns, "root_weights: rows");
  }
  if (bias.has_value()) {
    STD_TORCH_CHECK(on_device(*bias) && bias->dim() == 1 && dtype_of(*bias, "bias") == type, "bias: expected a ",
                    kEmulated ? "CPU" : "CUDA", " vector of the dtype of x");
    check_device(*bias, "bias", x);
    check_size(bias->size(0), columns, "bias: size of dimension 0");
  }
  const DeviceGuard guard(x);
  Tensor out = empty_on(x, {rows, columns}, x.scalar_type());
  Tensor aggregated = empty_on(x, keep ? std::vector<int64_t>{rows, d} : std::vector<int64_t>{0}, x.scalar_type());
  if (rows == 0 || (columns == 0 && !keep)) return {out, aggregated};
  Forward forward{x, type, job, blocks, roots, root, bias, project_first, keep, out, aggregated, stream_of(x)};
  with_engine(type, false, [&](auto engine) {
    using Engine = decltype(engine);
    if constexpr (!std::is_same_v<Engine, TensorTf32>) forward.template run<Engine>();
  });
  return {out, aggregated};
}

}  // namespace
}  // namespace mtl::cuda

STABLE_TORCH_LIBRARY_IMPL(torch_mtl_pyg, MTL_CUDA_KEY, m) {
  m.impl("aggregate_linear", TORCH_BOX(&mtl::cuda::aggregate_linear));
}
