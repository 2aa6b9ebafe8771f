// Heads with losses: checks, allocation, launches. The kernels are in labels.cuh, loss_kernels.cuh and gemm.cuh.
//
//   losses [T], their weighted sum, counts [T], Gramian [T, T], dx [N, D], dW [K, D], db [K]
//
// Labels are read first, since the gradients need their number. Then one launch does the rest where the weights and
// their sums fit a block; else the logits go through global memory.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../cpu/tasks.h"
#include "engines.h"
#include "host.h"
#include "loss_kernels.cuh"

namespace mtl::cuda {
namespace {

const char* const kName = "multi_head_loss";

// Memory of one call on the device: pieces of one tensor.
class Pieces {
 public:
  template <class T>
  void add(T** place, int64_t count) {
    wanted_.push_back({reinterpret_cast<void**>(place), bytes_});
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
  }
  void make(const Tensor& like) {
    memory_.emplace(empty_on(like, {bytes_}, ScalarType::Byte));
    char* const data = static_cast<char*>(memory_->mutable_data_ptr());
    for (const auto& [place, at] : wanted_) *place = data + at;
  }

 private:
  std::vector<std::pair<void**, int64_t>> wanted_;
  int64_t bytes_ = 0;
  std::optional<Tensor> memory_;
};

void upload(const void* from, int64_t bytes, void* to, cudaStream_t stream) {
  for (int64_t at = 0; at < bytes; at += kUploadBytes) {
    Upload part{};
    const int64_t size = std::min<int64_t>(kUploadBytes, bytes - at);
    std::memcpy(part.words, static_cast<const char*>(from) + at, size);
    const int words = static_cast<int>((size + 7) / 8);
    check_launch(launch(upload_kernel, dim3(1), dim3(kThreads), 0, stream, part, words,
                        reinterpret_cast<uint64_t*>(static_cast<char*>(to) + at)),
                 kName);
  }
}

struct Call {
  const Tensor &x, &weight;
  const std::optional<Tensor>& bias;
  const Tasks& tasks;
  const Tensor& reals;
  const Tensor& task_weight;
  bool need_x, need_weight, need_bias, need_gramian;
  Tensor per_task, total, number, gram, dx, dw, db;
};

template <class Engine>
struct Run {
  using Element = typename Engine::Element;
  using Sum = typename Engine::Sum;
  Call& call;
  int64_t n, d, k, count;
  cudaStream_t stream;
  LossJob<Element, Sum> job{};

  explicit Run(Call& c)
      : call(c),
        n(c.x.size(0)),
        d(c.x.size(1)),
        k(c.weight.size(0)),
        count(static_cast<int64_t>(c.tasks.specs.size())),
        stream(stream_of(c.x)) {}

  bool gradient() const { return call.need_x || call.need_weight || call.need_bias; }

  void operator()() {
    // ---- The tasks, and their labels as numbers.
    std::vector<DeviceTask> tasks;
    int64_t label_rows = 0;
    for (const TaskSpec& t : call.tasks.specs) {
      const int64_t numbers = t.numbers ? t.numbers - static_cast<const double*>(call.reals.const_data_ptr()) : -1;
      tasks.push_back({t.begin, t.width, label_rows, numbers, t.missing, t.labels, t.option, t.numbers_sum, t.loss,
                       t.missing_number, t.counts()});
      if (t.counts()) label_rows += t.labels.columns;
    }
    const int64_t reals = call.reals.size(0), blocks = std::max<int64_t>(1, (n + kThreads - 1) / kThreads);
    DeviceTask* device_tasks;
    double *device_reals, *device_weight, *norm, *means;
    Sum *labels, *scale;
    LabelJob label_job{};
    Pieces pieces;
    pieces.add(&device_tasks, count);
    pieces.add(&device_reals, reals);
    pieces.add(&device_weight, count);
    pieces.add(&norm, count);
    pieces.add(&means, count);
    pieces.add(&labels, label_rows * n);
    pieces.add(&scale, count);
    pieces.add(&label_job.counts, count * blocks);
    pieces.add(&label_job.norms, count * blocks);
    pieces.add(&label_job.wrong, 1);
    pieces.make(call.x);
    upload(tasks.data(), count * static_cast<int64_t>(sizeof(DeviceTask)), device_tasks, stream);
    upload(call.reals.const_data_ptr(), reals * 8, device_reals, stream);
    const double* weight = static_cast<const double*>(call.task_weight.const_data_ptr());
    if (call.task_weight.is_cpu()) {
      upload(weight, count * 8, device_weight, stream);
      weight = device_weight;
    }
    const int64_t zero = 0;
    upload(&zero, 8, label_job.wrong, stream);
    label_job = {device_tasks, device_reals, count, n, blocks, label_job.counts, label_job.norms, label_job.wrong};
    const auto tasks_across = static_cast<unsigned>(std::min<int64_t>(count, 65535));
    check_launch(launch(labels_kernel<Sum>, dim3(static_cast<unsigned>(blocks), tasks_across), dim3(kThreads), 0,
                        stream, label_job, labels),
                 kName);
    if (kEmulated && *label_job.wrong) refuse_label(call.tasks.specs[*label_job.wrong - 1], *label_job.wrong - 1, n);
    check_launch(launch(finish_labels_kernel<Sum>, dim3(tasks_across), dim3(kThreads), 0, stream, label_job,
                        static_cast<const double*>(call.need_gramian ? nullptr : weight),
                        static_cast<long long*>(call.number.mutable_data_ptr()), norm, scale),
                 kName);

    job.x = view<Element>(call.x);
    job.weight = view<Element>(call.weight);
    if (call.bias.has_value()) {
      job.bias = static_cast<const Element*>(call.bias->const_data_ptr());
      job.bias_stride = call.bias->stride(0);
    }
    job.tasks = device_tasks;
    job.reals = device_reals;
    job.labels = labels;
    job.scale = scale;
    job.task_count = count;
    job.dx = call.need_x ? static_cast<Element*>(call.dx.mutable_data_ptr()) : nullptr;
    job.need_sums = call.need_weight || call.need_bias;

    // ---- The losses.
    const int64_t parts = call.need_gramian || !fused() ? through_memory(blocks, tasks_across) : fused_parts_;
    const auto finish = [&](int64_t block_count) {
      check_launch(launch(finish_losses_kernel<Sum>, dim3(1), dim3(kThreads), 0, stream, count,
                          static_cast<const double*>(job.loss_parts), block_count, int64_t(1), count,
                          static_cast<const double*>(norm), weight, static_cast<Sum*>(call.per_task.mutable_data_ptr()),
                          static_cast<Sum*>(call.total.mutable_data_ptr()), means),
                   kName);
    };
    finish(parts);
  }

 private:
  int64_t fused_parts_ = 0;
  Pieces sums_;

  // Whether one launch did everything.
  bool fused() {
    if constexpr (sizeof(Sum) == 8) {
      return false;
    } else {
      if (n == 0 || k > 128 || d > 128 || d == 0) return false;
      if (k <= 32) return d <= 64 ? fused_as<32, 64>() : fused_as<32, 128>();
      return d <= 64 ? fused_as<128, 64>() : fused_as<128, 128>();
    }
  }
  template <int K, int D>
  bool fused_as() {
    using Shape = FusedShape<Engine, K, D>;
    if (static_cast<int64_t>(Shape::kShared) > max_shared(call.x)) return false;
    const int64_t tiles = (n + Shape::kRows - 1) / Shape::kRows;
    const int64_t blocks = std::min<int64_t>(tiles, multiprocessors(call.x));
    sums_.add(&job.loss_parts, blocks * count);
    sums_.add(&job.weight_parts, job.need_sums ? blocks * k * d : 0);
    sums_.add(&job.bias_parts, job.need_sums ? blocks * k : 0);
    sums_.make(call.x);
    const auto kernel = fused_loss_kernel<Engine, K, D>;
    check_launch(allow_shared(kernel, Shape::kShared), kName);
    check_launch(launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), Shape::kShared, stream, job),
                 kName);
    if (call.need_weight) add_up(job.weight_parts, blocks, k * d, call.dw);
    if (call.need_bias) add_up(job.bias_parts, blocks, k, call.db);
    fused_parts_ = blocks;
    return true;
  }
  void add_up(const Sum* parts, int64_t number, int64_t size, Tensor& out) {
    check_launch(sum_parts(parts, number, size, static_cast<Element*>(out.mutable_data_ptr()), stream), kName);
  }

  // Logits, then losses and gradients at the logits, then a product for each gradient. Returns the number of parts.
  int64_t through_memory(int64_t blocks, unsigned tasks_across) {
    const bool wants = gradient() || call.need_gramian;
    constexpr bool kOne = sizeof(Element) == sizeof(Sum);
    Sum* z;
    Element* g;
    Pieces pieces;
    pieces.add(&z, n * k);
    pieces.add(&g, gradient() && !kOne ? n * k : 0);
    pieces.add(&job.loss_parts, blocks * count);
    pieces.make(call.x);
    if (kOne) g = reinterpret_cast<Element*>(z);
    check_launch(gemm<Engine, Sum, false, false>({job.x, job.weight, job.bias, job.bias_stride, z, n, k, d}, 1, stream),
                 kName);
    check_launch(launch(logits_loss_kernel<Element, Sum>, dim3(static_cast<unsigned>(blocks), tasks_across),
                        dim3(kThreads), 0, stream, job, n, k, z, gradient() ? g : nullptr, wants),
                 kName);
    sums_ = std::move(pieces);  // the parts of the losses are still to be added
    const auto gradients = view_of<Element>(g, n, k, k, 1);
    if (call.need_x)
      check_launch(gemm<Engine, Element, false, true>({gradients, job.weight, nullptr, 0, job.dx, n, d, k}, 1, stream),
                   kName);
    const int64_t slices = row_slices(n, k, d);
    Pieces more;
    more.add(&job.weight_parts, call.need_weight ? slices * k * d : 0);
    more.add(&job.bias_parts, call.need_bias ? slices * k : 0);
    more.make(call.x);
    if (call.need_weight) {
      check_launch(
          gemm<Engine, Sum, true, true>({gradients, job.x, nullptr, 0, job.weight_parts, k, d, n}, slices, stream),
          kName);
      add_up(job.weight_parts, slices, k * d, call.dw);
    }
    if (call.need_bias) {
      check_launch(column_sums(view_of<Sum>(z, n, k, k, 1), slices, job.bias_parts, stream), kName);
      add_up(job.bias_parts, slices, k, call.db);
    }
    if (call.need_gramian) gramian(view_of<Sum>(z, n, k, k, 1));
    return blocks;
  }

  // G = blockwise sum of (g^T g) * (W W^T), for as many tasks at a time as keep both below 2^24 numbers. The gradients
  // are not rounded: what cancels in a sum over the rows would otherwise be lost.
  void gramian(const View<Sum>& gradients) {
    using Wide = std::conditional_t<sizeof(Sum) == 8, Exact64, Exact32>;
    const int64_t rows = std::max<int64_t>(1, (int64_t(1) << 24) / k);
    const std::vector<TaskSpec>& specs = call.tasks.specs;
    for (int64_t first = 0; first < count;) {
      int64_t last = first + 1;
      const int64_t begin = specs[first].begin;
      while (last < count && specs[last].begin + specs[last].width - begin <= rows) ++last;
      const int64_t width = specs[last - 1].begin + specs[last - 1].width - begin;
      const int64_t slices = std::max<int64_t>(1, std::min(row_slices(n, width, k), (int64_t(1) << 26) / (width * k)));
      Sum *parts, *s, *p;
      Pieces pieces;
      pieces.add(&parts, slices * width * k);
      pieces.add(&s, width * k);
      pieces.add(&p, width * k);
      pieces.make(call.x);
      View<Sum> own = gradients;
      View<Element> rows_of = job.weight;
      own.data += begin;
      own.cols = width;
      own.aligned = own.aligned && begin * sizeof(Sum) % 16 == 0 && width * sizeof(Sum) % 16 == 0;
      rows_of.data += begin * rows_of.row_stride;
      rows_of.rows = width;
      rows_of.aligned = rows_of.aligned && reinterpret_cast<uintptr_t>(rows_of.data) % 16 == 0;
      check_launch(gemm<Wide, Sum, true, true>({own, gradients, nullptr, 0, parts, width, k, n}, slices, stream),
                   kName);
      check_launch(sum_parts(parts, slices, width * k, s, stream), kName);
      check_launch(gemm<Engine, Sum, false, false>({rows_of, job.weight, nullptr, 0, p, width, k, d}, 1, stream),
                   kName);
      const int64_t pairs = (last - first) * count;
      const auto blocks = static_cast<unsigned>(std::clamp<int64_t>((pairs + kWarps - 1) / kWarps, 1, 65536));
      check_launch(launch(gramian_kernel<Sum>, dim3(blocks), dim3(kThreads), 0, stream, job.tasks, count, first, last,
                          k, static_cast<const Sum*>(s), static_cast<const Sum*>(p),
                          static_cast<Sum*>(call.gram.mutable_data_ptr())),
                   kName);
      first = last;
    }
  }
};

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Results multi_head_loss(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                        const std::vector<Tensor>& targets, const Tensor& integers, const Tensor& reals,
                        const Tensor& task_weight, bool need_x, bool need_weight, bool need_bias, bool need_gramian) {
  const DType type = dtype_of(x, "x");
  check_device_matrix(x, "x", type, x);
  check_device_matrix(weight, "weight", type, x);
  check_size(weight.size(1), x.size(1), "weight: size of dimension 1");
  const Tasks tasks(integers, reals, targets, x, type);
  const int64_t count = static_cast<int64_t>(tasks.specs.size()), n = x.size(0), d = x.size(1), k = weight.size(0);
  check_size(k, tasks.k, "weight: size of dimension 0");
  STD_TORCH_CHECK(task_weight.dim() == 1 && task_weight.size(0) == count && task_weight.is_contiguous() &&
                      task_weight.scalar_type() == ScalarType::Double &&
                      (task_weight.is_cpu() || beside(task_weight, x)),
                  "task_weight: expected a contiguous vector [", count, "] of float64, on the CPU or the device of x");
  if (bias.has_value()) check_device_vector(*bias, "bias", type, x, k);
  STD_TORCH_CHECK(!need_gramian || !(need_x || need_weight || need_bias),
                  "need_gramian: expected no gradients together with the Gramian");
  const DeviceGuard guard(x);
  const ScalarType wide = type == DType::kFloat64 ? ScalarType::Double : ScalarType::Float, own = x.scalar_type();
  using Sizes = std::vector<int64_t>;
  Call call{x,
            weight,
            bias,
            tasks,
            reals,
            task_weight,
            need_x,
            need_weight,
            need_bias,
            need_gramian,
            empty_on(x, {count}, wide),
            empty_on(x, {}, wide),
            empty_on(x, {count}, ScalarType::Long),
            empty_on(x, need_gramian ? Sizes{count, count} : Sizes{0}, wide),
            empty_on(x, need_x ? Sizes{n, d} : Sizes{0}, own),
            empty_on(x, need_weight ? Sizes{k, d} : Sizes{0}, own),
            empty_on(x, {need_bias ? k : 0}, own)};
  with_engine(type, false, [&](auto engine) { Run<decltype(engine)>{call}(); });
  return {call.per_task, call.total, call.number, call.gram, call.dx, call.dw, call.db};
}

}  // namespace
}  // namespace mtl::cuda

STABLE_TORCH_LIBRARY_IMPL(torch_mtl_pyg, MTL_CUDA_KEY, m) {
  m.impl("multi_head_loss", TORCH_BOX(&mtl::cuda::multi_head_loss));
}
