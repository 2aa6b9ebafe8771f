// Blocks of columns, each with weights of its own, and the products with them.
#pragma once

#include <type_traits>
#include <vector>

#include "block_products.cuh"
#include "engines.h"
#include "graph_host.h"
#include "library.h"

namespace mtl::cuda {

// What sums meet numbers of a type with.
template <class Engine>
using SumsEngine = std::conditional_t<sizeof(typename Engine::Element) == 2, TensorTf32, Engine>;

// Sums of rows that exist at a time where nobody asks for them: they stay in the second-level cache of a large GPU.
constexpr int64_t kSumsBytes = 32 << 20;
inline int64_t rows_at_once(int64_t rows, int64_t bytes_per_row) {
  if (bytes_per_row == 0) return rows;
  return std::min(rows, std::max<int64_t>(128, kSumsBytes / bytes_per_row / 128 * 128));
}

// Weights [C_b, F_b] of each block, below each other and side by side.
struct Blocks {
  const std::vector<Tensor>& weights;
  std::vector<int64_t> rows, columns;  // where each begins, and the end

  Blocks(const std::vector<Tensor>& from, const char* name, DType type, const Tensor& like)
      : weights(from), rows(1), columns(1) {
    for (const Tensor& w : from) {
      check_device_matrix(w, name, type, like);
      rows.push_back(rows.back() + w.size(0));
      columns.push_back(columns.back() + w.size(1));
    }
  }
  size_t count() const { return weights.size(); }
  int64_t k() const { return rows.back(); }
  int64_t d() const { return columns.back(); }
};

// Rows [first, first + rows) of a tensor, as a pointer with strides.
template <class T>
struct Rows {
  const T* data;
  int64_t rows, row_stride, col_stride;

  View<T> part(int64_t begin, int64_t end) const {
    return view_of<T>(data + begin * col_stride, rows, end - begin, row_stride, col_stride);
  }
};
template <class T>
Rows<T> rows_of(const Tensor& t, int64_t first, int64_t last) {
  return {static_cast<const T*>(t.const_data_ptr()) + first * t.stride(0), last - first, t.stride(0), t.stride(1)};
}

// Sums that a product is added to, with rows of `row`: those of the blocks side by side.
template <class Sum>
struct Added {
  const Sum* data = nullptr;
  int64_t row = 0;
};

// One block whose numbers are all of one type is PyTorch's library's to multiply.
template <class A, class T, class Sum, class Out>
bool library_multiplies(const Blocks& blocks) {
  return std::is_same_v<A, T> && std::is_same_v<Sum, T> && std::is_same_v<Out, T> && blocks.count() == 1 &&
         blocks.k() > 0 && blocks.d() > 0 && has_library();
}
template <class T>
Tensor tensor_of(const Rows<T>& rows, int64_t cols, const Tensor& like) {
  return tensor_over(rows.data, rows.rows, cols, rows.row_stride, rows.col_stride, like.scalar_type(), like);
}
// out = a b, + add.
template <class Sum>
void multiply_by_library(const Tensor& a, const Tensor& b, Added<Sum> add, Sum* to, const Tensor& like) {
  const int64_t rows = a.size(0), cols = b.size(1);
  Tensor out = tensor_over(to, rows, cols, cols, 1, like.scalar_type(), like);
  if (add.data)
    library_product(a, b, tensor_over(add.data, rows, cols, add.row, 1, like.scalar_type(), like), out);
  else
    library_product(a, b, out);
}

// out [rows, of all blocks] = the columns of each block times its weights, + add. kForward: with W^T, from D columns to
// K; else with W, from K to D.
template <class Engine, bool kForward, class T, class A, class Out>
void multiply_blocks(const Blocks& blocks, const Rows<A>& from, Added<typename Engine::Sum> add, Out* out,
                     cudaStream_t stream, const char* what) {
  if constexpr (std::is_same_v<typename Engine::Sum, Out> && std::is_same_v<A, Out> && std::is_same_v<T, Out>) {
    if (library_multiplies<A, T, typename Engine::Sum, Out>(blocks) && from.rows > 0) {
      const Tensor& w = blocks.weights[0];
      return multiply_by_library(tensor_of(from, kForward ? blocks.d() : blocks.k(), w), kForward ? turned(w) : w, add,
                                 out, w);
    }
  }
  const std::vector<int64_t>& in_at = kForward ? blocks.columns : blocks.rows;
  const std::vector<int64_t>& out_at = kForward ? blocks.rows : blocks.columns;
  std::vector<BlockJob<A, T, typename Engine::Sum, Out>> jobs;
  for (size_t b = 0; b < blocks.count(); ++b)
    jobs.push_back({from.part(in_at[b], in_at[b + 1]), view<T>(blocks.weights[b]),
                    add.data ? add.data + out_at[b] : nullptr, add.row, 1, out + out_at[b], out_at.back()});
  check_launch(block_products<Engine, false, !kForward>(jobs, 1, 0, stream), what);
}

// Of each block, from `sums` on: the gradient [C_b, F_b] = g^T x of its columns, in slices of the rows.
template <class Engine, class T, class G>
void multiply_gradients(const Blocks& blocks, const Rows<G>& g, const Rows<T>& x, typename Engine::Sum* sums,
                        bool accumulate, int64_t slices, int64_t to_next, cudaStream_t stream, const char* what) {
  using Sum = typename Engine::Sum;
  if constexpr (std::is_same_v<G, T> && std::is_same_v<Sum, T>) {
    if (slices == 1 && library_multiplies<G, T, Sum, Sum>(blocks) && g.rows > 0) {
      const Tensor& w = blocks.weights[0];
      const Added<Sum> add{accumulate ? sums : nullptr, blocks.d()};
      return multiply_by_library(turned(tensor_of(g, blocks.k(), w)), tensor_of(x, blocks.d(), w), add, sums, w);
    }
  }
  std::vector<BlockJob<G, T, Sum, Sum>> jobs;
  for (size_t b = 0; b < blocks.count(); ++b) {
    const int64_t width = blocks.columns[b + 1] - blocks.columns[b];
    jobs.push_back({g.part(blocks.rows[b], blocks.rows[b + 1]), x.part(blocks.columns[b], blocks.columns[b + 1]),
                    accumulate ? sums : nullptr, width, 1, sums, width});
    sums += (blocks.rows[b + 1] - blocks.rows[b]) * width;
  }
  check_launch(block_products<Engine, true, true>(jobs, static_cast<int>(slices), to_next, stream), what);
}

}  // namespace mtl::cuda
