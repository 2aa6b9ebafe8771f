// Routed rows, sorted by task on the device: a stable counting sort of the row numbers, and pieces of 256 rows of one
// task each, which are what the other kernels work on. Nothing of it is known to the host.
#pragma once

#include "products.cuh"

namespace mtl::cuda {

constexpr int kPieceRows = kThreads;

// The rows of a piece are order[first], order[first + 1], ...; a piece beyond the last has none.
struct Piece {
  int64_t first;
  int task, rows;
};

struct RouteJob {
  const int64_t* route;
  int64_t stride, n, tasks;
  int64_t slices;        // of the rows: a warp each
  int64_t* places;       // [slices, tasks]: how many rows of a task a slice has, then where they begin among its rows
  int64_t* begin;        // [tasks + 1]: where the rows of a task begin in the order
  int64_t* piece_begin;  // [tasks + 1]
  int64_t* order;        // [n]
  int* wrong;            // 1 if a row names a task that there is not
};

// Enough slices for a device, few enough that their counts stay below what the rows take.
inline int64_t route_slices(int64_t n, int64_t tasks) {
  constexpr int64_t kRows = 1024, kCounts = int64_t(1) << 22;
  const int64_t wished = (n + kRows - 1) / kRows, most = kCounts / (tasks > 0 ? tasks : 1);
  const int64_t slices = wished < most ? wished : most;
  return slices < 1 ? 1 : slices;
}
// As many as there can be.
inline int64_t piece_slots(int64_t n, int64_t tasks) {
  return (n + kPieceRows - 1) / kPieceRows + (tasks < n ? tasks : n);
}

// No host waits for a launch: as report_label in labels.cuh.
__device__ inline void report_route(int* wrong) {
  atomicCAS(wrong, 0, 1);
#ifdef __CUDA_ARCH__
  printf("torch_mtl_pyg: task: an index that is no task; the backend \"reference\" names it.\n");
  __trap();
#endif
}

// The rows of a slice, 32 at a time: f(row, task, lanes with the same task) by all lanes; no lanes where there is no
// such row.
template <class F>
__device__ void each_routed(const RouteJob& job, int64_t slice, F f) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t first = job.n * slice / job.slices, last = job.n * (slice + 1) / job.slices;
  for (int64_t r0 = first; r0 < last; r0 += 32) {
    const int64_t r = r0 + lane, t = r < last ? job.route[r * job.stride] : -1;
    const bool there = t >= 0 && t < job.tasks;
    if (r < last && !there) report_route(job.wrong);
    unsigned rest = __ballot_sync(0xffffffffu, there), own = 0;
    while (rest) {
      const int64_t key = __shfl_sync(0xffffffffu, t, __ffs(static_cast<int>(rest)) - 1);
      const unsigned same = __ballot_sync(0xffffffffu, there && t == key);
      if (there && t == key) own = same;
      rest &= ~same;
    }
    f(r, t, own);
    __syncwarp();  // what one lane has counted is read by another
  }
}

// places is zero before.
template <class T = int64_t>
__global__ void __launch_bounds__(kThreads) count_routes_kernel(RouteJob job) {
  const int64_t slice = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (slice >= job.slices) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  each_routed(job, slice, [&](int64_t, T t, unsigned own) {
    if (own && __ffs(static_cast<int>(own)) - 1 == lane) job.places[slice * job.tasks + t] += __popc(own);
  });
}

// A warp a task: the counts of the slices become places, and begin[t + 1] their sum.
template <class T = int64_t>
__global__ void __launch_bounds__(kThreads) route_places_kernel(RouteJob job) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; t < job.tasks; t += step) {
    T sum = 0;
    for (int64_t s0 = 0; s0 < job.slices; s0 += 32) {
      const int64_t s = s0 + lane;
      const T own = s < job.slices ? job.places[s * job.tasks + t] : 0;
      T before = own;
      for (unsigned by = 1; by < 32; by *= 2) {
        const T other = __shfl_up_sync(0xffffffffu, before, by);
        if (lane >= static_cast<int>(by)) before += other;
      }
      if (s < job.slices) job.places[s * job.tasks + t] = sum + before - own;
      sum += __shfl_sync(0xffffffffu, before, 31);
    }
    if (lane == 0) job.begin[t + 1] = sum;
  }
}

// One block: begin and piece_begin from the numbers of rows.
template <class T = int64_t>
__global__ void __launch_bounds__(kThreads) route_begins_kernel(RouteJob job) {
  __shared__ T sums[2][kWarps];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  T all_rows = 0, all_pieces = 0;
  if (thread == 0) job.begin[0] = job.piece_begin[0] = 0;
  for (int64_t t0 = 0; t0 < job.tasks; t0 += kThreads) {
    const int64_t t = t0 + thread;
    T rows = t < job.tasks ? job.begin[t + 1] : 0, pieces = (rows + kPieceRows - 1) / kPieceRows;
    for (unsigned by = 1; by < 32; by *= 2) {
      const T other_rows = __shfl_up_sync(0xffffffffu, rows, by),
              other_pieces = __shfl_up_sync(0xffffffffu, pieces, by);
      if (lane >= static_cast<int>(by)) rows += other_rows, pieces += other_pieces;
    }
    if (lane == 31) sums[0][warp] = rows, sums[1][warp] = pieces;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) rows += sums[0][w], pieces += sums[1][w];
    }
    if (t < job.tasks) {
      job.begin[t + 1] = all_rows + rows;
      job.piece_begin[t + 1] = all_pieces + pieces;
    }
    for (int w = 0; w < kWarps; ++w) all_rows += sums[0][w], all_pieces += sums[1][w];
    __syncthreads();
  }
}

template <class T = int64_t>
__global__ void __launch_bounds__(kThreads) place_routes_kernel(RouteJob job) {
  const int64_t slice = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (slice >= job.slices) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  each_routed(job, slice, [&](int64_t r, T t, unsigned own) {
    const int leader = own ? __ffs(static_cast<int>(own)) - 1 : lane;
    T place = 0;
    if (own && leader == lane) {
      T& at = job.places[slice * job.tasks + t];
      place = job.begin[t] + at;
      at += __popc(own);
    }
    place = __shfl_sync(0xffffffffu, place, leader);
    if (own) job.order[place + __popc(own & ((1u << lane) - 1))] = r;
  });
}

// A thread a piece: the task is found by halves.
template <class T = int64_t>
__global__ void __launch_bounds__(kThreads) pieces_kernel(RouteJob job, int64_t slots, Piece* pieces) {
  const T i = static_cast<T>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= slots) return;
  if (i >= job.piece_begin[job.tasks]) {
    pieces[i] = {0, 0, 0};
    return;
  }
  int64_t low = 0, high = job.tasks;  // piece_begin[low] <= i < piece_begin[high]
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (job.piece_begin[middle] <= i ? low : high) = middle;
  }
  const int64_t first = job.begin[low] + (i - job.piece_begin[low]) * kPieceRows, rest = job.begin[low + 1] - first;
  pieces[i] = {first, static_cast<int>(low), rest < kPieceRows ? static_cast<int>(rest) : kPieceRows};
}

}  // namespace mtl::cuda
