// Losses from logits: in one kernel with the heads and all gradients where those fit a block, else from logits in
// global memory. The limits are worked out in csrc/README.md.
#pragma once

#include <type_traits>

#include "gemm.cuh"
#include "labels.cuh"

namespace mtl::cuda {

template <class Element, class Sum>
struct LossJob {
  View<Element> x, weight;
  const Element* bias;
  int64_t bias_stride;
  const DeviceTask* tasks;
  const double* reals;
  const Sum *labels, *scale;  // label columns, `label_step` apart; [tasks], or null where one launch is to find them
  NormJob norm;
  int64_t task_count, label_step;
  Element* dx;         // or null
  bool need_sums;      // dW and db
  Sum* weight_parts;   // [blocks, K, D]
  Sum* bias_parts;     // [blocks, K]
  double* loss_parts;  // [blocks, tasks]
};

// ---- Everything of a tile of rows in one block. The weights stay in shared memory, the sums of dW in registers, and
// the next tile of x is on its way while this one is worked on.
template <class Engine, int K, int D>
struct FusedShape {
  using Element = typename Engine::Element;
  using Sum = typename Engine::Sum;
  // Multiply-adds want eight rows a thread, so that they do not wait for shared memory; then the largest weights leave
  // no room for a second tile, and the next one comes as soon as dW has this one. Their threads have four neighbours of
  // dx, which need no place on their way out.
  static constexpr bool kDirect = std::is_same_v<Engine, Exact32>;
  static constexpr int kRows = kDirect ? 128 : 64, kSteps = kRows / 32;
  static constexpr int kTiles = kRows * K * D > 128 * 128 * 64 ? 1 : 2;
  static_assert(kTiles == 2 || kDirect, "one place for x has none for dx");
  static constexpr int kWeightRow = row_of<Element>(D), kGradientRow = row_of<Element>(K);
  // Where sums and elements are one type, the gradients are multiplied where they lie; else the logits' rows begin in
  // different banks.
  static constexpr bool kOne = sizeof(Element) == sizeof(Sum);
  static constexpr int kLogitRow = kOne ? kGradientRow : K + 1;
  static constexpr size_t kWeights = sizeof(Element) * K * kWeightRow, kTile = sizeof(Element) * kRows * kWeightRow;
  static constexpr size_t kLogits = sizeof(Sum) * round_up(kRows * kLogitRow, 4);
  static constexpr size_t kGradients = kOne ? 0 : sizeof(Element) * kRows * kGradientRow;
  static constexpr size_t kLosses = sizeof(double) * kSteps * K, kBias = sizeof(Sum) * K, kScale = sizeof(Sum) * K;
  static constexpr size_t kShared = kWeights + kTiles * kTile + kLogits + kGradients + kLosses + kBias + kScale;
};

// The losses of a tile, a warp for 32 rows of a task: a row a thread, or a row after the other where the task is wide.
template <class T>
__device__ void tile_losses(const DeviceTask* tasks, const double* reals, int64_t task_count, const T* labels,
                            int64_t label_step, const T* scale, int64_t n, int64_t row, int steps, T* z, int z_row,
                            bool gradient, double* losses) {
  constexpr int64_t kNarrow = 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int64_t i = threadIdx.x / 32; i < task_count * steps; i += kWarps) {
    const int64_t t = i / steps;
    const int half = static_cast<int>(i % steps);
    const DeviceTask& task = tasks[t];
    T sum = T(0);
    const auto one = [&](int r, auto lanes) {
      constexpr int kLanes = decltype(lanes)::value;
      T* const at = z + (half * 32 + r) * z_row + task.begin;
      const int64_t place = row + half * 32 + r;
      if (place < n)
        sum += row_loss<T, kLanes>(task, reals, at, 1, labels + task.label_row * label_step + place, label_step,
                                   scale[t], gradient, kLanes > 1 ? lane : 0);
      else if (gradient)
        for (int64_t c = kLanes > 1 ? lane : 0; c < task.width; c += kLanes) at[c] = T(0);
    };
    if (task.width <= kNarrow)
      one(lane, Lanes<1>{});
    else
      for (int r = 0; r < 32; ++r) one(r, Lanes<32>{});
    const double all = lanes_sum<32>(static_cast<double>(sum));
    if (lane == 0) losses[half * task_count + t] += all;
  }
}

template <class Engine, int K, int D>
__global__ void __launch_bounds__(kThreads, 1)
    fused_loss_kernel(LossJob<typename Engine::Element, typename Engine::Sum> job) {
  using Shape = FusedShape<Engine, K, D>;
  using Element = typename Engine::Element;
  using Sum = typename Engine::Sum;
  constexpr int kRows = Shape::kRows;
  MTL_DYNAMIC_SHARED(unsigned char, memory);
  Element* const weight = reinterpret_cast<Element*>(memory);
  Element* const tiles = weight + K * Shape::kWeightRow;
  Sum* const z = reinterpret_cast<Sum*>(memory + Shape::kWeights + Shape::kTiles * Shape::kTile);
  Element* const g =
      Shape::kOne
          ? reinterpret_cast<Element*>(z)
          : reinterpret_cast<Element*>(memory + Shape::kWeights + Shape::kTiles * Shape::kTile + Shape::kLogits);
  double* const losses = reinterpret_cast<double*>(memory + Shape::kWeights + Shape::kTiles * Shape::kTile +
                                                   Shape::kLogits + Shape::kGradients);
  Sum *const bias = reinterpret_cast<Sum*>(losses + Shape::kSteps * K), *const scale = bias + K;

  const int thread = static_cast<int>(threadIdx.x);
  const int64_t n = job.x.rows, d = job.x.cols, k = job.weight.rows, tile_count = (n + kRows - 1) / kRows;
  const bool gradient = job.dx || job.need_sums;
  load_tile(weight, Shape::kWeightRow, job.weight, 0, K, 0, D);
  for (int i = thread; i < Shape::kSteps * K; i += kThreads) losses[i] = 0;
  for (int i = thread; i < K; i += kThreads)
    bias[i] = job.bias && i < k ? converted<Sum>(job.bias[i * job.bias_stride]) : Sum(0);
  const auto load = [&](int64_t tile, int at) {
    load_tile(tiles + at * kRows * Shape::kWeightRow, Shape::kWeightRow, job.x, tile * kRows, kRows, 0, D);
    cp_async_commit();
  };
  int64_t tile = blockIdx.x;
  load(tile, 0);
  finish_labels_first<Sum>(job.norm, job.scale, kWarps, [&](int t, Sum own) { scale[t] = own; });

  Product<Engine, K, D, true, true> weight_sum;
  weight_sum.clear();
  Sum bias_sum = Sum(0);
  const int depth_k = round_up(static_cast<int>(k), kStep), depth_d = round_up(static_cast<int>(d), kStep);
  for (int at = 0; tile < tile_count; at ^= Shape::kTiles - 1) {
    Element* const x = tiles + at * kRows * Shape::kWeightRow;
    const int64_t row = tile * kRows;
    tile += gridDim.x;
    cp_async_wait<0>();
    __syncthreads();  // this tile is here, and nobody reads the one before any more
    if (Shape::kTiles == 2) load(tile, at ^ 1);
    {
      Product<Engine, kRows, K, false, false> logits;
      logits.clear();
      logits.add(x, Shape::kWeightRow, weight, Shape::kWeightRow, depth_d);
      logits.each([&](int r, int c, Sum v) { z[r * Shape::kLogitRow + c] = c < k ? v + bias[c] : Sum(0); });
    }
    __syncthreads();
    if (Shape::kTiles == 1 && !job.need_sums) load(tile, 0);  // x has been read
    tile_losses(job.tasks, job.reals, job.task_count, job.labels, job.label_step, scale, n, row, Shape::kSteps, z,
                Shape::kLogitRow, gradient, losses);
    if (!gradient) continue;
    __syncthreads();
    if constexpr (!Shape::kOne)
      for (int i = thread; i < kRows * K; i += kThreads)
        g[i / K * Shape::kGradientRow + i % K] = from_float<Element>(z[i / K * Shape::kLogitRow + i % K]);
    if (job.need_sums) {
#pragma unroll 8
      for (int r = thread / K; r < kRows; r += kThreads / K) bias_sum += z[r * Shape::kLogitRow + thread % K];
    }
    if constexpr (!Shape::kOne) __syncthreads();
    if (job.need_sums) weight_sum.add(g, Shape::kGradientRow, x, Shape::kWeightRow, kRows);
    if (Shape::kTiles == 1 && job.need_sums) {
      __syncthreads();
      load(tile, 0);  // on its way during the product below
    }
    if (!job.dx) continue;
    const int rows = n - row < kRows ? static_cast<int>(n - row) : kRows;
    Product<Engine, kRows, D, false, true> dx;
    dx.clear();
    dx.add(g, Shape::kGradientRow, weight, Shape::kWeightRow, depth_k);
    if constexpr (Shape::kDirect) {
      dx.store(job.dx + row * d, d, rows, static_cast<int>(d));
    } else {
      __syncthreads();  // x has been read: its place takes dx on its way out
      dx.each([&](int r, int c, Sum v) { x[r * Shape::kWeightRow + c] = converted<Element>(v); });
      __syncthreads();
      store_tile(x, Shape::kWeightRow, job.dx, d, row, rows, 0, static_cast<int>(d));
    }
  }
  cp_async_wait<0>();
  __syncthreads();
  for (int t = thread; t < job.task_count; t += kThreads) {
    double sum = 0;
    for (int s = 0; s < Shape::kSteps; ++s) sum += losses[s * job.task_count + t];
    job.loss_parts[blockIdx.x * job.task_count + t] = sum;
  }
  if (!job.need_sums) return;
  Sum* const own = job.weight_parts + blockIdx.x * k * d;
  weight_sum.each([&](int r, int c, Sum v) {
    if (r < k && c < d) own[r * d + c] = v;
  });
  z[thread] = bias_sum;
  __syncthreads();
  if (thread >= k) return;
  for (int part = 1; part < kThreads / K; ++part) bias_sum += z[part * K + thread];
  job.bias_parts[blockIdx.x * k + thread] = bias_sum;
}

// ---- G[i, j] = sum over the block of S * P, for the tasks i of some rows and all j. A warp a pair of tasks.
template <class Sum>
__global__ void __launch_bounds__(kThreads)
    gramian_kernel(const DeviceTask* tasks, int64_t task_count, int64_t first, int64_t last, int64_t k, const Sum* s,
                   const Sum* p, Sum* gramian) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t begin = tasks[first].begin;
  const int64_t pairs = (last - first) * task_count, step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t pair = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; pair < pairs; pair += step) {
    const int64_t i = first + pair / task_count, j = pair % task_count;
    if (j < i) continue;
    const DeviceTask &a = tasks[i], &b = tasks[j];
    double sum = 0;
    for (int64_t e = lane; e < a.width * b.width; e += 32) {
      const int64_t at = (a.begin - begin + e / b.width) * k + b.begin + e % b.width;
      sum += static_cast<double>(s[at]) * static_cast<double>(p[at]);
    }
    sum = lanes_sum<32>(sum);
    if (lane == 0) gramian[i * task_count + j] = gramian[j * task_count + i] = static_cast<Sum>(sum);
  }
}

}  // namespace mtl::cuda
