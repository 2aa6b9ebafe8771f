// Many matrices of the same rows side by side in one: the gradients of the heads, as autograd hands them over.
#pragma once

#include "tiles.cuh"

namespace mtl::cuda {

// As many as fit the parameters of a launch.
constexpr int kMatrices = 64;
template <class T>
struct Matrices {
  struct One {
    const T* data;
    int64_t row_stride, col_stride, begin, width;
  };
  One one[kMatrices];
};

// A thread an element; blockIdx.y: the matrix.
template <class T>
__global__ void __launch_bounds__(kThreads)
    copy_columns_kernel(Matrices<T> matrices, int64_t rows, T* out, int64_t out_row) {
  const typename Matrices<T>::One& m = matrices.one[blockIdx.y];
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < rows * m.width; i += step) {
    const int64_t r = i / m.width, c = i % m.width;
    out[r * out_row + m.begin + c] = m.data[r * m.row_stride + c * m.col_stride];
  }
}

}  // namespace mtl::cuda
