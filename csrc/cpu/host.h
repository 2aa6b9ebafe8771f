// What the host code of the ops shares: views of tensors, new tensors, packed weights, the size of a thread's work.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../common/checks.h"
#include "buffer.h"
#include "kernels.h"

namespace mtl {

// Multiply-adds that pay for waking a thread (about 10 microseconds of work).
constexpr int64_t kThreadWork = 1 << 19;
inline int64_t grain(int64_t work_per_item) {
  return std::max<int64_t>(1, kThreadWork / std::max<int64_t>(1, work_per_item));
}

inline Matrix matrix(const Tensor& t) { return {t.const_data_ptr(), t.size(0), t.size(1), t.stride(0), t.stride(1)}; }
inline Matrix transposed(const Matrix& m) { return {m.data, m.cols, m.rows, m.col_stride, m.row_stride}; }

inline Tensor empty(const Tensor& like, std::vector<int64_t> sizes, std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), dtype);
}

// B as panels for a product A * B.
inline Buffer pack(const Kernels& k, DType type, const Matrix& b) {
  Buffer panels = make_buffer(k.panels_bytes(type, b.rows, b.cols));
  const int64_t count = k.panel_count(type, b.cols);
  const int64_t work = b.rows * b.cols / std::max<int64_t>(1, count);
  torch::stable::parallel_for(0, count, grain(4 * work),
                              [&](int64_t begin, int64_t end) { k.pack_panels(type, b, begin, end, panels.get()); });
  return panels;
}

// Calls f with a zero of the type that sums are kept in.
template <class F>
void with_accumulator(DType type, F f) {
  if (type == DType::kFloat64)
    f(0.0);
  else
    f(0.0f);
}

}  // namespace mtl
