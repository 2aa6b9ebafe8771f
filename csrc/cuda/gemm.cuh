// Products of matrices in global memory, by tiles in shared memory, double-buffered; and sums of columns.
//
//   C = A B + bias, C [M, N] row by row, A and B as `Product` has them. The depth can be cut into slices whose parts of
//   C lie behind each other: `sum_parts` (sums.cuh) adds them in order.
//
// An element of C is one chain over the depth whatever tile it is in: it does not depend on what lies beside it.
#pragma once

#include "sums.cuh"

namespace mtl::cuda {

constexpr int kChunk = 32;  // of the depth, in shared memory at a time

template <class Element, class Out>
struct GemmJob {
  View<Element> a, b;  // as they lie: transposed operands have the depth as rows
  const Element* bias;
  int64_t bias_stride;
  Out* out;
  int64_t m, n, depth;
};

template <class Engine, class Out, int M, int N, bool kTransposedA, bool kTransposedB>
struct GemmShape {
  using Element = typename Engine::Element;
  static constexpr int kARows = kTransposedA ? kChunk : M, kAColumns = kTransposedA ? M : kChunk;
  static constexpr int kBRows = kTransposedB ? kChunk : N, kBColumns = kTransposedB ? N : kChunk;
  static constexpr int kARow = row_of<Element>(kAColumns), kBRow = row_of<Element>(kBColumns);
  static constexpr int kA = kARows * kARow, kB = kBRows * kBRow;  // elements of a stage
  static constexpr int kOutRow = row_of<Out>(N);
  static constexpr size_t kStages = 2 * (kA + kB) * sizeof(Element), kResult = M * kOutRow * sizeof(Out);
  static constexpr size_t kShared = kStages > kResult ? kStages : kResult;
};

template <class Engine, class Out, int M, int N, bool kTransposedA, bool kTransposedB>
__global__ void __launch_bounds__(kThreads, 1) gemm_kernel(GemmJob<typename Engine::Element, Out> job) {
  using Element = typename Engine::Element;
  using Shape = GemmShape<Engine, Out, M, N, kTransposedA, kTransposedB>;
  MTL_DYNAMIC_SHARED(Element, memory);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * M, column = static_cast<int64_t>(blockIdx.y) * N;
  const int64_t slices = gridDim.z, slice = blockIdx.z, chunks = (job.depth + kChunk - 1) / kChunk;
  const int64_t first = chunks * slice / slices, last = chunks * (slice + 1) / slices;
  const auto load = [&](int64_t chunk) {
    Element* const a = memory + (chunk - first) % 2 * (Shape::kA + Shape::kB);
    Element* const b = a + Shape::kA;
    const int64_t k = chunk * kChunk;
    load_tile(a, Shape::kARow, job.a, kTransposedA ? k : row, Shape::kARows, kTransposedA ? row : k, Shape::kAColumns);
    load_tile(b, Shape::kBRow, job.b, kTransposedB ? k : column, Shape::kBRows, kTransposedB ? column : k,
              Shape::kBColumns);
  };
  Product<Engine, M, N, kTransposedA, kTransposedB> product;
  product.clear();
  each_chunk(first, last, load, [&](int64_t chunk) {
    const Element* a = memory + (chunk - first) % 2 * (Shape::kA + Shape::kB);
    product.add(a, Shape::kARow, a + Shape::kA, Shape::kBRow, kChunk);
  });
  // Through shared memory, so that rows are written in pieces of 16 bytes.
  Out* const result = reinterpret_cast<Out*>(memory);
  product.each([&](int r, int c, auto v) {
    const int64_t at = column + c;
    if (job.bias && at < job.n) v += converted<decltype(v)>(job.bias[at * job.bias_stride]);
    result[r * Shape::kOutRow + c] = converted<Out>(v);
  });
  __syncthreads();
  Out* const out = job.out + slice * job.m * job.n;
  store_tile(result, Shape::kOutRow, out, job.n, row, job.m - row < M ? static_cast<int>(job.m - row) : M, column,
             job.n - column < N ? static_cast<int>(job.n - column) : N);
}

template <class Engine, class Out, int M, int N, bool kTransposedA, bool kTransposedB>
cudaError_t launch_gemm(const GemmJob<typename Engine::Element, Out>& job, int64_t slices, cudaStream_t stream) {
  using Shape = GemmShape<Engine, Out, M, N, kTransposedA, kTransposedB>;
  const auto kernel = gemm_kernel<Engine, Out, M, N, kTransposedA, kTransposedB>;
  const cudaError_t allowed = allow_shared(kernel, Shape::kShared);
  if (allowed != cudaSuccess) return allowed;
  const int64_t rows = (job.m + M - 1) / M, columns = (job.n + N - 1) / N;
  if (rows > INT32_MAX || columns > 65535 || slices > 65535) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(rows), static_cast<unsigned>(columns), static_cast<unsigned>(slices));
  return launch(kernel, grid, dim3(kThreads), Shape::kShared, stream, job);
}

// float64 has no tensor cores here, and its tiles are smaller; narrow matrices take narrow tiles.
template <class Engine, class Out, bool kTransposedA, bool kTransposedB>
cudaError_t gemm(const GemmJob<typename Engine::Element, Out>& job, int64_t slices, cudaStream_t stream) {
  if (job.m == 0 || job.n == 0) return cudaSuccess;
  if constexpr (sizeof(typename Engine::Sum) == 8)
    return launch_gemm<Engine, Out, 64, 64, kTransposedA, kTransposedB>(job, slices, stream);
  else if (kTransposedA && job.m <= 32)
    return launch_gemm<Engine, Out, kTransposedA ? 32 : 128, 128, kTransposedA, kTransposedB>(job, slices, stream);
  else if (!kTransposedA && job.n <= 32)
    return launch_gemm<Engine, Out, 128, kTransposedA ? 128 : 32, kTransposedA, kTransposedB>(job, slices, stream);
  else
    return launch_gemm<Engine, Out, 128, 128, kTransposedA, kTransposedB>(job, slices, stream);
}

// Slices of a sum over many rows, each of at least 256: enough blocks for a device, by the shape alone.
inline int64_t row_slices(int64_t rows, int64_t m, int64_t n) {
  constexpr int64_t kBlocks = 256;
  const int64_t tiles = ((m + 127) / 128) * ((n + 127) / 128);
  const int64_t wished = kBlocks / (tiles > 0 ? tiles : 1), most = rows / 256;
  return wished < most ? (wished < 1 ? 1 : wished) : (most < 1 ? 1 : most);
}

// parts[slice, c] = sum of column c over a slice of the rows: 32 columns a block, 8 rows at a time.
template <class T, class Sum>
__global__ void __launch_bounds__(kThreads) column_sums_kernel(View<T> m, Sum* parts) {
  __shared__ Sum sums[kWarps][33];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + lane, slice = blockIdx.y, slices = gridDim.y;
  const int64_t first = m.rows * slice / slices, last = m.rows * (slice + 1) / slices;
  Sum sum = Sum(0);
  if (column < m.cols)
    for (int64_t r = first + warp; r < last; r += kWarps)
      sum += converted<Sum>(m.data[r * m.row_stride + column * m.col_stride]);
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= m.cols) return;
  for (int w = 1; w < kWarps; ++w) sum += sums[w][lane];
  parts[slice * m.cols + column] = sum;
}
template <class T, class Sum>
cudaError_t column_sums(const View<T>& m, int64_t slices, Sum* parts, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((m.cols + 31) / 32), static_cast<unsigned>(slices));
  return launch(column_sums_kernel<T, Sum>, grid, dim3(kThreads), 0, stream, m, parts);
}

}  // namespace mtl::cuda
