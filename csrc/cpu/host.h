// What the host code of the ops shares: views of tensors, new tensors, packed weights, the size of a thread's work.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
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

// A contiguous CPU tensor. Through the C function itself: by way of the dispatcher, which the C++ wrapper takes, each
// costs two microseconds more.
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) {
  int64_t strides[2] = {1, 1};
  if (sizes.size() == 2) strides[0] = std::max<int64_t>(1, sizes[1]);
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides,
                                                         type, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes) { return empty(sizes, like.scalar_type()); }

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
