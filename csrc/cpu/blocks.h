// Blocks of columns, each with weights of its own, in the type that sums are kept in.
#pragma once

#include <vector>

#include "../common/checks.h"
#include "buffer.h"
#include "host.h"

namespace mtl {

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

}  // namespace mtl
