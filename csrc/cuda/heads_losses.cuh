// Losses, labels and gradients from outside for the rows of a chunk of heads with hidden layers; and what is summed for
// each task of routed rows.
#pragma once

#include "heads_rows.cuh"
#include "labels.cuh"

namespace mtl::cuda {

template <class Sum>
struct HeadsLossJob {
  ChunkRows chunk;
  const DeviceTask* tasks;
  const double* reals;
  const Sum *labels, *scale;  // [label columns, n], routed in the order of the tasks; [tasks]
  int64_t task_count, n;
  Sum* z;  // logits, which become gradients
  int64_t z_row;
  double* parts;  // of a block: [tasks], or routed one
  bool gradient;
};

// blockIdx.x: 256 rows, or a piece; blockIdx.y: tasks, in steps.
template <class Sum>
__global__ void __launch_bounds__(kThreads, sizeof(Sum) == 8 ? 2 : 3) heads_loss_kernel(HeadsLossJob<Sum> job) {
  __shared__ double places[kWarps];
  constexpr int64_t kNarrow = 32;
  const bool routed = job.chunk.routed();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  for (int64_t number = blockIdx.y; number < (routed ? 1 : job.task_count); number += gridDim.y) {
    const BlockRows at = job.chunk.template tile<kThreads>(blockIdx.x, number);
    const DeviceTask& task = job.tasks[at.task];
    const int64_t column = routed ? 0 : task.begin, label_row = routed ? 0 : task.label_row;
    const Sum scale = job.scale[at.task];
    double sum = 0;
    const auto one = [&](int r, auto lanes) {
      constexpr int kLanes = decltype(lanes)::value;
      sum += row_loss<Sum, kLanes>(task, job.reals, job.z + (at.scratch + r) * job.z_row + column, 1,
                                   job.labels + label_row * job.n + at.source + r, job.n, scale, job.gradient,
                                   kLanes > 1 ? lane : 0);
    };
    if (task.width <= kNarrow) {
      if (thread < at.rows) one(thread, Lanes<1>{});
    } else {
      for (int i = 0; i < 32; ++i)
        if (thread / 32 * 32 + i < at.rows) one(thread / 32 * 32 + i, Lanes<32>{});
    }
    sum = block_sum(sum, places);
    if (thread == 0) job.parts[routed ? blockIdx.x : blockIdx.x * job.task_count + number] = sum;
  }
}

// z = the gradients that come from outside: `sources` matrices, or those of the task of a piece.
template <class Sum>
__global__ void __launch_bounds__(kThreads)
    outside_kernel(ChunkRows chunk, const DeviceTask* tasks, int64_t sources, Sum* z, int64_t z_row) {
  const bool routed = chunk.routed();
  for (int64_t number = blockIdx.y; number < (routed ? 1 : sources); number += gridDim.y) {
    const BlockRows at = chunk.template tile<kThreads>(blockIdx.x, number);
    const DeviceTask& task = tasks[at.task];
    const int64_t width = task.width, column = routed ? 0 : task.begin;
    for (int64_t i = threadIdx.x; i < at.rows * width; i += kThreads) {
      const int64_t r = i / width, c = i % width;
      z[(at.scratch + r) * z_row + column + c] = static_cast<Sum>(label_at(task.labels, chunk.source_row(at, r), c));
    }
  }
}

// ---- Labels of routed rows: checked, counted, and kept as numbers in the order of the tasks, NaN for a missing one.
struct RoutedLabelJob {
  const Piece* pieces;
  const int64_t *order, *piece_begin;
  const DeviceTask* tasks;
  const double* reals;
  int64_t n, given;  // label columns there are
  long long* counts;
  double* norms;        // of a piece
  int *wrong, *narrow;  // the number of a task with a label it cannot have, or with too few columns, plus one
};

// A block a piece.
template <class Sum>
__global__ void __launch_bounds__(kThreads) routed_labels_kernel(RoutedLabelJob job, Sum* numbers) {
  __shared__ long long count_places[kWarps];
  __shared__ double norm_places[kWarps];
  const Piece piece = job.pieces[blockIdx.x];
  if (piece.rows == 0) return;
  const DeviceTask& task = job.tasks[piece.task];
  const int thread = static_cast<int>(threadIdx.x);
  long long count = 0;
  double norm = 0;
  if (task.counts && task.labels.columns > job.given) {
    report_label(job.narrow, piece.task);
  } else if (task.counts && thread < piece.rows) {
    const int64_t row = job.order[piece.first + thread];
    for (int64_t c = 0; c < task.labels.columns; ++c) {
      double v = label_at(task.labels, row, c);
      if (v != v || (task.missing_number && v == static_cast<double>(task.missing))) {
        v = __longlong_as_double(0x7ff8000000000000ll);
      } else if (!can_have(task, v)) {
        report_label(job.wrong, piece.task);
        v = __longlong_as_double(0x7ff8000000000000ll);  // no class to look up
      } else {
        ++count;
        if (task.loss == Loss::kCrossEntropy && task.numbers >= 0)
          norm += job.reals[task.numbers + static_cast<int64_t>(v)];
      }
      numbers[c * job.n + piece.first + thread] = static_cast<Sum>(v);
    }
  }
  count = block_sum(count, count_places);
  norm = block_sum(norm, norm_places);
  if (thread == 0) {
    job.counts[blockIdx.x] = count;
    job.norms[blockIdx.x] = norm;
  }
}

// The sum over the pieces of a task, by a block.
template <class T>
__device__ T task_sum(const T* parts, const int64_t* piece_begin, int64_t t, T* places) {
  T sum = T(0);
  for (int64_t p = piece_begin[t] + threadIdx.x; p < piece_begin[t + 1]; p += kThreads) sum += parts[p];
  return block_sum(sum, places);
}

// As finish_labels_kernel: what a task's losses are divided by, and the factor of its gradients.
template <class Sum>
__global__ void __launch_bounds__(kThreads)
    finish_routed_labels_kernel(RoutedLabelJob job, int64_t task_count, const double* weight, long long* count_out,
                                double* norm_out, Sum* scale) {
  __shared__ long long count_places[kWarps];
  __shared__ double norm_places[kWarps];
  for (int64_t t = blockIdx.x; t < task_count; t += gridDim.x) {
    const long long count = task_sum(job.counts, job.piece_begin, t, count_places);
    double norm = task_sum(job.norms, job.piece_begin, t, norm_places);
    if (threadIdx.x == 0) {
      const DeviceTask& task = job.tasks[t];
      if (task.loss != Loss::kCrossEntropy || task.numbers < 0) norm = static_cast<double>(count);
      count_out[t] = count;
      norm_out[t] = norm;
      scale[t] = static_cast<Sum>(norm > 0 ? (weight ? weight[t] : 1.0) / norm : 0.0);
    }
  }
}

// sums[t * step] = the sum over the pieces of task t.
template <class Out>
__global__ void __launch_bounds__(kThreads)
    task_sums_kernel(const double* parts, const int64_t* piece_begin, int64_t task_count, int64_t step, Out* sums) {
  __shared__ double places[kWarps];
  for (int64_t t = blockIdx.x; t < task_count; t += gridDim.x) {
    const double sum = task_sum(parts, piece_begin, t, places);
    if (threadIdx.x == 0) sums[t * step] = static_cast<Out>(sum);
  }
}

// parts[piece] = the sum of the squares of its rows of m [pieces * 256, columns].
template <class Sum>
__global__ void __launch_bounds__(kThreads)
    squares_kernel(ChunkRows chunk, const Sum* m, int64_t columns, double* parts) {
  __shared__ double places[kWarps];
  const BlockRows at = chunk.template tile<kThreads>(blockIdx.x, 0);
  const Sum* const own = m + at.scratch * columns;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < at.rows * columns; i += kThreads)
    sum += static_cast<double>(own[i]) * static_cast<double>(own[i]);
  sum = block_sum(sum, places);
  if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

}  // namespace mtl::cuda
