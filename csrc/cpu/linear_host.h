// A linear layer and its gradients, as the host code of several ops shares them: packing, sharing out the work.
//
// Determinism: an element of y or dx is one chain over p, an element of dW a sum over fixed slices of the rows. The
// slices depend on the shape alone, so every result is bitwise equal whatever the number of threads. Called by a thread
// of a parallel_for, all of it runs in that thread.
#pragma once

#include <algorithm>
#include <cstring>

#include "buffer.h"
#include "columns.h"
#include "host.h"

namespace mtl {

// out = a * b + bias, all rows.
inline void multiply(const Kernels& k, DType type, const Columns& a, const Matrix& b, const void* bias, void* out) {
  if (a.rows() == 0 || b.cols == 0) return;
  const Buffer panels = pack(k, type, b);
  const int64_t out_row_bytes = b.cols * element_bytes(type);
  torch::stable::parallel_for(0, a.rows(), grain(b.rows * b.cols), [&](int64_t begin, int64_t end) {
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

// dx [N, D] = g W, dw [K, D] = g^T x, db [K] = sum of the rows of g; those that are null are left out. All contiguous.
inline void linear_backward(const Kernels& k, DType type, const Columns& g, const Matrix& x, const Matrix& w, void* dx,
                            void* dw, void* db) {
  using torch::stable::parallel_for;
  if (w.rows == 0) {  // no heads: nothing reaches x
    if (dx) std::memset(dx, 0, x.rows * x.cols * element_bytes(type));
    return;
  }
  const bool sums_rows = dw || db;
  const Shares shares(x.rows, w.rows, dw ? x.cols : 0);
  // One block holds all of dW: its rows of g and x are in the cache, so dx is computed with them.
  const bool with_dx = dx && sums_rows && shares.blocks_k == 1 && shares.blocks_d == 1;
  if (dx && !with_dx) multiply(k, type, g, w, nullptr, dx);
  if (!sums_rows) return;

  const Buffer panels = with_dx ? pack(k, type, w) : Buffer();
  const int64_t acc = accumulator_bytes(type), d = shares.d, blocks_d = shares.blocks_d;
  const int64_t part = w.rows * d + w.rows;  // accumulators of one slice: dW, then db
  const bool direct = shares.slices == 1 && element_bytes(type) == acc;
  const Buffer sums = direct ? Buffer() : make_buffer(shares.slices * part * acc);
  char* const dw_out = static_cast<char*>(dw);
  char* const db_out = static_cast<char*>(db);
  char* const dx_out = static_cast<char*>(dx);
  const int64_t dx_row_bytes = x.cols * element_bytes(type);

  parallel_for(0, shares.units(), grain(x.rows * w.rows * std::max<int64_t>(1, d) / shares.units()),
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
                   if (db && block_d == 0) column_sum = (direct ? db_out : slice_sum + w.rows * d * acc) + k0 * acc;
                   for (int64_t i = 0; i < k1 - k0 && d1 > d0; ++i) std::memset(sum + i * d * acc, 0, (d1 - d0) * acc);
                   if (column_sum) std::memset(column_sum, 0, (k1 - k0) * acc);
                   const int64_t first = shares.row(slice), rows = shares.row(slice + 1) - first;
                   const int64_t tiles = (rows + k.outer_rows - 1) / k.outer_rows;
                   for (int64_t tile = 0; tile < tiles; ++tile) {
                     const int64_t r0 = first + rows * tile / tiles, r1 = first + rows * (tile + 1) / tiles;
                     const Matrix g_tile = g.tile(r0, r1, k0, k1, gathered.get());
                     k.outer(type, g_tile, x.part(type, r0, r1, d0, d1), sum, d, column_sum, scratch.get());
                     if (with_dx)
                       k.rows(type, g_tile, panels.get(), w.cols, nullptr, false, dx_out + r0 * dx_row_bytes, w.cols,
                              scratch.get());
                   }
                 }
               });
  if (!direct) {
    const char* s = static_cast<const char*>(sums.get());
    if (dw)
      parallel_for(0, w.rows * d, grain(4 * shares.slices),
                   [&](int64_t begin, int64_t end) { k.sum_parts(type, s, shares.slices, part, begin, end, dw_out); });
    if (db) k.sum_parts(type, s + w.rows * d * acc, shares.slices, part, 0, w.rows, db_out);
  }
}

}  // namespace mtl
