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
  return row_loss<Sum, kLanes>(task, job.loss.reals, z + task.begin, 1,
                               job.loss.labels + task.label_row * job.loss.label_step + row, job.loss.label_step,
                               job.loss.scale[t], job.gradient, lane);
}
// Those of the rows [first, last), by one warp; a row has kLanes lanes.
template <int kLanes, class Element, class Sum>
__device__ Sum rows_losses(const LogitsJob<Element, Sum>& job, int64_t t, int64_t row, int first, int last, Sum* z,
                           int64_t z_row) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  Sum sum = Sum(0);
  for (int r = first + lane / kLanes; r < last; r += 32 / kLanes) {
    sum += one_row<kLanes>(job, t, row + r, z + r * z_row, lane % kLanes);
    __syncwarp(lanes_mask<kLanes>());  // a lane may have written what another one reads: mean and variance
  }
  return sum;
}

// A tile in shared memory: losses [tasks, parts], the bias [k], the sums of gradients [groups, k], then its rows.
constexpr int kNarrowTask = 32;   // columns at most of a task of which a lane has a row
constexpr int kNarrowInWide = 4;  // the same beside wider ones, where rows lie for eight lanes each
struct LogitTile {
  int rows, row;  // rows begin in different banks, or eight banks apart where eight lanes have one
  int groups;     // of threads: each has every groups-th row, and a thread some columns of those
  int parts;      // of the rows, so that every warp has one of a task
  int narrow;     // columns at most of a task of which a lane has a row
  size_t shared;
};
// Widths of tasks: how many there are, and how many beyond either border.
struct TaskWidths {
  int64_t count, beyond_narrow, beyond_narrow_in_wide;
};
// Tiles take a third of a multiprocessor of capability 9.0, or with 8 rows up to 96 KiB; else there is none (rows 0).
// By the shape alone, so that no sum depends on the device.
template <class Sum>
LogitTile logit_tile(int64_t n, const TaskWidths& tasks, int64_t k, int at_once) {
  constexpr size_t kThird = 75 << 10, kMost = 96 << 10;
  constexpr int64_t kMostLosses = 1024;
  if (k < 1 || k > int64_t(1) << 15) return {};
  const bool wide = tasks.beyond_narrow > 0;
  const int64_t shared_out = wide ? tasks.beyond_narrow_in_wide : tasks.count;
  const int width = static_cast<int>(k), pieces = width / at_once;
  for (const int rows : {256, 128, 64, 32, 16, 8}) {
    // More than 32 where lanes have rows of few tasks, no more than give every warp something to do, and many tiles.
    if (rows > 32 && (wide || rows / 64 * tasks.count >= kWarps || n / rows < 1024)) continue;
    const int most_parts = wide ? rows / 4 : std::max(1, rows / 32);
    LogitTile tile{rows,
                   wide ? (width + 23) / 32 * 32 + 8 : width | 1,
                   pieces < kThreads ? std::min(kThreads / pieces, rows) : 1,
                   1,
                   wide ? kNarrowInWide : kNarrowTask,
                   0};
    while (tile.parts < most_parts && tile.parts * shared_out < kWarps && 2 * tile.parts * tasks.count <= kMostLosses)
      tile.parts *= 2;
    const int64_t numbers = round_up(width, 4) + round_up(tile.groups * width, 4) + int64_t(rows) * tile.row;
    tile.shared =
        static_cast<size_t>((tile.parts * tasks.count + 1) / 2 * 2 * 8 + numbers * static_cast<int64_t>(sizeof(Sum)));
    if (tile.shared <= kThird || (rows == 8 && tile.shared <= kMost)) return tile;
  }
  return {};
}

// The losses of a tile, part by part of the rows of a task: of a wide task by a warp, of narrow ones by as many lanes
// as the part has rows.
template <class Element, class Sum>
__device__ void logit_tile_losses(const LogitsJob<Element, Sum>& job, const LogitTile& tile, int64_t row, int rows,
                                  Sum* z, double* losses) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int items = static_cast<int>(job.loss.task_count) * tile.parts, of_part = tile.rows / tile.parts;
  const int lanes = of_part < 32 ? of_part : 32, at_once = 32 / lanes;
  for (int base = warp * at_once; base < items; base += kWarps * at_once) {
    const int i = base + lane / lanes, t = i / tile.parts, first = i % tile.parts * of_part;
    const int last = first + of_part < rows ? first + of_part : rows;
    const bool own = i < items && job.loss.tasks[t].width <= tile.narrow;
    double sum = 0;
    if (own)
      for (int r = first + lane % lanes; r < last; r += lanes)
        sum += static_cast<double>(one_row<1>(job, t, row + r, z + r * tile.row, 0));
    for (int offset = lanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (own && lane % lanes == 0) losses[i] += sum;
  }
  int wide_items = 0;
  for (int t = 0; t < static_cast<int>(job.loss.task_count); ++t) {
    if (job.loss.tasks[t].width <= tile.narrow) continue;
    for (int part = 0; part < tile.parts; ++part, ++wide_items) {
      if (wide_items % kWarps != warp) continue;
      const int first = part * of_part, last = first + of_part < rows ? first + of_part : rows;
      const Sum sum = rows_losses<8>(job, t, row, first, last, z, tile.row);
      const double all = lanes_sum<32>(static_cast<double>(sum));
      if (lane == 0) losses[t * tile.parts + part] += all;
    }
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
  const int tasks = static_cast<int>(job.loss.task_count);
  Sum* const bias = reinterpret_cast<Sum*>(losses + round_up(tasks * tile.parts, 2));
  Sum* const sums = bias + round_up(k, 4);
  Sum* const z = sums + round_up(tile.groups * k, 4);
  for (int i = thread; i < tasks * tile.parts; i += kThreads) losses[i] = 0;
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
      const Sums shift = *reinterpret_cast<const Sums*>(bias + c);
#pragma unroll 4
      for (int r = group; r < rows; r += tile.groups) {
        Sums piece = *reinterpret_cast<const Sums*>(own + r * k + c);
#pragma unroll
        for (int q = 0; q < kAtOnce; ++q) piece.v[q] += shift.v[q];
        if constexpr (kAtOnce == 4)
          *reinterpret_cast<Sums*>(at(r, c)) = piece;
        else
          for (int q = 0; q < kAtOnce; ++q) at(r, c)[q] = piece.v[q];
      }
    }
    __syncthreads();
    logit_tile_losses(job, tile, row, rows, z, losses);
    if (!job.gradient) continue;
    __syncthreads();
    for (int c = column; group < tile.groups && c < k; c += kThreads * kAtOnce) {
      Sums total = *reinterpret_cast<const Sums*>(sums + group * k + c);
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
          total.v[q] += piece.v[q];
          element.v[q] = converted<Element>(piece.v[q]);
        }
        if (job.keep) *reinterpret_cast<Sums*>(own + r * k + c) = piece;
        if (job.g) *reinterpret_cast<Elements*>(job.g + row * k + r * k + c) = element;
      }
      *reinterpret_cast<Sums*>(sums + group * k + c) = total;
    }
  }
  __syncthreads();
  for (int t = thread; t < tasks; t += kThreads) {
    double sum = 0;
    for (int p = 0; p < tile.parts; ++p) sum += losses[t * tile.parts + p];
    job.loss.loss_parts[blockIdx.x * job.loss.task_count + t] = sum;
  }
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
    double sum = static_cast<double>(rows_losses<32>(job, t, row, 0, rows, z, job.k));
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
