// Losses from logits in global memory [N, K], to which the bias may have to be added first, and their gradients: a tile
// of rows at a time in shared memory, so that whole rows are read and written side by side; where K is too wide for
// that, in global memory itself.
#pragma once

#include <algorithm>

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

// The loss of one row, with logits z, of task t. Returns this lane's part of it.
template <int kLanes, class Element, class Sum>
__device__ Sum one_row(const LogitsJob<Element, Sum>& job, int64_t t, int64_t row, Sum* z, int lane) {
  const DeviceTask& task = job.loss.tasks[t];
  return row_loss<Sum, kLanes, sizeof(Element) == 2>(task, job.loss.reals, z + task.begin, 1,
                                                     job.loss.labels + task.label_row * job.loss.label_step + row,
                                                     job.loss.label_step, job.loss.scale[t], job.gradient, lane);
}
// Those of `rows` rows, by one warp; a row has kLanes lanes.
template <int kLanes, class Element, class Sum>
__device__ Sum rows_losses(const LogitsJob<Element, Sum>& job, int64_t t, int64_t row, int rows, Sum* z,
                           int64_t z_row) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  Sum sum = Sum(0);
  for (int r = lane / kLanes; r < rows; r += 32 / kLanes) {
    sum += one_row<kLanes>(job, t, row + r, z + r * z_row, lane % kLanes);
    __syncwarp(lanes_mask<kLanes>());  // a lane may have written what another one reads: mean and variance
  }
  return sum;
}

// How a tile lies in shared memory: losses [tasks], the bias [k], the sums of gradients [groups, k], then its rows.
// They begin in different banks where a lane has a row, and eight banks apart where eight lanes have one.
constexpr int kNarrowTask = 32;  // columns at most of a task of which a lane has a row
struct LogitTile {
  int rows, row, groups;  // of threads: each has every groups-th row, and a thread some columns of those
  size_t shared;
};
template <class Sum>
LogitTile logit_tile(int rows, int64_t task_count, int64_t k, bool narrow, int at_once) {
  const auto width = static_cast<int>(k);
  const int pieces = width / at_once, groups = pieces < kThreads ? std::min(kThreads / pieces, rows) : 1;
  const int row = narrow ? width | 1 : (width + 23) / 32 * 32 + 8;
  const size_t numbers = round_up(width, 4) + round_up(groups * width, 4) + static_cast<size_t>(rows) * row;
  return {rows, row, groups, (task_count + 1) / 2 * 2 * sizeof(double) + numbers * sizeof(Sum)};
}

// The losses of a tile of tile_rows rows, 32 or 8: a lane has a row of a narrow task, eight lanes one of a wide task.
template <class Element, class Sum>
__device__ void logit_tile_losses(const LogitsJob<Element, Sum>& job, int64_t row, int tile_rows, int rows, Sum* z,
                                  int z_row, double* losses) {
  const int tasks = static_cast<int>(job.loss.task_count), lane = static_cast<int>(threadIdx.x) % 32;
  const int at_once = 32 / tile_rows, r = lane % tile_rows;
  for (int first = static_cast<int>(threadIdx.x) / 32 * at_once; first < tasks; first += kWarps * at_once) {
    const int t = first + lane / tile_rows;
    const bool narrow = t < tasks && job.loss.tasks[t].width <= kNarrowTask;
    double sum = 0;
    if (narrow && r < rows) sum = static_cast<double>(one_row<1>(job, t, row + r, z + r * z_row, 0));
    for (int offset = tile_rows / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (narrow && r == 0) losses[t] += sum;
  }
  for (int t = static_cast<int>(threadIdx.x) / 32; t < tasks; t += kWarps) {
    if (job.loss.tasks[t].width <= kNarrowTask) continue;
    const double sum = lanes_sum<32>(static_cast<double>(rows_losses<8>(job, t, row, rows, z, z_row)));
    if (lane == 0) losses[t] += sum;
  }
}

// A thread reads and writes kAtOnce columns together: 1, 2, or the 4 that rows at multiples of four numbers allow.
template <class Element, class Sum, int kAtOnce>
__global__ void __launch_bounds__(kThreads, sizeof(Sum) == 8 ? 2 : 3)
    logit_tiles_kernel(LogitsJob<Element, Sum> job, LogitTile tile) {
  MTL_DYNAMIC_SHARED(double, losses);
  struct alignas(sizeof(Sum) * kAtOnce < 16 ? sizeof(Sum) * kAtOnce : 16) Sums {
    Sum v[kAtOnce];
  };
  struct alignas(sizeof(Element) * kAtOnce < 16 ? sizeof(Element) * kAtOnce : 16) Elements {
    Element v[kAtOnce];
  };
  const int thread = static_cast<int>(threadIdx.x), k = static_cast<int>(job.k), pieces = k / kAtOnce;
  Sum* const bias = reinterpret_cast<Sum*>(losses + round_up(static_cast<int>(job.loss.task_count), 2));
  Sum* const sums = bias + round_up(k, 4);
  Sum* const z = sums + round_up(tile.groups * k, 4);
  for (int t = thread; t < job.loss.task_count; t += kThreads) losses[t] = 0;
  for (int c = thread; c < k; c += kThreads)
    bias[c] = job.add_bias && job.loss.bias ? converted<Sum>(job.loss.bias[c * job.loss.bias_stride]) : Sum(0);
  for (int i = thread; i < tile.groups * k; i += kThreads) sums[i] = Sum(0);
  const int group = tile.groups > 1 ? thread / pieces : 0,
            column = (tile.groups > 1 ? thread % pieces : thread) * kAtOnce;
  const auto at = [&](int r, int c) { return z + r * tile.row + c; };
  const int64_t tiles = (job.n + tile.rows - 1) / tile.rows;
  for (int64_t i = blockIdx.x; i < tiles; i += gridDim.x) {
    const int64_t row = i * tile.rows;
    const int rows = job.n - row < tile.rows ? static_cast<int>(job.n - row) : tile.rows;
    Sum* const own = job.z + row * k;
    __syncthreads();
    for (int c = column; group < tile.groups && c < k; c += kThreads * kAtOnce) {
#pragma unroll 4
      for (int r = group; r < rows; r += tile.groups) {
        Sums piece = *reinterpret_cast<const Sums*>(own + r * k + c);
#pragma unroll
        for (int q = 0; q < kAtOnce; ++q) piece.v[q] += bias[c + q];
        if constexpr (kAtOnce == 4)
          *reinterpret_cast<Sums*>(at(r, c)) = piece;
        else
          for (int q = 0; q < kAtOnce; ++q) at(r, c)[q] = piece.v[q];
      }
    }
    __syncthreads();
    logit_tile_losses(job, row, tile.rows, rows, z, tile.row, losses);
    if (!job.gradient) continue;
    __syncthreads();
    for (int c = column; group < tile.groups && c < k; c += kThreads * kAtOnce) {
      Sum* const sum = sums + group * k + c;
      Sum total[kAtOnce];
#pragma unroll
      for (int q = 0; q < kAtOnce; ++q) total[q] = sum[q];
#pragma unroll 4
      for (int r = group; r < rows; r += tile.groups) {
        Sums piece;
        if constexpr (kAtOnce == 4)
          piece = *reinterpret_cast<const Sums*>(at(r, c));
        else
          for (int q = 0; q < kAtOnce; ++q) piece.v[q] = at(r, c)[q];
        Elements element;
#pragma unroll
        for (int q = 0; q < kAtOnce; ++q) {
          total[q] += piece.v[q];
          element.v[q] = converted<Element>(piece.v[q]);
        }
        if (job.keep) *reinterpret_cast<Sums*>(own + r * k + c) = piece;
        if (job.g) *reinterpret_cast<Elements*>(job.g + row * k + r * k + c) = element;
      }
#pragma unroll
      for (int q = 0; q < kAtOnce; ++q) sum[q] = total[q];
    }
  }
  __syncthreads();
  for (int t = thread; t < job.loss.task_count; t += kThreads)
    job.loss.loss_parts[blockIdx.x * job.loss.task_count + t] = losses[t];
  if (!job.loss.bias_parts) return;
  for (int c = thread; c < k; c += kThreads) {
    Sum sum = sums[c];
    for (int g = 1; g < tile.groups; ++g) sum += sums[g * k + c];
    job.loss.bias_parts[blockIdx.x * job.k + c] = sum;
  }
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
    double sum = static_cast<double>(rows_losses<32>(job, t, row, rows, z, job.k));
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
