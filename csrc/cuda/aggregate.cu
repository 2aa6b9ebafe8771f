// Aggregation of neighbours, its gradients, and those of the edges' weights: checks, allocation, launches. As in
// cpu/aggregate.cpp. The kernels are in gather.cuh and edge_dots.cuh.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "edge_dots.cuh"
#include "engines.h"
#include "gather.h"

namespace mtl::cuda {
namespace {

Tensor aggregate(const Tensor& x, const Tensor& ptr, const Tensor& index, const std::optional<Tensor>& place,
                 const std::optional<Tensor>& edge_weight, const std::optional<Tensor>& factors, int64_t reduce) {
  const DType type = dtype_of(x, "x");
  GatherJob job = job_of(x, type, neighbours_of(ptr, index, place, x.size(0), x), reduce_of(reduce), "x", x);
  set_coefficients(job, edge_weight, factors, sums_dtype(type), x);
  const DeviceGuard guard(x);
  Tensor out = empty_on(x, {job.graph.rows, job.columns}, x.scalar_type());
  if (job.graph.rows == 0 || job.columns == 0) return out;
  GatherTarget target;
  target.out = out.mutable_data_ptr();
  Gathering({job, type, type}, x).rows(0, job.graph.rows, target);
  return out;
}

Tensor aggregate_extreme_backward(const Tensor& grad, const Tensor& x, const Tensor& result, const Tensor& ptr,
                                  const Tensor& index, const Tensor& source_ptr, const Tensor& source_index) {
  const DType type = dtype_of(x, "x");
  const GatherJob down = job_of(x, type, neighbours_of(ptr, index, std::nullopt, x.size(0), x), Reduce::kSum, "x", x);
  check_device_matrix(grad, "grad", type, x);
  const GatherJob up = job_of(result, type, neighbours_of(source_ptr, source_index, std::nullopt, result.size(0), x),
                              Reduce::kSum, "result", x);
  for (const Tensor* t : {&grad, &result}) {
    check_size(t->size(0), down.graph.rows, "grad, result: size of dimension 0");
    check_size(t->size(1), down.columns, "grad, result: size of dimension 1");
  }
  check_size(up.graph.rows, x.size(0), "source_ptr: rows");
  check_size(up.graph.edges, down.graph.edges, "source_index: size");
  const DeviceGuard guard(x);
  Tensor dx = empty_on(x, {x.size(0), down.columns}, x.scalar_type());
  if (x.size(0) == 0 || down.columns == 0) return dx;
  Tensor shares = empty_on(x, {down.graph.rows, down.columns}, sums_dtype(type));

  GatherCall count{down, type, type, Gathered::kCountTies, result.const_data_ptr(), result.stride(0)};
  count.grad = grad.const_data_ptr();
  count.grad_row = grad.stride(0);
  count.grad_col = grad.stride(1);
  GatherTarget to_shares, to_dx;
  to_shares.wide = shares.mutable_data_ptr();
  Gathering(count, x).rows(0, down.graph.rows, to_shares);

  GatherCall sum{up, type, type, Gathered::kSumTies, x.const_data_ptr(), x.stride(0)};
  sum.shares = shares.const_data_ptr();
  to_dx.out = dx.mutable_data_ptr();
  Gathering(sum, x).rows(0, up.graph.rows, to_dx);
  return dx;
}

Tensor edge_dots(const Tensor& a, const Tensor& x, const Tensor& ptr, const Tensor& index,
                 const std::optional<Tensor>& place, int64_t reduce) {
  const DType type = dtype_of(x, "x");
  const GatherJob job = job_of(x, type, neighbours_of(ptr, index, place, x.size(0), x), reduce_of(reduce), "x", x);
  check_columns(a, "a", type, x);
  check_size(a.size(0), job.graph.rows, "a: size of dimension 0");
  check_size(a.size(1), job.columns, "a: size of dimension 1");
  const DeviceGuard guard(x);
  Tensor out = empty_on(x, {job.graph.edges}, x.scalar_type());
  if (job.graph.edges == 0) return out;
  GraphCheck check;
  with_engine(type, false, [&](auto engine) {
    using In = typename decltype(engine)::Element;
    using Sum = typename decltype(engine)::Sum;
    const bool vectors = view<In>(a).aligned && view<In>(x).aligned;
    const DotsTask<In> task{job,
                            static_cast<const In*>(a.const_data_ptr()),
                            a.stride(0),
                            lanes_for(job.columns, vectors ? kPart<In, true> : kPart<In, false>),
                            static_cast<In*>(out.mutable_data_ptr()),
                            check.flags()};
    const dim3 grid(static_cast<unsigned>((job.graph.edges + kThreads - 1) / kThreads));
    check_launch(launch(vectors ? edge_dots_kernel<Sum, true, In> : edge_dots_kernel<Sum, false, In>, grid,
                        dim3(kThreads), 0, stream_of(x), task),
                 "edge_dots");
  });
  check.look(job.graph.edges);
  return out;
}

}  // namespace
}  // namespace mtl::cuda

STABLE_TORCH_LIBRARY_IMPL(torch_mtl_pyg, MTL_CUDA_KEY, m) {
  m.impl("aggregate", TORCH_BOX(&mtl::cuda::aggregate));
  m.impl("aggregate_extreme_backward", TORCH_BOX(&mtl::cuda::aggregate_extreme_backward));
  m.impl("edge_dots", TORCH_BOX(&mtl::cuda::edge_dots));
}
