// The backward of aggregate_linear on the CPU, for linear reductions: along the edges turned around, a tile of rows of
// x at a time,
//
//   z = A^T g [S, K]      dx = z W (+ g W_root)      dW = z^T x      dW_root = g^T x
//
// The root's part where x is the root too. Determinism: as in aggregate.cpp and multi_head_linear.cpp; the slices of dW
// depend on the graph and the shape alone.
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

// Blocks of dW and tiles that stay in the second-level cache; slices of the rows, each with sums of its own.
constexpr int64_t kBlockK = 192, kBlockD = 256, kTileBytes = 320 << 10, kMaxSlices = 32;

// sum [g.cols, x.cols] += g^T x, in blocks of nearly equal size.
void add_outer(const Kernels& k, const Sums& sums, const Matrix& g, const Matrix& x, char* sum, void* scratch) {
  auto step = [](int64_t size, int64_t most) {
    const int64_t blocks = std::max<int64_t>(1, (size + most - 1) / most);
    return std::min(most, (size + blocks - 1) / blocks + 15) / 16 * 16;
  };
  const int64_t step_k = std::max<int64_t>(16, step(g.cols, kBlockK)),
                step_d = std::max<int64_t>(16, step(x.cols, kBlockD));
  for (int64_t k0 = 0; k0 < g.cols; k0 += step_k)
    for (int64_t d0 = 0; d0 < x.cols; d0 += step_d) {
      const int64_t k1 = std::min(g.cols, k0 + step_k), d1 = std::min(x.cols, d0 + step_d);
      k.outer(sums.type, g.part(sums.type, 0, g.rows, k0, k1), x.part(sums.type, 0, x.rows, d0, d1),
              sum + (k0 * x.cols + d0) * sums.bytes, x.cols, nullptr, scratch);
    }
}

// One product of a tile: columns [z, z + width) of the gradients with columns [x, x + cols) of the tile of x.
struct Piece {
  int64_t z, width, x, cols;
  int64_t sum;  // where its part of dW begins
  bool accumulate;
  Buffer panels;
};

// What the tiles are made of and go to.
struct Backward {
  const Kernels& k;
  DType type;
  Sums sums;
  Blocks blocks, roots;
  Matrix grad, x;
  const Gathering* neighbours = nullptr;
  std::vector<Piece> pieces;
  char* dx = nullptr;  // or null
  bool need_weight;
  int64_t dw_size = 0;

  Backward(const Kernels& kernels, DType dtype, const Tensor& g, const Tensor& features,
           const std::vector<Tensor>& weights, const std::vector<Tensor>& root_weights, bool weight)
      : k(kernels),
        type(dtype),
        sums(dtype),
        blocks(k, sums, weights, "weights"),
        roots(k, sums, root_weights, "root_weights"),
        grad(matrix(g)),
        x(matrix(features)),
        need_weight(weight) {}

  bool with_root() const { return roots.count() > 0; }
  int64_t columns() const { return blocks.k(); }
  // Of a tile of gradients: those gathered, and those of the rows themselves where x is the root too.
  int64_t z_columns() const { return columns() * (with_root() ? 2 : 1); }

  void check() const {
    check_size(blocks.d(), x.cols, "weights: columns");
    check_size(grad.cols, columns(), "grad: size of dimension 1");
    if (!with_root()) return;
    check_size(grad.rows, x.rows, "grad: size of dimension 0, where x is the root too");
    check_size(roots.count(), blocks.count(), "root_weights: number");
    for (size_t b = 0; b < blocks.count(); ++b) {
      check_size(roots.rows[b + 1], blocks.rows[b + 1], "root_weights: rows as of weights");
      check_size(roots.columns[b + 1], blocks.columns[b + 1], "root_weights: columns as of weights");
    }
  }

  // dW of all blocks in order, then those of the root: flat.
  void plan() {
    const int sides = with_root() ? 2 : 1;
    if (blocks.count() == 1 && with_root()) {
      // Both weights below each other: one product for the neighbours and the root.
      const int64_t rows = columns(), d = x.cols;
      const Buffer both = make_buffer(2 * rows * d * sums.bytes);
      for (int side = 0; side < sides; ++side)
        for (int64_t r = 0; r < rows; ++r) {
          const Matrix row = (side ? roots : blocks).weights[0].part(sums.type, r, r + 1, 0, d);
          k.widen(sums.type, row.data, d, row.col_stride,
                  static_cast<char*>(both.get()) + (side * rows + r) * d * sums.bytes);
        }
      pieces.push_back({0, 2 * rows, 0, d, 0, false, pack(k, sums.type, {both.get(), 2 * rows, d, d, 1})});
      dw_size = 2 * rows * d;
      return;
    }
    for (int side = 0; side < sides; ++side)
      for (size_t b = 0; b < blocks.count(); ++b) {
        const Matrix& w = (side ? roots : blocks).weights[b];
        pieces.push_back({side * columns() + blocks.rows[b], w.rows, blocks.columns[b], w.cols, dw_size, side == 1,
                          pack(k, sums.type, w)});
        dw_size += w.rows * w.cols;
      }
  }

  int64_t tile_rows() const {
    return std::clamp<int64_t>(kTileBytes / ((z_columns() + 2 * x.cols) * sums.bytes), 32, k.outer_rows);
  }
  struct Scratch {
    Buffer products, z, x, dx;
  };
  Scratch scratch() const {
    const int64_t rows = tile_rows();
    return {make_buffer(std::max(k.rows_scratch_bytes(sums.type), k.outer_scratch_bytes(sums.type, kBlockK, kBlockD))),
            make_buffer(rows * z_columns() * sums.bytes), make_buffer(sums.scratch(rows, x.cols)),
            make_buffer(sums.scratch(rows, x.cols))};
  }

  // The rows [first, last) of dx, and their part of dW. False: an edge is out of range.
  bool tile(int64_t first, int64_t last, char* dw, const Scratch& s) const {
    const int64_t rows = last - first, stride = z_columns();
    char* const z = static_cast<char*>(s.z.get());
    if (!k.gather(type, neighbours->job, first, last, false, z, stride)) return false;
    if (with_root())
      for (int64_t i = 0; i < rows; ++i)
        k.widen(type, grad.part(type, first + i, first + i + 1, 0, columns()).data, columns(), 1,
                z + (i * stride + columns()) * sums.bytes);
    const Matrix own = sums.of(k, x.part(type, first, last, 0, x.cols), s.x.get());
    char* const stored = dx ? dx + first * x.cols * element_bytes(type) : nullptr;
    char* const to = sums.same ? stored : static_cast<char*>(s.dx.get());
    for (const Piece& piece : pieces) {
      const Matrix g{z + piece.z * sums.bytes, rows, piece.width, stride, 1};
      if (dx)
        k.rows(sums.type, g, piece.panels.get(), piece.cols, nullptr, piece.accumulate, to + piece.x * sums.bytes,
               x.cols, s.products.get());
      if (need_weight)
        add_outer(k, sums, g, own.part(sums.type, 0, rows, piece.x, piece.x + piece.cols), dw + piece.sum * sums.bytes,
                  s.products.get());
    }
    if (dx && !sums.same) k.narrow(type, to, rows * x.cols, stored);
    return true;
  }
};

std::tuple<Tensor, Tensor> aggregate_linear_backward(
    const Tensor& grad, const Tensor& x, const Tensor& source_ptr, const Tensor& source_index,
    const std::optional<Tensor>& source_place, const std::optional<Tensor>& edge_weight,
    const std::optional<Tensor>& factors, const std::vector<Tensor>& weights, const std::vector<Tensor>& root_weights,
    bool need_x, bool need_weight) {
  const DType type = dtype_of(x, "x");
  const Kernels& k = kernels();
  check_cpu_matrix(x, "x", type);
  GatherJob job =
      job_of(grad, type, neighbours_of(source_ptr, source_index, source_place, grad.size(0)), Reduce::kSum, "grad");
  Backward backward(k, type, grad, x, weights, root_weights, need_weight);
  const Sums& sums = backward.sums;
  set_coefficients(job, edge_weight, factors, sums.dtype());
  const int64_t n = x.size(0), d = x.size(1), columns = backward.columns();
  check_size(job.graph.rows, n, "source_ptr: rows");
  backward.check();
  backward.plan();
  const int64_t dw_size = backward.dw_size;
  Tensor dx = need_x ? empty(x, {n, d}) : empty(x, {0}), dw = need_weight ? empty(x, {dw_size}) : empty(x, {0});
  char* const dw_out = need_weight ? static_cast<char*>(dw.mutable_data_ptr()) : nullptr;
  if (need_x) backward.dx = static_cast<char*>(dx.mutable_data_ptr());
  if (n == 0 || columns == 0) {
    if (need_weight) std::memset(dw_out, 0, dw_size * element_bytes(type));
    if (need_x) std::memset(backward.dx, 0, n * d * element_bytes(type));
    return {dx, dw};
  }
  const Gathering neighbours(k, type, job);
  backward.neighbours = &neighbours;

  int64_t slices = std::clamp<int64_t>(n / 256, 1, kMaxSlices);
  if (need_weight) slices = std::clamp<int64_t>((int64_t(1) << 24) / std::max<int64_t>(1, dw_size), 1, slices);
  if (slices > 1 && slices % 2) --slices;  // few threads get equal shares
  const int64_t products = backward.z_columns() * d * (need_x + need_weight);
  // A product costs what 16 multiply-adds to a gathered number come to.
  const std::vector<int64_t> borders = neighbours.borders(slices, 1 + products / (16 * columns));
  const Buffer parts = make_buffer(need_weight ? slices * dw_size * sums.bytes : 0);
  std::vector<char> good(slices, 1);
  const int64_t work = 4 * (job.graph.edges + n) * columns + n * products;
  parallel_for(0, slices, grain(work / slices + 1), [&](int64_t begin, int64_t end) {
    const Backward::Scratch scratch = backward.scratch();
    const int64_t step = backward.tile_rows();
    for (int64_t slice = begin; slice < end; ++slice) {
      char* const sum = need_weight ? static_cast<char*>(parts.get()) + slice * dw_size * sums.bytes : nullptr;
      if (need_weight) std::memset(sum, 0, dw_size * sums.bytes);
      for (int64_t r = borders[slice]; r < borders[slice + 1] && good[slice]; r += step)
        good[slice] = backward.tile(r, std::min(borders[slice + 1], r + step), sum, scratch);
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
  m.impl("aggregate_linear_backward", TORCH_BOX(&mtl::aggregate_linear_backward));
}
