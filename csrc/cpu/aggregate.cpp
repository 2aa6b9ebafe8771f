// Aggregation of neighbours on the CPU, its gradients, and those of the edges' weights. Gathering is in gather.h.
//
//   aggregate                    out [R, D] = reduce over the edges (r, j) of c_rj x_j
//   aggregate_extreme_backward   dx [S, D] of max and min
//   edge_dots                    dw [E]: <a_r, x_j>
//
// Determinism: a row is one chain over its edges in their order, or for hubs a chain of such chains.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../common/checks.h"
#include "buffer.h"
#include "graph_host.h"
#include "host.h"
#include "isa.h"

namespace mtl {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kParts = 64;  // runs of rows, more than there are threads
constexpr int64_t kRows = 32;   // rows of a tile

ScalarType sums_dtype(DType type) { return type == DType::kFloat64 ? ScalarType::Double : ScalarType::Float; }

// f(first row, last row) -> whether all edges were in range, over all rows.
template <class F>
void each_part(const std::vector<int64_t>& borders, int64_t work, F f) {
  const int64_t parts = static_cast<int64_t>(borders.size()) - 1;
  std::vector<char> good(parts, 0);
  parallel_for(0, parts, grain(work / parts + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) good[i] = f(borders[i], borders[i + 1]);
  });
  check_good(good);
}

Tensor aggregate(const Tensor& x, const Tensor& ptr, const Tensor& index, const std::optional<Tensor>& place,
                 const std::optional<Tensor>& edge_weight, const std::optional<Tensor>& factors, int64_t reduce) {
  const DType type = dtype_of(x, "x");
  const Kernels& k = kernels();
  GatherJob job = job_of(x, type, neighbours_of(ptr, index, place, x.size(0)), reduce_of(reduce), "x");
  set_coefficients(job, edge_weight, factors, sums_dtype(type));
  Tensor out = empty(x, {job.graph.rows, job.columns});
  if (job.graph.rows == 0 || job.columns == 0) return out;
  const Gathering all(k, type, job);
  const int64_t columns = job.columns, acc = accumulator_bytes(type), bytes = columns * element_bytes(type);
  char* const to = static_cast<char*>(out.mutable_data_ptr());
  each_part(all.borders(kParts, 1), 4 * (job.graph.edges + job.graph.rows) * columns, [&](int64_t first, int64_t last) {
    if (acc == element_bytes(type)) return all.gather(k, type, first, last, false, to + first * bytes);
    const Buffer tile = make_buffer(kRows * columns * acc);
    for (int64_t r = first; r < last; r += kRows) {
      const int64_t rows = std::min(kRows, last - r);
      if (!all.gather(k, type, r, r + rows, false, tile.get())) return false;
      k.narrow(type, tile.get(), rows * columns, to + r * bytes);
    }
    return true;
  });
  return out;
}

Tensor aggregate_extreme_backward(const Tensor& grad, const Tensor& x, const Tensor& result, const Tensor& ptr,
                                  const Tensor& index, const Tensor& source_ptr, const Tensor& source_index) {
  const DType type = dtype_of(x, "x");
  const Kernels& k = kernels();
  const GatherJob down = job_of(x, type, neighbours_of(ptr, index, std::nullopt, x.size(0)), Reduce::kSum, "x");
  check_cpu_matrix(grad, "grad", type);
  const GatherJob up = job_of(result, type, neighbours_of(source_ptr, source_index, std::nullopt, result.size(0)),
                              Reduce::kSum, "result");
  for (const Tensor* t : {&grad, &result}) {
    check_size(t->size(0), down.graph.rows, "grad, result: size of dimension 0");
    check_size(t->size(1), down.columns, "grad, result: size of dimension 1");
  }
  check_size(up.graph.rows, x.size(0), "source_ptr: rows");
  check_size(up.graph.edges, down.graph.edges, "source_index: size");
  const int64_t columns = down.columns, acc = accumulator_bytes(type);
  Tensor dx = empty(x, {x.size(0), columns});
  if (x.size(0) == 0 || columns == 0) return dx;
  const Buffer shares = make_buffer(down.graph.rows * columns * acc);
  const int64_t work = 4 * down.graph.edges * columns;
  each_part(Gathering(k, type, down, false).borders(kParts, 2), work, [&](int64_t first, int64_t last) {
    return k.tie_shares(type, down, matrix(result), matrix(grad), first, last,
                        static_cast<char*>(shares.get()) + first * columns * acc, columns);
  });
  each_part(Gathering(k, type, up, false).borders(kParts, 1), work, [&](int64_t first, int64_t last) {
    return k.tie_sums(type, up, matrix(x), shares.get(), first, last, dx.mutable_data_ptr());
  });
  return dx;
}

Tensor edge_dots(const Tensor& a, const Tensor& x, const Tensor& ptr, const Tensor& index,
                 const std::optional<Tensor>& place, int64_t reduce) {
  const DType type = dtype_of(x, "x");
  const Kernels& k = kernels();
  const GatherJob job = job_of(x, type, neighbours_of(ptr, index, place, x.size(0)), reduce_of(reduce), "x");
  check_cpu_matrix(a, "a", type);
  STD_TORCH_CHECK(a.stride(1) == 1 || a.size(1) <= 1 || a.size(0) == 0, "a: expected contiguous columns");
  check_size(a.size(0), job.graph.rows, "a: size of dimension 0");
  check_size(a.size(1), job.columns, "a: size of dimension 1");
  Tensor out = empty(x, {job.graph.edges});
  if (job.graph.edges == 0) return out;
  std::vector<int64_t> borders;
  for (int64_t part = 0; part <= kParts; ++part) borders.push_back(job.graph.edges / kParts * part);
  borders.back() = job.graph.edges;
  each_part(borders, 4 * job.graph.edges * (job.columns + 8),
            [&](int64_t e0, int64_t e1) { return k.edge_dots(type, job, matrix(a), e0, e1, out.mutable_data_ptr()); });
  return out;
}

}  // namespace
}  // namespace mtl

STABLE_TORCH_LIBRARY_IMPL(torch_mtl_pyg, CPU, m) {
  m.impl("aggregate", TORCH_BOX(&mtl::aggregate));
  m.impl("aggregate_extreme_backward", TORCH_BOX(&mtl::aggregate_extreme_backward));
  m.impl("edge_dots", TORCH_BOX(&mtl::edge_dots));
}
