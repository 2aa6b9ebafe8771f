// The gradients of several heads, read as the columns of one matrix without making it: a tile at a time is gathered.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace mtl {

class Columns {
 public:
  Columns(DType type, std::vector<Matrix> parts) : type_(type), parts_(std::move(parts)) {
    for (const Matrix& part : parts_) {
      begins_.push_back(cols_);
      cols_ += part.cols;
    }
  }
  int64_t cols() const { return cols_; }
  int64_t rows() const { return parts_.empty() ? 0 : parts_[0].rows; }
  // Whether there is one matrix already: tile() then gives a part of it, and needs no scratch.
  bool whole() const { return parts_.size() == 1; }
  int64_t scratch_bytes(int64_t rows, int64_t cols) const { return whole() ? 0 : rows * cols * element_bytes(type_); }

  Matrix tile(int64_t r0, int64_t r1, int64_t c0, int64_t c1, void* scratch) const {
    if (whole()) return parts_[0].part(type_, r0, r1, c0, c1);
    switch (element_bytes(type_)) {
      case 8:
        gather<uint64_t>(r0, r1, c0, c1, static_cast<uint64_t*>(scratch));
        break;
      case 4:
        gather<uint32_t>(r0, r1, c0, c1, static_cast<uint32_t*>(scratch));
        break;
      default:
        gather<uint16_t>(r0, r1, c0, c1, static_cast<uint16_t*>(scratch));
    }
    return {scratch, r1 - r0, c1 - c0, c1 - c0, 1};
  }

 private:
  // Some rows of one head after the other: its values are read in order, and the rows written stay in the cache.
  template <class T>
  void gather(int64_t r0, int64_t r1, int64_t c0, int64_t c1, T* out) const {
    constexpr int64_t kRows = 64;
    const size_t first = std::upper_bound(begins_.begin(), begins_.end(), c0) - begins_.begin() - 1;
    for (int64_t r = r0; r < r1; r += kRows)
      for (size_t i = first; i < parts_.size() && begins_[i] < c1; ++i) {
        const Matrix& part = parts_[i];
        const int64_t from = std::max(c0 - begins_[i], int64_t(0)), to = std::min(c1 - begins_[i], part.cols);
        const T* source = static_cast<const T*>(part.data) + r * part.row_stride + from * part.col_stride;
        T* target = out + (r - r0) * (c1 - c0) + begins_[i] + from - c0;
        const int64_t rows = std::min(kRows, r1 - r), width = to - from;
        if (part.col_stride != 1 && width > 1) {
          for (int64_t row = 0; row < rows; ++row)
            for (int64_t c = 0; c < width; ++c)
              target[row * (c1 - c0) + c] = source[row * part.row_stride + c * part.col_stride];
        } else if (width == 1) {
          copy_rows<1>(rows, source, part.row_stride, target, c1 - c0);
        } else if (width == 2) {
          copy_rows<2>(rows, source, part.row_stride, target, c1 - c0);
        } else if (width == 3) {
          copy_rows<3>(rows, source, part.row_stride, target, c1 - c0);
        } else if (width == 4) {
          copy_rows<4>(rows, source, part.row_stride, target, c1 - c0);
        } else {
          for (int64_t row = 0; row < rows; ++row)
            std::memcpy(target + row * (c1 - c0), source + row * part.row_stride, width * sizeof(T));
        }
      }
  }
  // Most heads are narrow: a copy of known size is one or two instructions.
  template <int kWidth, class T>
  static void copy_rows(int64_t rows, const T* source, int64_t source_stride, T* target, int64_t target_stride) {
    for (int64_t row = 0; row < rows; ++row, source += source_stride, target += target_stride)
      std::memcpy(target, source, kWidth * sizeof(T));
  }

  DType type_;
  std::vector<Matrix> parts_;
  std::vector<int64_t> begins_;
  int64_t cols_ = 0;
};

}  // namespace mtl
