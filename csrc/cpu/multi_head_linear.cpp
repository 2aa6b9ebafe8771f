// multi_head_linear on the CPU: checks, allocation, sharing out the work. The products are in products.h.
//
//   forward    y  [N, K] = x W^T + bias
//   backward   dx [N, D] = g W        dW [K, D] = g^T x        db [K] = sum of the rows of g
//
// Determinism: an element of y or dx is one chain over p, an element of dW a sum over fixed slices of the rows. The
// slices depend on the shape alone, so every result is bitwise equal whatever the number of threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "../common/checks.h"
#include "buffer.h"
#include "columns.h"
#include "host.h"
#include "isa.h"

namespace mtl {
namespace {

using torch::stable::parallel_for;

// out = a * b + bias, all rows.
void multiply(const Kernels& k, DType type, const Columns& a, const Matrix& b, const void* bias, void* out) {
  if (a.rows() == 0 || b.cols == 0) return;
  const Buffer panels = pack(k, type, b);
  const int64_t out_row_bytes = b.cols * element_bytes(type);
  parallel_for(0, a.rows(), grain(b.rows * b.cols), [&](int64_t begin, int64_t end) {
    const int64_t step = a.whole() ? end - begin : k.outer_rows;
    const Buffer scratch = make_buffer(k.rows_scratch_bytes(type)),
                 gathered = make_buffer(a.scratch_bytes(step, a.cols()));
    for (int64_t r = begin; r < end; r += step) {
      const Matrix tile = a.tile(r, std::min(r + step, end), 0, a.cols(), gathered.get());
      k.rows(type, tile, panels.get(), b.cols, bias, false, static_cast<char*>(out) + r * out_row_bytes, b.cols,
             scratch.get());
    }
  });
}

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

// How dW is shared out: blocks of K x D that stay in the second-level cache, times slices of the rows where the blocks
// alone are too few for many cores. A slice costs a partial sum, written and read once: it must hold enough rows to pay
// for it. All partial sums together hold at most kParts blocks.
struct Shares {
  static constexpr int64_t kBlockK = 192, kBlockD = 256, kParts = 32;
  int64_t n, k, d, blocks_k, blocks_d, slices;

  Shares(int64_t n, int64_t k, int64_t d)
      : n(n),
        k(k),
        d(d),
        blocks_k((k + kBlockK - 1) / kBlockK),
        blocks_d(std::max<int64_t>(1, (d + kBlockD - 1) / kBlockD)) {
    const int64_t blocks = blocks_k * blocks_d;
    slices = std::clamp<int64_t>(n / (blocks == 1 ? 256 : 1024), 1, (kParts + blocks - 1) / blocks);
    // An even number of units: few threads get equal shares.
    if (slices > 1 && slices % 2) --slices;
    if (slices * blocks > 1 && slices * blocks % 2) ++blocks_k;
  }
  int64_t units() const { return slices * blocks_k * blocks_d; }
  int64_t row(int64_t slice) const { return slice * (n / slices) + std::min(slice, n % slices); }
  // Equal blocks, their edges at multiples of the tiles' heights and widths.
  static int64_t edge(int64_t index, int64_t blocks, int64_t size, int64_t multiple) {
    const int64_t step = ((size + blocks - 1) / blocks + multiple - 1) / multiple * multiple;
    return std::min(size, index * step);
  }
  int64_t edge_k(int64_t index) const { return edge(index, blocks_k, k, 12); }
  int64_t edge_d(int64_t index) const { return d ? edge(index, blocks_d, d, 32) : 0; }
};

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

  if (w.rows == 0) {  // no heads: nothing reaches x
    if (need_x) std::memset(dx.mutable_data_ptr(), 0, xm.rows * xm.cols * element_bytes(type));
    return {dx, dw, db};
  }
  const bool sums_rows = need_weight || need_bias;
  const Shares shares(xm.rows, w.rows, need_weight ? xm.cols : 0);
  // One block holds all of dW: its rows of g and x are in the cache, so dx is computed with them.
  const bool with_dx = need_x && sums_rows && shares.blocks_k == 1 && shares.blocks_d == 1;
  if (need_x && !with_dx) multiply(k, type, g, w, nullptr, dx.mutable_data_ptr());
  if (!sums_rows) return {dx, dw, db};

  const Buffer panels = with_dx ? pack(k, type, w) : Buffer();
  const int64_t acc = accumulator_bytes(type), d = shares.d, blocks_d = shares.blocks_d;
  const int64_t part = w.rows * d + w.rows;  // accumulators of one slice: dW, then db
  const bool direct = shares.slices == 1 && element_bytes(type) == acc;
  const Buffer sums = direct ? Buffer() : make_buffer(shares.slices * part * acc);
  char* const dw_out = need_weight ? static_cast<char*>(dw.mutable_data_ptr()) : nullptr;
  char* const db_out = need_bias ? static_cast<char*>(db.mutable_data_ptr()) : nullptr;
  char* const dx_out = with_dx ? static_cast<char*>(dx.mutable_data_ptr()) : nullptr;
  const int64_t dx_row_bytes = xm.cols * element_bytes(type);

  parallel_for(0, shares.units(), grain(xm.rows * w.rows * std::max<int64_t>(1, d) / shares.units()),
               [&](int64_t begin, int64_t end) {
                 const Buffer scratch = make_buffer(std::max(
                     k.outer_scratch_bytes(type, Shares::kBlockK, Shares::kBlockD), k.rows_scratch_bytes(type)));
                 const Buffer gathered = make_buffer(g.scratch_bytes(k.outer_rows, Shares::kBlockK));
                 for (int64_t unit = begin; unit < end; ++unit) {
                   const int64_t block_d = unit % blocks_d, block_k = unit / blocks_d % shares.blocks_k;
                   const int64_t slice = unit / blocks_d / shares.blocks_k;
                   const int64_t k0 = shares.edge_k(block_k), k1 = shares.edge_k(block_k + 1);
                   const int64_t d0 = shares.edge_d(block_d), d1 = shares.edge_d(block_d + 1);
                   char* const slice_sum = direct ? nullptr : static_cast<char*>(sums.get()) + slice * part * acc;
                   char* const sum = d ? (direct ? dw_out : slice_sum) + (k0 * d + d0) * acc : nullptr;
                   char* column_sum = nullptr;
                   if (need_bias && block_d == 0)
                     column_sum = (direct ? db_out : slice_sum + w.rows * d * acc) + k0 * acc;
                   for (int64_t i = 0; i < k1 - k0 && d1 > d0; ++i) std::memset(sum + i * d * acc, 0, (d1 - d0) * acc);
                   if (column_sum) std::memset(column_sum, 0, (k1 - k0) * acc);
                   const int64_t first = shares.row(slice), rows = shares.row(slice + 1) - first;
                   const int64_t tiles = (rows + k.outer_rows - 1) / k.outer_rows;
                   for (int64_t tile = 0; tile < tiles; ++tile) {
                     const int64_t r0 = first + rows * tile / tiles, r1 = first + rows * (tile + 1) / tiles;
                     const Matrix g_tile = g.tile(r0, r1, k0, k1, gathered.get());
                     k.outer(type, g_tile, xm.part(type, r0, r1, d0, d1), sum, d, column_sum, scratch.get());
                     if (with_dx)
                       k.rows(type, g_tile, panels.get(), w.cols, nullptr, false, dx_out + r0 * dx_row_bytes, w.cols,
                              scratch.get());
                   }
                 }
               });
  if (!direct) {
    const char* s = static_cast<const char*>(sums.get());
    if (need_weight)
      parallel_for(0, w.rows * d, grain(4 * shares.slices),
                   [&](int64_t begin, int64_t end) { k.sum_parts(type, s, shares.slices, part, begin, end, dw_out); });
    if (need_bias) k.sum_parts(type, s + w.rows * d * acc, shares.slices, part, 0, w.rows, db_out);
  }
  return {dx, dw, db};
}

}  // namespace
}  // namespace mtl

STABLE_TORCH_LIBRARY_IMPL(torch_mtl_pyg, CPU, m) {
  m.impl("multi_head_linear", TORCH_BOX(&mtl::multi_head_linear));
  m.impl("multi_head_linear_backward", TORCH_BOX(&mtl::multi_head_linear_backward));
}
