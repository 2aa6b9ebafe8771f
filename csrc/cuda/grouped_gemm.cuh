// Many products of different sizes in one launch, and the sums of their parts. They are the products of gemm.cuh, whose
// elements are one chain over the depth, so that a value does not depend on how many there are.
#pragma once

#include "gemm.cuh"

namespace mtl::cuda {

// C = A B + bias: out, or with several slices of the depth their parts behind each other.
template <class T, class Sum>
struct GroupedJob {
  View<T> a, b;
  const T* bias;
  int64_t bias_stride;
  T* out;
  Sum* parts;
  int64_t m, n, depth;
  int slices, first_block;
};

// As many as fit the parameters of a launch.
constexpr int kJobs = 24;
template <class Job>
struct Jobs {
  Job one[kJobs];
  int count;
};
template <class Job>
__device__ int job_of_block(const Jobs<Job>& jobs) {
  int j = 0;
  while (j + 1 < jobs.count && jobs.one[j + 1].first_block <= static_cast<int>(blockIdx.x)) ++j;
  return j;
}

template <class Engine, int M, int N, bool kTransposedA, bool kTransposedB>
__global__ void __launch_bounds__(kThreads, 1)
    grouped_gemm_kernel(Jobs<GroupedJob<typename Engine::Element, typename Engine::Sum>> jobs) {
  using Element = typename Engine::Element;
  using Sum = typename Engine::Sum;
  using Shape = GemmShape<Engine, Sum, M, N, kTransposedA, kTransposedB>;
  MTL_DYNAMIC_SHARED(Element, memory);
  const GroupedJob<Element, Sum>& job = jobs.one[job_of_block(jobs)];
  const int64_t row_tiles = (job.m + M - 1) / M, column_tiles = (job.n + N - 1) / N;
  const int64_t block = static_cast<int>(blockIdx.x) - job.first_block, slice = block / (row_tiles * column_tiles);
  const int64_t row = block / column_tiles % row_tiles * M, column = block % column_tiles * N;
  const int64_t chunks = (job.depth + kChunk - 1) / kChunk;
  const int64_t first = chunks * slice / job.slices, last = chunks * (slice + 1) / job.slices;
  const View<Element> left = job.a, right = job.b;
  const auto load = [&](int64_t chunk) {
    Element* const a = memory + (chunk - first) % 2 * (Shape::kA + Shape::kB);
    const int64_t k = chunk * kChunk;
    load_tile(a, Shape::kARow, left, kTransposedA ? k : row, Shape::kARows, kTransposedA ? row : k, Shape::kAColumns);
    load_tile(a + Shape::kA, Shape::kBRow, right, kTransposedB ? k : column, Shape::kBRows, kTransposedB ? column : k,
              Shape::kBColumns);
  };
  Product<Engine, M, N, kTransposedA, kTransposedB> product;
  product.clear();
  each_chunk(first, last, load, [&](int64_t chunk) {
    const Element* a = memory + (chunk - first) % 2 * (Shape::kA + Shape::kB);
    product.add(a, Shape::kARow, a + Shape::kA, Shape::kBRow, kChunk);
  });
  const int rows = job.m - row < M ? static_cast<int>(job.m - row) : M;
  const int columns = job.n - column < N ? static_cast<int>(job.n - column) : N;
  if (job.parts) {
    Sum* const result = reinterpret_cast<Sum*>(memory);
    product.each([&](int r, int c, Sum v) { result[r * Shape::kOutRow + c] = v; });
    __syncthreads();
    store_tile(result, Shape::kOutRow, job.parts + slice * job.m * job.n, job.n, row, rows, column, columns);
    return;
  }
  constexpr int kRow = row_of<Element>(N);
  product.each([&](int r, int c, Sum v) {
    const int64_t at = column + c;
    if (job.bias && at < job.n) v += converted<Sum>(job.bias[at * job.bias_stride]);
    memory[r * kRow + c] = converted<Element>(v);
  });
  __syncthreads();
  store_tile(memory, kRow, job.out, job.n, row, rows, column, columns);
}

// out[i] = the sum of parts[i], parts[size + i], ... in order.
template <class T, class Sum>
struct SumJob {
  const Sum* parts;
  T* out;
  int64_t size;
  int count, first_block;
};
template <class T, class Sum>
__global__ void __launch_bounds__(kThreads) grouped_sum_kernel(Jobs<SumJob<T, Sum>> jobs) {
  const SumJob<T, Sum>& job = jobs.one[job_of_block(jobs)];
  const int64_t i = static_cast<int64_t>(static_cast<int>(blockIdx.x) - job.first_block) * kThreads + threadIdx.x;
  if (i >= job.size) return;
  Sum sum = Sum(0);
  for (int p = 0; p < job.count; ++p) sum += job.parts[p * job.size + i];
  job.out[i] = converted<T>(sum);
}

// The sums of columns over the rows of each group: 32 columns and a slice of the rows a block, 8 rows at a time.
template <class T, class Sum>
struct ColumnJob {
  View<T> m;
  Sum* parts;  // [slices, columns]
  int slices, first_block;
};
template <class T, class Sum>
__global__ void __launch_bounds__(kThreads) grouped_columns_kernel(Jobs<ColumnJob<T, Sum>> jobs) {
  __shared__ Sum sums[kWarps][33];
  const ColumnJob<T, Sum>& job = jobs.one[job_of_block(jobs)];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t block = static_cast<int>(blockIdx.x) - job.first_block, slice = block % job.slices;
  const int64_t column = block / job.slices * 32 + lane;
  const int64_t first = job.m.rows * slice / job.slices, last = job.m.rows * (slice + 1) / job.slices;
  Sum sum = Sum(0);
  if (column < job.m.cols)
    for (int64_t r = first + warp; r < last; r += kWarps)
      sum += converted<Sum>(job.m.data[r * job.m.row_stride + column * job.m.col_stride]);
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= job.m.cols) return;
  for (int w = 1; w < kWarps; ++w) sum += sums[w][lane];
  job.parts[slice * job.m.cols + column] = sum;
}

// Jobs gathered until a launch is full: blocks_of(job) tells how many blocks one has.
template <class Job>
class JobList {
 public:
  explicit JobList(void (*kernel)(Jobs<Job>), size_t shared, cudaStream_t stream)
      : kernel_(kernel), shared_(shared), stream_(stream) {}
  cudaError_t add(Job job, int64_t blocks) {
    if (blocks == 0) return cudaSuccess;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    if (jobs_.count == kJobs || blocks_ > INT32_MAX - blocks) {
      const cudaError_t error = flush();
      if (error != cudaSuccess) return error;
    }
    job.first_block = static_cast<int>(blocks_);
    jobs_.one[jobs_.count++] = job;
    blocks_ += blocks;
    return cudaSuccess;
  }
  cudaError_t flush() {
    if (blocks_ == 0) return cudaSuccess;
    const cudaError_t error =
        launch(kernel_, dim3(static_cast<unsigned>(blocks_)), dim3(kThreads), shared_, stream_, jobs_);
    jobs_.count = 0;
    blocks_ = 0;
    return error;
  }

 private:
  void (*kernel_)(Jobs<Job>);
  size_t shared_;
  cudaStream_t stream_;
  Jobs<Job> jobs_{};
  int64_t blocks_ = 0;
};

// All products: jobs of any sizes, which share a shape of tiles.
template <class Engine, int M, int N, bool kTransposedA, bool kTransposedB, class List>
cudaError_t launch_grouped(const List& jobs, cudaStream_t stream) {
  using Shape = GemmShape<Engine, typename Engine::Sum, M, N, kTransposedA, kTransposedB>;
  using Job = GroupedJob<typename Engine::Element, typename Engine::Sum>;
  void (*const kernel)(Jobs<Job>) = grouped_gemm_kernel<Engine, M, N, kTransposedA, kTransposedB>;
  cudaError_t error = allow_shared(kernel, Shape::kShared);
  JobList<Job> list(kernel, Shape::kShared, stream);
  for (size_t i = 0; i < jobs.size() && error == cudaSuccess; ++i)
    error = list.add(jobs[i], (jobs[i].m + M - 1) / M * ((jobs[i].n + N - 1) / N) * jobs[i].slices);
  return error == cudaSuccess ? list.flush() : error;
}
// As gemm: narrow matrices take narrow tiles.
template <class Engine, bool kTransposedA, bool kTransposedB, class List>
cudaError_t grouped_gemm(const List& jobs, cudaStream_t stream) {
  int64_t m = 0, n = 0;
  for (const auto& job : jobs) {
    m = job.m > m ? job.m : m;
    n = job.n > n ? job.n : n;
  }
  if constexpr (sizeof(typename Engine::Sum) == 8)
    return launch_grouped<Engine, 64, 64, kTransposedA, kTransposedB>(jobs, stream);
  else if (kTransposedA && m <= 32)
    return launch_grouped<Engine, kTransposedA ? 32 : 128, 128, kTransposedA, kTransposedB>(jobs, stream);
  else if (!kTransposedA && n <= 32)
    return launch_grouped<Engine, 128, kTransposedA ? 128 : 32, kTransposedA, kTransposedB>(jobs, stream);
  else
    return launch_grouped<Engine, 128, 128, kTransposedA, kTransposedB>(jobs, stream);
}

}  // namespace mtl::cuda
