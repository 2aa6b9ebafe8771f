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

// Blocks of a tile's part of dW that stay in the second-level cache.
constexpr int64_t kBlockK = 192, kBlockD = 256;

// sum [g.cols, x.cols] += g^T x, in blocks of nearly equal size.
void add_outer(const Kernels& k, const Sums& sums, const Matrix& g, const Matrix& x, char* sum, void* scratch) {
  auto step = [](int64_t size, int64_t most) {
    const int64_t blocks = (size + most - 1) / most;
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

std::tuple<Tensor, Tensor> aggregate_linear_backward(
    const Tensor& grad, const Tensor& x, const Tensor& source_ptr, const Tensor& source_index,
    const std::optional<Tensor>& source_place, const std::optional<Tensor>& edge_weight,
    const std::optional<Tensor>& factors, const std::vector<Tensor>& weight_list, const std::vector<Tensor>& root_list,
    bool need_x, bool need_weight) {
  const DType type = dtype_of(x, "x");
  const Sums sums(type);
  const Kernels& k = kernels();
  check_cpu_matrix(x, "x", type);
  GatherJob job =
      job_of(grad, type, neighbours_of(source_ptr, source_index, source_place, grad.size(0)), Reduce::kSum, "grad");
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

  constexpr int64_t kMaxSlices = 32;
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
          add_outer(k, sums, g, rows_of_x.part(sums.type, 0, rows, piece.x, piece.x + piece.cols),
                    sum + piece.sum * sums.bytes, scratch.get());
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
  m.impl("aggregate_linear_backward", TORCH_BOX(&mtl::aggregate_linear_backward));
}
