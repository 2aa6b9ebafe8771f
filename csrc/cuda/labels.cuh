// Labels: read in whatever type they have, checked, counted, and kept as numbers, NaN for a missing one.
#pragma once

#include "losses.cuh"
#include "sums.cuh"

namespace mtl::cuda {

// Numbers from the host as a parameter of a launch: no copy that the host would have to wait for, and none that a graph
// could not capture.
constexpr int kUploadBytes = 3584;
struct Upload {
  uint64_t words[kUploadBytes / 8];
};
namespace {  // one in each file that includes this
__global__ void __launch_bounds__(kThreads) upload_kernel(Upload from, int words, uint64_t* to) {
  for (int i = static_cast<int>(threadIdx.x); i < words; i += kThreads) to[i] = from.words[i];
}
}  // namespace

__device__ inline double label_at(const Labels& y, int64_t r, int64_t c) {
  const int64_t i = r * y.row_stride + c * y.col_stride;
  switch (y.type) {
    case LabelType::kFloat32:
      return static_cast<const float*>(y.data)[i];
    case LabelType::kFloat64:
      return static_cast<const double*>(y.data)[i];
    case LabelType::kBFloat16:
      return to_float(static_cast<const BFloat16*>(y.data)[i]);
    case LabelType::kFloat16:
      return to_float(static_cast<const Float16*>(y.data)[i]);
    case LabelType::kInt64:
      return static_cast<double>(static_cast<const int64_t*>(y.data)[i]);
    case LabelType::kInt32:
      return static_cast<const int32_t*>(y.data)[i];
    case LabelType::kInt16:
      return static_cast<const int16_t*>(y.data)[i];
    case LabelType::kInt8:
      return static_cast<const int8_t*>(y.data)[i];
    case LabelType::kUInt8:
      return static_cast<const uint8_t*>(y.data)[i];
    default:
      return static_cast<const bool*>(y.data)[i] ? 1.0 : 0.0;
  }
}

__device__ inline bool can_have(const DeviceTask& task, double v) {
  const double largest = 1.7976931348623157e308;
  switch (task.loss) {
    case Loss::kNone:
      return false;
    case Loss::kCrossEntropy:
      return v >= 0 && v < static_cast<double>(task.width) && trunc(v) == v;
    case Loss::kBce:
      return v >= 0 && v <= 1;
    case Loss::kPoissonNll:
      return v >= 0 && v <= largest;
    default:
      return v >= -largest && v <= largest;
  }
}

// No host waits for a launch, so that a label out of range ends the kernel, as it does in PyTorch's own losses; where
// the kernel is emulated, the host looks at `wrong`.
__device__ inline void report_label(int* wrong, int64_t t) {
  atomicCAS(wrong, 0, static_cast<int>(t) + 1);
#ifdef __CUDA_ARCH__
  printf("torch_mtl_pyg: targets: a label that its task cannot have; the backend \"reference\" names it.\n");
  __trap();
#endif
}

// The sum over a block, in an order of its own: the same every time. `shared` has kWarps places.
template <class T>
__device__ T block_sum(T v, T* shared) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  v = lanes_sum<32>(v);
  __syncthreads();  // the places may still be read from the sum before
  if (lane == 0) shared[warp] = v;
  __syncthreads();
  T sum = shared[0];
  for (int w = 1; w < kWarps; ++w) sum += shared[w];
  return sum;
}

constexpr int64_t kLabelRows = 4 * kThreads;

struct LabelJob {
  const DeviceTask* tasks;
  const double* reals;
  int64_t task_count, n, blocks;  // of kLabelRows rows
  int64_t label_step;             // from a label column to the next
  long long* counts;              // [tasks, blocks]
  double* norms;                  // [tasks, blocks]: the weights of a class-weighted task's labels
  int* wrong;                     // the number of a task with a label it cannot have, plus one; or 0
};

// blockIdx.x: rows; blockIdx.y: tasks, in steps.
template <class T>
__device__ void read_labels(const LabelJob& job, T* numbers) {
  __shared__ long long count_places[kWarps];
  __shared__ double norm_places[kWarps];
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kLabelRows + threadIdx.x;
  for (int64_t t = blockIdx.y; t < job.task_count; t += gridDim.y) {
    const DeviceTask& task = job.tasks[t];
    long long count = 0;
    double norm = 0;
    if (task.labels.data) {
      for (int64_t c = 0; c < task.labels.columns; ++c) {
#pragma unroll
        for (int64_t i = 0; i < kLabelRows; i += kThreads) {
          const int64_t r = begin + i;
          if (r >= job.n) break;
          double v = label_at(task.labels, r, c);
          if (task.loss != Loss::kOutside) {
            const bool missing = v != v || (task.missing_number && v == static_cast<double>(task.missing));
            if (missing) {
              v = __longlong_as_double(0x7ff8000000000000ll);
            } else if (!can_have(task, v)) {
              report_label(job.wrong, t);
              v = __longlong_as_double(0x7ff8000000000000ll);  // no class to look up
            } else {
              ++count;
              if (task.loss == Loss::kCrossEntropy && task.numbers >= 0)
                norm += job.reals[task.numbers + static_cast<int64_t>(v)];
            }
          }
          if (task.counts) numbers[(task.label_row + c) * job.label_step + r] = static_cast<T>(v);
        }
      }
    }
    count = block_sum(count, count_places);
    norm = block_sum(norm, norm_places);
    if (threadIdx.x == 0) {
      job.counts[t * job.blocks + blockIdx.x] = count;
      job.norms[t * job.blocks + blockIdx.x] = norm;
    }
  }
}
template <class T>
__global__ void __launch_bounds__(kThreads) labels_kernel(LabelJob job, T* numbers) {
  read_labels(job, numbers);
}
// With what the host sends, of which `job` names the places in `to`: read from the parameters here, and left in `to`
// for the kernels behind.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sent_labels_kernel(const MTL_GRID_CONSTANT Upload from, int words, uint64_t* to, LabelJob job, T* numbers) {
  if (blockIdx.x == 0 && blockIdx.y == 0)
    for (int i = static_cast<int>(threadIdx.x); i < words; i += kThreads) to[i] = from.words[i];
  const auto sent = [&](const void* place) {
    return reinterpret_cast<const char*>(from.words) +
           (static_cast<const char*>(place) - reinterpret_cast<const char*>(to));
  };
  job.tasks = reinterpret_cast<const DeviceTask*>(sent(job.tasks));
  job.reals = reinterpret_cast<const double*>(sent(job.reals));
  read_labels(job, numbers);
}

// What the losses of a task are divided by, from the parts of the blocks of LabelJob.
struct NormJob {
  const DeviceTask* tasks;
  const double* weight;  // of the tasks, or null
  const long long* counts;
  const double* norms;
  int64_t task_count, blocks;
  long long* count_out;
  double* norm_out;
};
// The factor of the gradients of task t, which has `count` labels. `write`: the results of the call too.
template <class T>
__device__ T factor_of(const NormJob& job, int64_t t, long long count, double norm, bool write) {
  const DeviceTask& task = job.tasks[t];
  if (task.loss != Loss::kCrossEntropy || task.numbers < 0) norm = static_cast<double>(count);
  if (write) {
    job.count_out[t] = count;
    job.norm_out[t] = norm;
  }
  return static_cast<T>(task.loss == Loss::kOutside ? 1.0 : norm > 0 ? (job.weight ? job.weight[t] : 1.0) / norm : 0.0);
}
// A block a task.
template <class T>
__global__ void __launch_bounds__(kThreads) finish_labels_kernel(NormJob job, T* scale) {
  __shared__ long long count_places[kWarps];
  __shared__ double norm_places[kWarps];
  for (int64_t t = blockIdx.x; t < job.task_count; t += gridDim.x) {
    long long count = 0;
    double norm = 0;
    for (int64_t b = threadIdx.x; b < job.blocks; b += kThreads) {
      count += job.counts[t * job.blocks + b];
      norm += job.norms[t * job.blocks + b];
    }
    count = block_sum(count, count_places);
    norm = block_sum(norm, norm_places);
    if (threadIdx.x == 0) scale[t] = factor_of<T>(job, t, count, norm, true);
  }
}
template <class T>
cudaError_t finish_labels(const NormJob& job, T* scale, cudaStream_t stream) {
  return launch(finish_labels_kernel<T>, dim3(static_cast<unsigned>(job.task_count < 65535 ? job.task_count : 65535)),
                dim3(kThreads), 0, stream, job, scale);
}
// The same as the beginning of a launch, by each of its blocks for itself, a warp a task: where that is soon done.
// `from`: the factors, if they are there already. `put(t, factor)` is called by one thread.
inline bool finishes_labels_soon(const NormJob& job) {
  return (job.task_count + kWarps - 1) / kWarps * ((job.blocks + 127) / 128) <= 4;
}
template <class T, class Put>
__device__ void finish_labels_first(const NormJob& job, const T* from, int warps, Put put) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  for (int t = warp; t < job.task_count; t += warps) {
    if (from) {
      if (lane == 0) put(t, from[t]);
      continue;
    }
    long long count = 0;
    double norm = 0;
#pragma unroll 4
    for (int64_t b = lane; b < job.blocks; b += 32) {
      count += job.counts[t * job.blocks + b];
      norm += job.norms[t * job.blocks + b];
    }
    count = lanes_sum<32>(count);
    norm = lanes_sum<32>(norm);
    if (lane == 0) put(t, factor_of<T>(job, t, count, norm, blockIdx.x == 0));
  }
}

// Losses of the tasks and their weighted sum, from the parts of the blocks: a warp a task, then a block for the sum.
template <class T>
struct FinishJob {
  int64_t tasks, blocks;
  const double *parts, *norm, *weight;  // [blocks, tasks], [tasks], [tasks]
  T *per_task, *total;
  double* means;
};
template <class T>
__device__ void finish_losses(const FinishJob<T>& job) {
  __shared__ double places[kWarps];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int64_t t = threadIdx.x / 32; t < job.tasks; t += kWarps) {
    double sum = 0;
#pragma unroll 4
    for (int64_t b = lane; b < job.blocks; b += 32) sum += job.parts[b * job.tasks + t];
    sum = lanes_sum<32>(sum);
    if (lane != 0) continue;
    job.means[t] = job.norm[t] > 0 ? sum / job.norm[t] : 0.0;
    job.per_task[t] = static_cast<T>(job.means[t]);
  }
  __syncthreads();
  double sum = 0;
  for (int64_t t = threadIdx.x; t < job.tasks; t += kThreads) sum += job.weight[t] * job.means[t];
  sum = block_sum(sum, places);
  if (threadIdx.x == 0) *job.total = static_cast<T>(sum);
}

// All that is left to add up: the blocks of a, then those of b, then one for the losses.
template <class Sum, class Out>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(PartsJob<Sum, Out> a, PartsJob<Sum, Out> b, FinishJob<Sum> losses) {
  const int64_t block = blockIdx.x;
  if (block < a.blocks())
    sum_parts_of(a, block);
  else if (block < a.blocks() + b.blocks())
    sum_parts_of(b, block - a.blocks());
  else
    finish_losses(losses);
}
template <class Sum, class Out>
cudaError_t finish(const PartsJob<Sum, Out>& a, const PartsJob<Sum, Out>& b, const FinishJob<Sum>& losses,
                   cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(a.blocks() + b.blocks() + 1);
  return launch(finish_kernel<Sum, Out>, dim3(blocks), dim3(kThreads), 0, stream, a, b, losses);
}

}  // namespace mtl::cuda
