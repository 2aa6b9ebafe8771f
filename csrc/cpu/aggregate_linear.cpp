// Aggregation and projection to all tasks in one pass over tiles of rows, on the CPU:
//
//   out [R, K] = (A x) W^T + root W_root^T + bias        with the coefficients of the edges as A
//
// Either way round: A x of a tile is projected while it is in the cache, or x W^T is aggregated where its rows are
// shorter. Blocks: task by task with columns of x of their own, or one block for all tasks. Sums and products are
// float32, for float64 float64. Determinism: a row of the result is its own work, as in aggregate.cpp.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/checks.h"
#include "blocks.h"
#include "buffer.h"
#include "graph_host.h"
#include "host.h"
#include "isa.h"

namespace mtl {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kMaxParts = 64;  // runs of rows, more than there are threads
constexpr int64_t kTileBytes = 256 << 10;

// What the tiles are made of and go to.
struct Forward {
  const Kernels& k;
  DType type;
  Sums sums;
  Blocks blocks, roots;
  const Gathering* neighbours = nullptr;  // of x, or of x W^T
  bool project_first, keep;
  std::vector<Buffer> panels, root_panels;
  std::optional<Matrix> root;
  Buffer bias;  // sums, or null
  char *out = nullptr, *aggregated = nullptr;

  Forward(const Kernels& kernels, DType dtype, const std::vector<Tensor>& weights,
          const std::vector<Tensor>& root_weights, bool project, bool keeps)
      : k(kernels),
        type(dtype),
        sums(dtype),
        blocks(k, sums, weights, "weights"),
        roots(k, sums, root_weights, "root_weights"),
        project_first(project),
        keep(keeps),
        panels(blocks.panels(k, sums, true)),
        root_panels(roots.panels(k, sums, true)) {}

  int64_t columns() const { return blocks.k(); }
  int64_t d() const { return blocks.d(); }

  // x W^T [S, K], as sums.
  Buffer project(const Matrix& x) const {
    Buffer projected = make_buffer(x.rows * columns() * sums.bytes);
    parallel_for(0, x.rows, grain(columns() * std::max<int64_t>(1, d())), [&](int64_t begin, int64_t end) {
      const Buffer scratch = make_buffer(k.rows_scratch_bytes(sums.type)),
                   wide = make_buffer(sums.scratch(k.outer_rows, d()));
      for (int64_t r = begin; r < end; r += k.outer_rows) {
        const Matrix tile = sums.of(k, x.part(type, r, std::min(end, r + k.outer_rows), 0, d()), wide.get());
        multiply(blocks, panels, tile, nullptr, false, static_cast<char*>(projected.get()) + r * columns() * sums.bytes,
                 scratch.get());
      }
    });
    return projected;
  }

  // to [rows, K] (+)= the product of each block's columns, + bias.
  void multiply(const Blocks& of, const std::vector<Buffer>& with, const Matrix& rows, const void* own_bias,
                bool accumulate, char* to, void* scratch) const {
    for (size_t b = 0; b < of.count(); ++b) {
      const int64_t at = of.rows[b] * sums.bytes;
      k.rows(sums.type, rows.part(sums.type, 0, rows.rows, of.columns[b], of.columns[b + 1]), with[b].get(),
             of.weights[b].rows, own_bias ? static_cast<const char*>(own_bias) + at : nullptr, accumulate, to + at,
             columns(), scratch);
    }
  }

  int64_t tile_rows() const {
    const int64_t bytes = (d() + columns() + roots.d()) * sums.bytes;
    return std::clamp<int64_t>(kTileBytes / std::max<int64_t>(1, bytes), 16, k.outer_rows);
  }
  struct Scratch {
    Buffer products, sums, out, root;
  };
  Scratch scratch() const {
    const int64_t rows = tile_rows();
    return {make_buffer(k.rows_scratch_bytes(sums.type)),
            make_buffer(project_first || (keep && sums.same) ? 0 : rows * d() * sums.bytes),
            make_buffer(sums.scratch(rows, columns())), make_buffer(sums.scratch(rows, roots.d()))};
  }

  // The rows [first, last) of the result. False: an edge is out of range.
  bool tile(int64_t first, int64_t last, const Scratch& s) const {
    const int64_t n = last - first, size = element_bytes(type);
    char* const stored = out + first * columns() * size;
    char* const to = sums.same ? stored : static_cast<char*>(s.out.get());
    const void* pending = bias.get();  // goes with the first product
    bool begun = false;
    if (!project_first) {
      char* const kept = keep ? aggregated + first * d() * size : nullptr;
      char* const h = keep && sums.same ? kept : static_cast<char*>(s.sums.get());
      if (!neighbours->gather(k, type, first, last, false, h)) return false;
      if (keep && !sums.same) k.narrow(type, h, n * d(), kept);
      multiply(blocks, panels, {h, n, d(), d(), 1}, pending, false, to, s.products.get());
      begun = true;
      pending = nullptr;
    }
    if (root.has_value()) {
      const Matrix rows = sums.of(k, root->part(type, first, last, 0, roots.d()), s.root.get());
      multiply(roots, root_panels, rows, pending, begun, to, s.products.get());
      begun = true;
    } else if (pending) {
      for (int64_t i = 0; i < n; ++i) std::memcpy(to + i * columns() * sums.bytes, pending, columns() * sums.bytes);
      begun = true;
    }
    if (project_first && !neighbours->gather(k, sums.type, first, last, begun, to)) return false;
    if (!sums.same) k.narrow(type, to, n * columns(), stored);
    return true;
  }
};

std::tuple<Tensor, Tensor> aggregate_linear(const Tensor& x, const Tensor& ptr, const Tensor& index,
                                            const std::optional<Tensor>& place,
                                            const std::optional<Tensor>& edge_weight,
                                            const std::vector<Tensor>& weights, const std::optional<Tensor>& root,
                                            const std::vector<Tensor>& root_weights, const std::optional<Tensor>& bias,
                                            int64_t reduce, bool project_first, bool keep) {
  const DType type = dtype_of(x, "x");
  const Kernels& k = kernels();
  GatherJob job = job_of(x, type, neighbours_of(ptr, index, place, x.size(0)), reduce_of(reduce), "x");
  Forward forward(k, type, weights, root_weights, project_first, keep);
  const Sums& sums = forward.sums;
  set_coefficients(job, edge_weight, std::nullopt, sums.dtype());
  const int64_t rows = job.graph.rows, columns = forward.columns(), d = job.columns;
  check_size(forward.d(), d, "weights: columns");
  STD_TORCH_CHECK(root.has_value() == (forward.roots.count() > 0), "root: expected it together with root_weights");
  STD_TORCH_CHECK(!project_first || (!keep && (job.reduce == Reduce::kSum || job.reduce == Reduce::kMean)),
                  "project_first: expected a linear reduction, and nothing to keep");
  if (root.has_value()) {
    check_cpu_matrix(*root, "root", type);
    check_size(root->size(0), rows, "root: size of dimension 0");
    check_size(forward.roots.d(), root->size(1), "root_weights: columns");
    check_size(forward.roots.k(), columns, "root_weights: rows");
    forward.root = matrix(*root);
  }
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->is_cpu() && bias->dim() == 1 && dtype_of(*bias, "bias") == type,
                    "bias: expected a CPU vector of the dtype of x");
    check_size(bias->size(0), columns, "bias: size of dimension 0");
    forward.bias = make_buffer(columns * sums.bytes);
    k.widen(type, bias->const_data_ptr(), columns, bias->stride(0), forward.bias.get());
  }
  Tensor out = empty(x, {rows, columns}), aggregated = keep ? empty(x, {rows, d}) : empty(x, {0});
  if (rows == 0 || (columns == 0 && !keep)) return {out, aggregated};
  forward.out = static_cast<char*>(out.mutable_data_ptr());
  if (keep) forward.aggregated = static_cast<char*>(aggregated.mutable_data_ptr());

  Buffer projected;
  if (project_first) {
    projected = forward.project(matrix(x));
    job.x = projected.get();
    job.columns = job.row_stride = columns;
  }
  const Gathering neighbours(k, project_first ? sums.type : type, job);
  forward.neighbours = &neighbours;

  // A product costs what 16 multiply-adds to a gathered number come to.
  const int64_t products = columns * (project_first ? 0 : d) + columns * forward.roots.d();
  const int64_t parts = std::clamp<int64_t>(rows / 64, 1, kMaxParts);
  const std::vector<int64_t> borders =
      neighbours.borders(parts, 1 + products / (16 * std::max<int64_t>(1, job.columns)));
  std::vector<char> good(parts, 1);
  const int64_t work = 4 * (job.graph.edges + rows) * job.columns + rows * products;
  parallel_for(0, parts, grain(work / parts + 1), [&](int64_t begin, int64_t end) {
    const Forward::Scratch scratch = forward.scratch();
    const int64_t step = forward.tile_rows();
    for (int64_t part = begin; part < end; ++part)
      for (int64_t r = borders[part]; r < borders[part + 1] && good[part]; r += step)
        good[part] = forward.tile(r, std::min(borders[part + 1], r + step), scratch);
  });
  check_good(good);
  return {out, aggregated};
}

}  // namespace
}  // namespace mtl

STABLE_TORCH_LIBRARY_IMPL(torch_mtl_pyg, CPU, m) { m.impl("aggregate_linear", TORCH_BOX(&mtl::aggregate_linear)); }
