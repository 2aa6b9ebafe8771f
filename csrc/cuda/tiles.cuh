// Tiles of matrices on their way from global to shared memory.
#pragma once

#include "products.cuh"

namespace mtl::cuda {

// A matrix in global memory: element (r, c) at data + r * row_stride + c * col_stride.
template <class T>
struct View {
  const T* data;
  int64_t rows, cols, row_stride, col_stride;
  bool aligned;  // rows lie at multiples of 16 bytes, and have whole 16-byte pieces
};

template <class T>
View<T> view_of(const void* data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) {
  constexpr int64_t kPiece = 16 / static_cast<int64_t>(sizeof(T));
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && (col_stride == 1 || cols <= 1) &&
                       cols % kPiece == 0 && (row_stride % kPiece == 0 || rows <= 1);
  return {static_cast<const T*>(data), rows, cols, row_stride, col_stride, aligned};
}

template <class To, class From>
__device__ To converted(From v) {
  if constexpr (sizeof(To) == 8 || sizeof(From) == 8)
    return static_cast<To>(v);
  else
    return from_float<To>(to_float(v));
}

// Columns [column, column + columns) of `rows` rows from `row` on; what lies outside of the matrix is zero. Copies are
// asynchronous where the types are the same and all is aligned: to be waited for (cp_async_wait) and met at a barrier.
// By a block, or by `threads` threads of which this one is `thread`.
template <int kUnroll = 4, class Element, class T>
__device__ void load_tile(Element* tile, int tile_row, const View<T>& m, int64_t row, int rows, int64_t column,
                          int columns, int thread = static_cast<int>(threadIdx.x), int threads = kThreads) {
  if constexpr (sizeof(Element) == sizeof(T)) {
    if (m.aligned) {
      constexpr int kPiece = 16 / static_cast<int>(sizeof(T));
      const int pieces = columns / kPiece;
#pragma unroll kUnroll
      for (int i = thread; i < rows * pieces; i += threads) {
        const int r = i / pieces, c = i % pieces * kPiece;
        const bool there = row + r < m.rows && column + c < m.cols;
        const T* from = there ? m.data + (row + r) * m.row_stride + column + c : m.data;
        cp_async_16(tile + r * tile_row + c, from, there);
      }
      return;
    }
  }
#pragma unroll 1  // the rare case: it shall cost the others no registers
  for (int i = thread; i < rows * columns; i += threads) {
    // Neighbouring threads read neighbouring numbers.
    const bool along_rows = m.col_stride <= m.row_stride;
    const int r = along_rows ? i / columns : i % rows, c = along_rows ? i % columns : i / rows;
    const bool there = row + r < m.rows && column + c < m.cols;
    tile[r * tile_row + c] =
        there ? converted<Element>(m.data[(row + r) * m.row_stride + (column + c) * m.col_stride]) : Element{};
  }
}

// load(chunk), then use(chunk), for all chunks from `first` to before `last`: each is on its way while the one before
// is used. Chunks lie in two places by turns, and nobody reads them any more when this returns.
template <class Index, class Load, class Use>
__device__ void each_chunk(Index first, Index last, Load load, Use use) {
  if (first < last) {
    load(first);
    cp_async_commit();
  }
  for (Index chunk = first; chunk < last; ++chunk) {
    if (chunk + 1 < last) {
      load(chunk + 1);
      cp_async_commit();
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    use(chunk);
    __syncthreads();  // the next but one chunk comes where this one lies
  }
}

// The tile's first `rows` rows and `columns` columns to a matrix with rows of `out_row`, in pieces of 16 bytes where
// those are aligned: by a block, or by `threads` threads of which this one is `thread`.
template <class T>
__device__ void store_tile(const T* tile, int tile_row, T* out, int64_t out_row, int64_t row, int rows, int64_t column,
                           int columns, int thread = static_cast<int>(threadIdx.x), int threads = kThreads) {
  constexpr int kPiece = 16 / static_cast<int>(sizeof(T));
  T* const to = out + row * out_row + column;
  if (reinterpret_cast<uintptr_t>(to) % 16 == 0 && out_row % kPiece == 0 && columns % kPiece == 0) {
    struct alignas(16) Piece {
      T v[kPiece];
    };
    const int pieces = columns / kPiece;
    for (int i = thread; i < rows * pieces; i += threads) {
      const int r = i / pieces, c = i % pieces * kPiece;
      *reinterpret_cast<Piece*>(to + r * out_row + c) = *reinterpret_cast<const Piece*>(tile + r * tile_row + c);
    }
    return;
  }
  for (int i = thread; i < rows * columns; i += threads) {
    const int r = i / columns, c = i % columns;
    to[r * out_row + c] = tile[r * tile_row + c];
  }
}

}  // namespace mtl::cuda
