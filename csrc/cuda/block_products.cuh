// Products of blocks of columns with weights of their own, in one launch for many blocks:
//
//   C_b = A_b B_b + add_b
//
// A, B and C may have other types than the engine multiplies: sums of neighbours, for instance, meet weights of 16 bits
// in tf32, which holds those exactly, and rounds the sums no further than their own type would, without its range.
#pragma once

#include <algorithm>
#include <vector>

#include "gemm.cuh"

namespace mtl::cuda {

template <class A, class B, class Sum, class Out>
struct BlockJob {
  View<A> a;  // as they lie: transposed operands have the depth as rows
  View<B> b;
  const Sum* add;  // or null; may be `out` itself
  int64_t add_row, add_col;
  Out* out;
  int64_t out_row;
};
// As many as fit the parameters of a launch.
constexpr int kBlockJobs = 28;
template <class A, class B, class Sum, class Out>
struct BlockJobs {
  BlockJob<A, B, Sum, Out> one[kBlockJobs];
  int slices;       // of the depth
  int64_t to_next;  // from a slice's `out` and `add` to those of the next one
};

// As load_tile, which converts numbers one by one: eight at once where they are aligned.
template <class Element, class T>
__device__ void load_converted(Element* tile, int tile_row, const View<T>& m, int64_t row, int rows, int64_t column,
                               int columns) {
  if constexpr (sizeof(T) == 2 && sizeof(Element) == 4) {
    if (m.aligned) {
      struct alignas(16) Eight {
        T v[8];
      };
      const int pieces = columns / 8;
      for (int i = static_cast<int>(threadIdx.x); i < rows * pieces; i += kThreads) {
        const int r = i / pieces, c = i % pieces * 8;
        Eight from{};
        if (row + r < m.rows && column + c < m.cols)
          from = *reinterpret_cast<const Eight*>(m.data + (row + r) * m.row_stride + column + c);
        Four<Element>* const to = reinterpret_cast<Four<Element>*>(tile + r * tile_row + c);
        to[0] = {{to_float(from.v[0]), to_float(from.v[1]), to_float(from.v[2]), to_float(from.v[3])}};
        to[1] = {{to_float(from.v[4]), to_float(from.v[5]), to_float(from.v[6]), to_float(from.v[7])}};
      }
      return;
    }
  }
  load_tile(tile, tile_row, m, row, rows, column, columns);
}

// blockIdx.x, y: tiles of rows and columns, as many as the largest block has; z: blocks, and slices of the depth.
template <class Engine, class A, class B, class Out, int M, int N, bool kTransposedA, bool kTransposedB>
__global__ void __launch_bounds__(kThreads, 1) block_products_kernel(BlockJobs<A, B, typename Engine::Sum, Out> jobs) {
  using Element = typename Engine::Element;
  using Shape = GemmShape<Engine, Out, M, N, kTransposedA, kTransposedB>;
  MTL_DYNAMIC_SHARED(Element, memory);
  const auto& job = jobs.one[blockIdx.z / static_cast<unsigned>(jobs.slices)];
  const int64_t slices = jobs.slices, slice = blockIdx.z % static_cast<unsigned>(jobs.slices);
  const int64_t m = kTransposedA ? job.a.cols : job.a.rows, n = kTransposedB ? job.b.cols : job.b.rows;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * M, column = static_cast<int64_t>(blockIdx.y) * N;
  if (row >= m || column >= n) return;
  const int64_t chunks = ((kTransposedA ? job.a.rows : job.a.cols) + kChunk - 1) / kChunk;
  const int64_t first = chunks * slice / slices, last = chunks * (slice + 1) / slices;
  const auto load = [&](int64_t chunk) {
    Element* const a = memory + (chunk - first) % 2 * (Shape::kA + Shape::kB);
    Element* const b = a + Shape::kA;
    const int64_t k = chunk * kChunk;
    load_converted(a, Shape::kARow, job.a, kTransposedA ? k : row, Shape::kARows, kTransposedA ? row : k,
                   Shape::kAColumns);
    load_converted(b, Shape::kBRow, job.b, kTransposedB ? k : column, Shape::kBRows, kTransposedB ? column : k,
                   Shape::kBColumns);
  };
  Product<Engine, M, N, kTransposedA, kTransposedB> product;
  product.clear();
  each_chunk(first, last, load, [&](int64_t chunk) {
    const Element* a = memory + (chunk - first) % 2 * (Shape::kA + Shape::kB);
    product.add(a, Shape::kARow, a + Shape::kA, Shape::kBRow, kChunk);
  });
  Out* const result = reinterpret_cast<Out*>(memory);
  const auto* const add = job.add ? job.add + slice * jobs.to_next : nullptr;
  product.each([&](int r, int c, auto v) {
    if (add && row + r < m && column + c < n) v += add[(row + r) * job.add_row + (column + c) * job.add_col];
    result[r * Shape::kOutRow + c] = converted<Out>(v);
  });
  __syncthreads();
  store_tile(result, Shape::kOutRow, job.out + slice * jobs.to_next, job.out_row, row,
             m - row < M ? static_cast<int>(m - row) : M, column, n - column < N ? static_cast<int>(n - column) : N);
}

template <class Engine, class A, class B, class Out, int M, int N, bool kTransposedA, bool kTransposedB>
cudaError_t launch_block_products(const std::vector<BlockJob<A, B, typename Engine::Sum, Out>>& all, int slices,
                                  int64_t to_next, int64_t rows, int64_t columns, cudaStream_t stream) {
  using Shape = GemmShape<Engine, Out, M, N, kTransposedA, kTransposedB>;
  const auto kernel = block_products_kernel<Engine, A, B, Out, M, N, kTransposedA, kTransposedB>;
  const cudaError_t allowed = allow_shared(kernel, Shape::kShared);
  if (allowed != cudaSuccess) return allowed;
  const int64_t high = (rows + M - 1) / M, wide = (columns + N - 1) / N;
  if (high > INT32_MAX || wide > 65535 || slices * kBlockJobs > 65535) return cudaErrorInvalidConfiguration;
  for (size_t begin = 0; begin < all.size(); begin += kBlockJobs) {
    BlockJobs<A, B, typename Engine::Sum, Out> jobs{};
    jobs.slices = slices;
    jobs.to_next = to_next;
    unsigned count = 0;
    for (; count < kBlockJobs && begin + count < all.size(); ++count) jobs.one[count] = all[begin + count];
    const dim3 grid(static_cast<unsigned>(high), static_cast<unsigned>(wide), count * static_cast<unsigned>(slices));
    const cudaError_t error = launch(kernel, grid, dim3(kThreads), Shape::kShared, stream, jobs);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// As gemm, for many. An element of C is one chain over its slice of the depth.
template <class Engine, bool kTransposedA, bool kTransposedB, class A, class B, class Out>
cudaError_t block_products(const std::vector<BlockJob<A, B, typename Engine::Sum, Out>>& all, int slices,
                           int64_t to_next, cudaStream_t stream) {
  int64_t m = 0, n = 0;
  for (const auto& job : all) {
    m = std::max(m, kTransposedA ? job.a.cols : job.a.rows);
    n = std::max(n, kTransposedB ? job.b.cols : job.b.rows);
  }
  if (m == 0 || n == 0) return cudaSuccess;
  constexpr bool kA = kTransposedA, kB = kTransposedB;
  if constexpr (sizeof(typename Engine::Sum) == 8)
    return launch_block_products<Engine, A, B, Out, 64, 64, kA, kB>(all, slices, to_next, m, n, stream);
  else if (kA && m <= 32)
    return launch_block_products<Engine, A, B, Out, kA ? 32 : 128, 128, kA, kB>(all, slices, to_next, m, n, stream);
  else if (!kA && n <= 32)
    return launch_block_products<Engine, A, B, Out, 128, kA ? 128 : 32, kA, kB>(all, slices, to_next, m, n, stream);
  else
    return launch_block_products<Engine, A, B, Out, 128, 128, kA, kB>(all, slices, to_next, m, n, stream);
}

// A vector in the type of sums.
template <class T, class Sum>
__global__ void __launch_bounds__(kThreads) widen_kernel(const T* from, int64_t stride, int64_t count, Sum* to) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) to[i] = converted<Sum>(from[i * stride]);
}

}  // namespace mtl::cuda
