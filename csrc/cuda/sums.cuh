// Sums of parts in a fixed order, so that results do not depend on which block finishes first.
#pragma once

#include "tiles.cuh"

namespace mtl::cuda {

// out[i] = sum over the parts p of parts[p * size + i]. Null: nothing to do.
template <class Sum, class Out>
struct PartsJob {
  const Sum* parts;
  int64_t count, size;
  Out* out;
  __host__ __device__ int64_t blocks() const { return parts ? (size + 31) / 32 : 0; }
};

// The elements of one block: 32, a lane each; every warp adds a run of the parts, and then the runs are added.
template <class Sum, class Out>
__device__ void sum_parts_of(const PartsJob<Sum, Out>& job, int64_t block) {
  __shared__ Sum sums[kWarps][32];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t i = block * 32 + lane, first = job.count * warp / kWarps, last = job.count * (warp + 1) / kWarps;
  Sum sum = Sum(0);
  if (i < job.size) {
#pragma unroll 8
    for (int64_t p = first; p < last; ++p) sum += job.parts[p * job.size + i];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || i >= job.size) return;
  for (int w = 1; w < kWarps; ++w) sum += sums[w][lane];
  job.out[i] = converted<Out>(sum);
}

template <class Sum, class Out>
__global__ void __launch_bounds__(kThreads) sum_parts_kernel(PartsJob<Sum, Out> job) {
  sum_parts_of(job, blockIdx.x);
}
template <class Sum, class Out>
cudaError_t sum_parts(const Sum* parts, int64_t count, int64_t size, Out* out, cudaStream_t stream) {
  const PartsJob<Sum, Out> job{parts, count, size, out};
  return launch(sum_parts_kernel<Sum, Out>, dim3(static_cast<unsigned>(job.blocks())), dim3(kThreads), 0, stream, job);
}

}  // namespace mtl::cuda
