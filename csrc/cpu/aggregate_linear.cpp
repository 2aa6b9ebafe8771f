// Aggregation and projection to all tasks in one pass over tiles of rows, on the CPU.
//
//   forward    out [R, K] = (A x) W^T + root W_root^T + bias           with c_rj, the coefficients of the edges, as A
//              either way: A x of a tile is projected while it is in the cache, or x W^T is aggregated
//   backward   z = A^T g [S, K], gathered along the edges turned around, a tile of rows of x at a time:
//              dx = z W (+ g W_root)      dW = z^T x      dW_root = g^T x
//
// Blocks: task by task with columns of x of their own, or one block for all tasks. Sums and products are float32, for
// float64 float64. Determinism: as in aggregate.cpp and multi_head_linear.cpp; the slices of dW depend on the graph and
// the shape alone.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/checks.h"
#include "buffer.h"
#include "graph_host.h"
#include "host.h"
#include "isa.h"

namespace mtl {
namespace {

using torch::stable::parallel_for;

// Everything about the type of the sums, in which all products are done.
struct Sums {
  DType type, stored;
  int64_t bytes;
  bool same;  // as the tensors' own

  explicit Sums(DType of)
      : type(of == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32),
        stored(of),
        bytes(accumulator_bytes(of)),
        same(type == of) {}
  ScalarType dtype() const { return type == DType::kFloat64 ? ScalarType::Double : ScalarType::Float; }

  int64_t scratch(int64_t rows, int64_t columns) const { return same ? 0 : rows * columns * bytes; }
  // A matrix in this type: itself, or a copy in `memory`.
  Matrix of(const Kernels& k, const Matrix& m, void* memory) const {
    if (same) return m;
    for (int64_t r = 0; r < m.rows; ++r)
      k.widen(stored, m.part(stored, r, r + 1, 0, m.cols).data, m.cols, m.col_stride,
              static_cast<char*>(memory) + r * m.cols * bytes);
    return {memory, m.rows, m.cols, m.cols, 1};
  }
};

// Weights [C_b, F_b] of each block, below each other and side by side.
struct Blocks {
  std::vector<Matrix> weights;
  std::vector<int64_t> rows, columns;  // where each begins, and the end
  std::vector<Buffer> copies;

  Blocks(const Kernels& k, const Sums& sums, const std::vector<Tensor>& from, const char* name) : rows(1), columns(1) {
    for (const Tensor& w : from) {
      check_cpu_matrix(w, name, sums.stored);
      copies.push_back(make_buffer(sums.scratch(w.size(0), w.size(1))));
      weights.push_back(sums.of(k, matrix(w), copies.back().get()));
      rows.push_back(rows.back() + w.size(0));
      columns.push_back(columns.back() + w.size(1));
    }
  }
  size_t count() const { return weights.size(); }
  int64_t k() const { return rows.back(); }
  int64_t d() const { return columns.back(); }
  // Panels of every block, of W^T for a product with rows of x, or of W.
  std::vector<Buffer> panels(const Kernels& k, const Sums& sums, bool transpose) const {
    std::vector<Buffer> all;
    for (const Matrix& w : weights) all.push_back(pack(k, sums.type, transpose ? transposed(w) : w));
    return all;
  }
};

void check_good(const std::vector<char>& good) { check_edges(std::find(good.begin(), good.end(), 0) == good.end()); }

// ---- Forward.
std::tuple<Tensor, Tensor> aggregate_linear(const Tensor& x, const Tensor& ptr, const Tensor& index,
                                            const std::optional<Tensor>& place,
                                            const std::optional<Tensor>& edge_weight,
                                            const std::vector<Tensor>& weight_list, const std::optional<Tensor>& root,
                                            const std::vector<Tensor>& root_list, const std::optional<Tensor>& bias,
                                            int64_t reduce, bool project_first, bool keep) {
  const DType type = dtype_of(x, "x");
  const Sums sums(type);
  const Kernels& k = kernels();
  GatherJob job{neighbours_of(ptr, index, place, x.size(0)),
                reduce_of(reduce),
                nullptr,
                0,
                0,
                nullptr,
                type,
                nullptr,
                nullptr,
                nullptr,
                0};
  set_rows(job, x, type, "x");
  set_coefficients(job, edge_weight, std::nullopt, sums.dtype());
  const Blocks blocks(k, sums, weight_list, "weights"), roots(k, sums, root_list, "root_weights");
  check_size(blocks.d(), x.size(1), "weights: columns");
  STD_TORCH_CHECK(root.has_value() == (roots.count() > 0), "root: expected it together with root_weights");
  STD_TORCH_CHECK(!project_first || (!keep && (job.reduce == Reduce::kSum || job.reduce == Reduce::kMean)),
                  "project_first: expected a linear reduction, and nothing to keep");
  const int64_t rows = job.graph.rows, columns = blocks.k(), d = job.columns;
  if (root.has_value()) {
    check_cpu_matrix(*root, "root", type);
    check_size(root->size(0), rows, "root: size of dimension 0");
    check_size(roots.d(), root->size(1), "root_weights: columns");
    check_size(roots.count(), blocks.count(), "root_weights: number");
    for (size_t b = 0; b < blocks.count(); ++b)
      check_size(roots.rows[b + 1], blocks.rows[b + 1], "root_weights: rows as of weights");
  }
  const Buffer wide_bias = make_buffer(bias.has_value() ? columns * sums.bytes : 0);
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->is_cpu() && bias->dim() == 1 && dtype_of(*bias, "bias") == type,
                    "bias: expected a CPU vector of the dtype of x");
    check_size(bias->size(0), columns, "bias: size of dimension 0");
    k.widen(type, bias->const_data_ptr(), columns, bias->stride(0), wide_bias.get());
  }
  Tensor out = empty(x, {rows, columns}), aggregated = keep ? empty(x, {rows, d}) : empty(x, {0});
  if (rows == 0 || (columns == 0 && !keep)) return {out, aggregated};
  const std::vector<Buffer> panels = blocks.panels(k, sums, true), root_panels = roots.panels(k, sums, true);

  // x W^T, of which the neighbours' rows are gathered instead of those of x.
  Buffer projected;
  DType gathered = type;
  if (project_first) {
    projected = make_buffer(x.size(0) * columns * sums.bytes);
    const Matrix xm = matrix(x);
    parallel_for(0, xm.rows, grain(columns * std::max<int64_t>(1, d)), [&](int64_t begin, int64_t end) {
      const Buffer scratch = make_buffer(k.rows_scratch_bytes(sums.type)),
                   wide = make_buffer(sums.scratch(k.outer_rows, d));
      for (int64_t r = begin; r < end; r += k.outer_rows) {
        const int64_t last = std::min(end, r + k.outer_rows);
        const Matrix tile = sums.of(k, xm.part(type, r, last, 0, d), wide.get());
        for (size_t b = 0; b < blocks.count(); ++b)
          k.rows(sums.type, tile.part(sums.type, 0, last - r, blocks.columns[b], blocks.columns[b + 1]),
                 panels[b].get(), blocks.weights[b].rows, nullptr, false,
                 static_cast<char*>(projected.get()) + (r * columns + blocks.rows[b]) * sums.bytes, columns,
                 scratch.get());
      }
    });
    gathered = sums.type;
    job.x = projected.get();
    job.columns = job.row_stride = columns;
  }
  const Gathering all(k, gathered, job);

  // Rows of a tile: what they are made of stays in the second-level cache.
  const int64_t row_bytes = (d + columns + (root.has_value() ? roots.d() : 0)) * sums.bytes;
  const int64_t tile_rows =
      std::clamp<int64_t>((int64_t(256) << 10) / std::max<int64_t>(1, row_bytes), 16, k.outer_rows);
  const int64_t work =
      4 * (job.graph.edges + rows) * job.columns + rows * columns * (project_first ? roots.d() : d + roots.d());
  const int64_t parts = std::clamp<int64_t>(rows / 64, 1, 64);
  const std::vector<int64_t> borders =
      all.borders(parts, 1 + columns * (d + roots.d()) / (16 * std::max<int64_t>(1, job.columns)) / 2);
  std::vector<char> good(parts, 1);
  parallel_for(0, parts, grain(work / parts + 1), [&](int64_t begin, int64_t end) {
    const Buffer scratch = make_buffer(k.rows_scratch_bytes(sums.type)),
                 sum_tile = make_buffer(project_first || (keep && sums.same) ? 0 : tile_rows * d * sums.bytes),
                 out_tile = make_buffer(sums.scratch(tile_rows, columns)),
                 root_tile = make_buffer(sums.scratch(tile_rows, roots.d()));
    for (int64_t part = begin; part < end; ++part)
      for (int64_t r = borders[part]; r < borders[part + 1] && good[part]; r += tile_rows) {
        const int64_t last = std::min(borders[part + 1], r + tile_rows), n = last - r;
        char* const stored = static_cast<char*>(out.mutable_data_ptr()) + r * columns * element_bytes(type);
        char* const to = sums.same ? stored : static_cast<char*>(out_tile.get());
        char* sum = nullptr;
        if (!project_first) {
          char* const kept =
              keep ? static_cast<char*>(aggregated.mutable_data_ptr()) + r * d * element_bytes(type) : nullptr;
          sum = keep && sums.same ? kept : static_cast<char*>(sum_tile.get());
          good[part] = k.gather(gathered, all.job, r, last, false, sum, d);
          if (!good[part]) break;
          if (keep && !sums.same) k.narrow(type, sum, n * d, kept);
        }
        const Matrix root_rows =
            root.has_value() ? sums.of(k, matrix(*root).part(type, r, last, 0, roots.d()), root_tile.get()) : Matrix{};
        bool begun = false;
        for (size_t b = 0; b < blocks.count(); ++b) {
          const int64_t width = blocks.weights[b].rows, at = blocks.rows[b] * sums.bytes;
          const void* own_bias = bias.has_value() ? static_cast<const char*>(wide_bias.get()) + at : nullptr;
          begun = false;
          if (!project_first) {
            const Matrix h{sum + blocks.columns[b] * sums.bytes, n, blocks.columns[b + 1] - blocks.columns[b], d, 1};
            k.rows(sums.type, h, panels[b].get(), width, own_bias, false, to + at, columns, scratch.get());
            begun = true;
          }
          if (root.has_value()) {
            k.rows(sums.type, root_rows.part(sums.type, 0, n, roots.columns[b], roots.columns[b + 1]),
                   root_panels[b].get(), width, begun ? nullptr : own_bias, begun, to + at, columns, scratch.get());
            begun = true;
          }
        }
        if (project_first) {
          if (!begun && bias.has_value()) {
            for (int64_t i = 0; i < n; ++i)
              std::memcpy(to + i * columns * sums.bytes, wide_bias.get(), columns * sums.bytes);
            begun = true;
          }
          good[part] = k.gather(gathered, all.job, r, last, begun, to, columns);
          if (!good[part]) break;
        }
        if (!sums.same) k.narrow(type, to, n * columns, stored);
      }
  });
  check_good(good);
  return {out, aggregated};
}

// ---- Backward.
// One product of a tile: columns [z, z + width) of the gradients with columns [x, x + cols) of the tile of x.
struct Piece {
  int64_t z, width, x, cols;
  int64_t sum;  // where its part of dW begins
  bool accumulate;
  Buffer panels;
};

std::tuple<Tensor, Tensor> aggregate_linear_backward(
    const Tensor& grad, const Tensor& x, const Tensor& source_ptr, const Tensor& source_index,
    const std::optional<Tensor>& source_place, const std::optional<Tensor>& edge_weight,
    const std::optional<Tensor>& factors, const std::vector<Tensor>& weight_list, const std::vector<Tensor>& root_list,
    bool need_x, bool need_weight) {
  const DType type = dtype_of(x, "x");
  const Sums sums(type);
  const Kernels& k = kernels();
  check_cpu_matrix(x, "x", type);
  GatherJob job{neighbours_of(source_ptr, source_index, source_place, grad.size(0)),
                Reduce::kSum,
                nullptr,
                0,
                0,
                nullptr,
                type,
                nullptr,
                nullptr,
                nullptr,
                0};
  set_rows(job, grad, type, "grad");
  set_coefficients(job, edge_weight, factors, sums.dtype());
  const Blocks blocks(k, sums, weight_list, "weights"), roots(k, sums, root_list, "root_weights");
  const int64_t n = x.size(0), d = x.size(1), columns = blocks.k();
  check_size(job.graph.rows, n, "source_ptr: rows");
  check_size(blocks.d(), d, "weights: columns");
  check_size(grad.size(1), columns, "grad: size of dimension 1");
  const bool with_root = roots.count() > 0;
  if (with_root) {
    check_size(grad.size(0), n, "grad: size of dimension 0, where x is the root too");
    check_size(roots.count(), blocks.count(), "root_weights: number");
    for (size_t b = 0; b < blocks.count(); ++b) {
      check_size(roots.rows[b + 1], blocks.rows[b + 1], "root_weights: rows as of weights");
      check_size(roots.columns[b + 1], blocks.columns[b + 1], "root_weights: columns as of weights");
    }
  }
  // dW of all blocks in order, then those of the root: flat.
  int64_t per_side = 0;
  for (const Matrix& w : blocks.weights) per_side += w.rows * w.cols;
  const int64_t dw_size = per_side * (with_root ? 2 : 1), z_columns = columns * (with_root ? 2 : 1);
  Tensor dx = need_x ? empty(x, {n, d}) : empty(x, {0}), dw = need_weight ? empty(x, {dw_size}) : empty(x, {0});
  char* const dw_out = need_weight ? static_cast<char*>(dw.mutable_data_ptr()) : nullptr;
  if (n == 0 || columns == 0) {
    if (need_weight) std::memset(dw_out, 0, dw_size * element_bytes(type));
    if (need_x) std::memset(dx.mutable_data_ptr(), 0, n * d * element_bytes(type));
    return {dx, dw};
  }

  std::vector<Piece> pieces;
  if (blocks.count() == 1 && with_root) {
    // Both weights below each other: one product for the neighbours and the root.
    const Buffer both = make_buffer(2 * columns * d * sums.bytes);
    for (int side = 0; side < 2; ++side) {
      const Matrix& w = side ? roots.weights[0] : blocks.weights[0];
      for (int64_t r = 0; r < columns; ++r)
        k.widen(sums.type, w.part(sums.type, r, r + 1, 0, d).data, d, w.col_stride,
                static_cast<char*>(both.get()) + (side * columns + r) * d * sums.bytes);
    }
    pieces.push_back({0, 2 * columns, 0, d, 0, false, pack(k, sums.type, {both.get(), 2 * columns, d, d, 1})});
  } else {
    for (int side = 0; side < (with_root ? 2 : 1); ++side) {
      int64_t sum = side * per_side;
      for (size_t b = 0; b < blocks.count(); ++b) {
        const Matrix& w = side ? roots.weights[b] : blocks.weights[b];
        pieces.push_back({side * columns + blocks.rows[b], w.rows, blocks.columns[b], w.cols, sum, side == 1,
                          pack(k, sums.type, w)});
        sum += w.rows * w.cols;
      }
    }
  }
  const Gathering all(k, type, job);

  constexpr int64_t kBlockK = 192, kBlockD = 256, kMaxSlices = 32;
  const int64_t row_bytes = (z_columns + 2 * d) * sums.bytes;
  const int64_t tile_rows = std::clamp<int64_t>((int64_t(320) << 10) / row_bytes, 32, k.outer_rows);
  const int64_t row_work = 1 + z_columns * d * ((need_x ? 1 : 0) + (need_weight ? 1 : 0)) / (16 * columns) / 2;
  int64_t slices = std::clamp<int64_t>(n / 256, 1, kMaxSlices);
  if (need_weight) slices = std::clamp<int64_t>((int64_t(1) << 24) / std::max<int64_t>(1, dw_size), 1, slices);
  if (slices > 1 && slices % 2) --slices;
  const std::vector<int64_t> borders = all.borders(slices, row_work);
  const Buffer parts = make_buffer(need_weight ? slices * dw_size * sums.bytes : 0);
  std::vector<char> good(slices, 1);
  const int64_t work = 4 * (job.graph.edges + n) * columns + 2 * n * z_columns * d;
  parallel_for(0, slices, grain(work / slices + 1), [&](int64_t begin, int64_t end) {
    const Buffer scratch = make_buffer(
                     std::max(k.rows_scratch_bytes(sums.type), k.outer_scratch_bytes(sums.type, kBlockK, kBlockD))),
                 z_tile = make_buffer(tile_rows * z_columns * sums.bytes),
                 x_tile = make_buffer(sums.scratch(tile_rows, d)), dx_tile = make_buffer(sums.scratch(tile_rows, d));
    char* const z = static_cast<char*>(z_tile.get());
    for (int64_t slice = begin; slice < end; ++slice) {
      char* const sum = static_cast<char*>(parts.get()) + (need_weight ? slice * dw_size * sums.bytes : 0);
      if (need_weight) std::memset(sum, 0, dw_size * sums.bytes);
      for (int64_t r = borders[slice]; r < borders[slice + 1]; r += tile_rows) {
        const int64_t last = std::min(borders[slice + 1], r + tile_rows), rows = last - r;
        good[slice] = k.gather(type, all.job, r, last, false, z, z_columns);
        if (!good[slice]) break;
        if (with_root)
          for (int64_t i = 0; i < rows; ++i)
            k.widen(type, static_cast<const char*>(job.x) + (r + i) * job.row_stride * element_bytes(type), columns, 1,
                    z + (i * z_columns + columns) * sums.bytes);
        const Matrix rows_of_x = sums.of(k, matrix(x).part(type, r, last, 0, d), x_tile.get());
        char* const dx_stored =
            need_x ? static_cast<char*>(dx.mutable_data_ptr()) + r * d * element_bytes(type) : nullptr;
        char* const dx_rows = sums.same ? dx_stored : static_cast<char*>(dx_tile.get());
        for (const Piece& piece : pieces) {
          const Matrix g{z + piece.z * sums.bytes, rows, piece.width, z_columns, 1};
          if (need_x)
            k.rows(sums.type, g, piece.panels.get(), piece.cols, nullptr, piece.accumulate,
                   dx_rows + piece.x * sums.bytes, d, scratch.get());
          if (!need_weight) continue;
          for (int64_t k0 = 0; k0 < piece.width; k0 += kBlockK)
            for (int64_t d0 = 0; d0 < piece.cols; d0 += kBlockD) {
              const int64_t k1 = std::min(piece.width, k0 + kBlockK), d1 = std::min(piece.cols, d0 + kBlockD);
              k.outer(sums.type, g.part(sums.type, 0, rows, k0, k1),
                      rows_of_x.part(sums.type, 0, rows, piece.x + d0, piece.x + d1),
                      sum + (piece.sum + k0 * piece.cols + d0) * sums.bytes, piece.cols, nullptr, scratch.get());
            }
        }
        if (need_x && !sums.same) k.narrow(type, dx_rows, rows * d, dx_stored);
      }
    }
  });
  check_good(good);
  if (need_weight)
    parallel_for(0, dw_size, grain(4 * slices), [&](int64_t begin, int64_t end) {
      k.sum_parts(type, parts.get(), slices, dw_size, begin, end, dw_out);
    });
  return {dx, dw};
}

}  // namespace
}  // namespace mtl

STABLE_TORCH_LIBRARY_IMPL(torch_mtl_pyg, CPU, m) {
  m.impl("aggregate_linear", TORCH_BOX(&mtl::aggregate_linear));
  m.impl("aggregate_linear_backward", TORCH_BOX(&mtl::aggregate_linear_backward));
}
