// Losses from logits in global memory [N, K], to which the bias may have to be added first, and their gradients: a tile
// of rows at a time in shared memory, so that whole rows are read and written side by side; where K is too wide for
// that, in global memory itself.
#pragma once

#include "loss_kernels.cuh"

namespace mtl::cuda {

template <class Element, class Sum>
struct LogitsJob {
  LossJob<Element, Sum> loss;
  int64_t n, k;
  Sum* z;
  Element* g;  // the gradients as elements, or null
  bool gradient, add_bias;
  bool keep;  // the gradients as sums too, in the place of the logits
};

// The losses of one task for `rows` rows, by one warp; a row has kLanes lanes. Returns this lane's part.
template <int kLanes, class Element, class Sum>
__device__ Sum rows_losses(const LogitsJob<Element, Sum>& job, const DeviceTask& task, int64_t t, int64_t row, int rows,
                           Sum* z, int64_t z_row) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  Sum sum = Sum(0);
  for (int r = lane / kLanes; r < rows; r += 32 / kLanes) {
    sum += row_loss<Sum, kLanes>(task, job.loss.reals, z + r * z_row + task.begin, 1,
                                 job.loss.labels + task.label_row * job.loss.label_step + row + r, job.loss.label_step,
                                 job.loss.scale[t], job.gradient, lane % kLanes);
    // A lane may have written what another one reads: mean and variance.
    if constexpr (kLanes > 1) __syncwarp(lanes_mask<kLanes>());
  }
  return sum;
}

struct LogitTile {
  int rows, row;  // `row` numbers from one row to the next: odd, so that they begin in different banks
  size_t shared;
};

template <class Element, class Sum>
__global__ void __launch_bounds__(kThreads, 2) logit_tiles_kernel(LogitsJob<Element, Sum> job, LogitTile tile) {
  MTL_DYNAMIC_SHARED(double, losses);
  Sum* const z = reinterpret_cast<Sum*>(losses + job.loss.task_count);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, k = static_cast<int>(job.k);
  for (int64_t t = thread; t < job.loss.task_count; t += kThreads) losses[t] = 0;
  const int64_t tiles = (job.n + tile.rows - 1) / tile.rows;
  for (int64_t i = blockIdx.x; i < tiles; i += gridDim.x) {
    const int64_t row = i * tile.rows;
    const int rows = job.n - row < tile.rows ? static_cast<int>(job.n - row) : tile.rows;
    __syncthreads();
#pragma unroll 4
    for (int at = thread; at < rows * k; at += kThreads) {
      const int r = at / k, c = at % k;
      Sum v = job.z[row * k + at];
      if (job.add_bias && job.loss.bias) v += converted<Sum>(job.loss.bias[c * job.loss.bias_stride]);
      z[r * tile.row + c] = v;
    }
    __syncthreads();
    for (int64_t t = warp; t < job.loss.task_count; t += kWarps) {
      const DeviceTask& task = job.loss.tasks[t];
      const Sum sum = task.width <= 32 && tile.rows == 32 ? rows_losses<1>(job, task, t, row, rows, z, tile.row)
                                                          : rows_losses<8>(job, task, t, row, rows, z, tile.row);
      const double all = lanes_sum<32>(static_cast<double>(sum));
      if (thread % 32 == 0) losses[t] += all;
    }
    if (!job.gradient) continue;
    __syncthreads();
#pragma unroll 4
    for (int at = thread; at < rows * k; at += kThreads) {
      const Sum v = z[at / k * tile.row + at % k];
      if (job.keep) job.z[row * k + at] = v;
      if constexpr (sizeof(Element) != sizeof(Sum))
        if (job.g) job.g[row * k + at] = from_float<Element>(v);
    }
  }
  __syncthreads();
  for (int64_t t = thread; t < job.loss.task_count; t += kThreads)
    job.loss.loss_parts[blockIdx.x * job.loss.task_count + t] = losses[t];
}

// A block 256 rows of a task, in place.
template <class Element, class Sum>
__global__ void __launch_bounds__(kThreads, 2) logits_loss_kernel(LogitsJob<Element, Sum> job) {
  __shared__ double places[kWarps];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x / 32 * 32;
  const int rows = job.n - row < 32 ? static_cast<int>(job.n - row < 0 ? 0 : job.n - row) : 32;
  for (int64_t t = blockIdx.y; t < job.loss.task_count; t += gridDim.y) {
    const DeviceTask& task = job.loss.tasks[t];
    Sum* const z = job.z + row * job.k;
    if (job.add_bias && job.loss.bias)
      for (int r = 0; r < rows; ++r)
        for (int64_t c = task.begin + lane; c < task.begin + task.width; c += 32)
          z[r * job.k + c] += converted<Sum>(job.loss.bias[c * job.loss.bias_stride]);
    __syncwarp();
    double sum = static_cast<double>(rows_losses<32>(job, task, t, row, rows, z, job.k));
    __syncwarp();
    if constexpr (sizeof(Element) != sizeof(Sum))
      if (job.g)
        for (int r = 0; r < rows; ++r)
          for (int64_t c = task.begin + lane; c < task.begin + task.width; c += 32)
            job.g[(row + r) * job.k + c] = from_float<Element>(z[r * job.k + c]);
    sum = block_sum(sum, places);
    if (threadIdx.x == 0) job.loss.loss_parts[blockIdx.x * job.loss.task_count + t] = sum;
  }
}

}  // namespace mtl::cuda
