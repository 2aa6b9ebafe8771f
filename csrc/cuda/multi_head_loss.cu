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
#include "library.h"
#include "logits_loss.cuh"
#include "scratch.h"
#include "warp_loss.cuh"

namespace mtl::cuda {
namespace {

const char* const kName = "multi_head_loss";

// What goes to the device with the launches: pieces of one block of bytes.
class Staging {
 public:
  // Returns the place in the block.
  int64_t add(const void* from, int64_t bytes) {
    const auto at = static_cast<int64_t>(bytes_.size());
    bytes_.resize(at + (bytes + 15) / 16 * 16);
    if (bytes) std::memcpy(bytes_.data() + at, from, bytes);
    return at;
  }
  const std::vector<char>& bytes() const { return bytes_; }

 private:
  std::vector<char> bytes_;
};

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
    for (const DeviceTask& t : tasks) add_slots(t);
    label_rows_ = label_rows;
    Staging staging;
    const bool weight_here = call.task_weight.is_cpu();
    const int64_t at_tasks = staging.add(tasks.data(), count * static_cast<int64_t>(sizeof(DeviceTask))),
                  at_reals = staging.add(call.reals.const_data_ptr(), call.reals.size(0) * 8),
                  at_weight = staging.add(call.task_weight.const_data_ptr(), weight_here ? count * 8 : 0),
                  at_slots = staging.add(slots_.data(), static_cast<int64_t>(slots_.size() * sizeof(Slot))),
                  at_warp_tasks =
                      staging.add(warp_tasks_.data(), static_cast<int64_t>(warp_tasks_.size() * sizeof(WarpTask)));
    const auto sent = static_cast<int64_t>(staging.bytes().size());
    const int64_t label_blocks = std::max<int64_t>(1, (n + kLabelRows - 1) / kLabelRows);
    job.label_step = (n + 3) / 4 * 4;  // 16 bytes, which can be copied at once
    char* staged;
    Sum* labels;
    LabelJob label_job{};
    Scratch pieces;
    pieces.add(&staged, sent);
    pieces.add(&label_job.wrong, 2);
    pieces.add(&norm_, count);
    pieces.add(&means_, count);
    pieces.add(&labels, label_rows * job.label_step);
    pieces.add(&scale_, count);
    pieces.add(&label_job.counts, count * label_blocks);
    pieces.add(&label_job.norms, count * label_blocks);
    pieces.make(call.x);
    job.tasks = reinterpret_cast<const DeviceTask*>(staged + at_tasks);
    job.reals = reinterpret_cast<const double*>(staged + at_reals);
    device_slots_ = reinterpret_cast<const Slot*>(staged + at_slots);
    device_warp_tasks_ = reinterpret_cast<const WarpTask*>(staged + at_warp_tasks);
    weight_ = weight_here ? reinterpret_cast<const double*>(staged + at_weight)
                          : static_cast<const double*>(call.task_weight.const_data_ptr());
    label_job.tasks = job.tasks;
    label_job.reals = job.reals;
    label_job.task_count = count;
    label_job.n = n;
    label_job.blocks = label_blocks;
    label_job.label_step = job.label_step;
    if (kEmulated) clear(label_job.wrong, 8, stream, kName);  // on a GPU nobody reads it
    const auto tasks_across = static_cast<unsigned>(std::min<int64_t>(count, 65535));
    const dim3 label_grid(static_cast<unsigned>(label_blocks), tasks_across);
    if (sent <= kUploadBytes) {
      Upload from{};
      std::memcpy(from.words, staging.bytes().data(), sent);
      check_launch(launch(sent_labels_kernel<Sum>, label_grid, dim3(kThreads), 0, stream, from,
                          static_cast<int>(sent / 8), reinterpret_cast<uint64_t*>(staged), label_job, labels),
                   kName);
    } else {
      send(staging.bytes().data(), sent, staged, stream, kName);
      check_launch(launch(labels_kernel<Sum>, label_grid, dim3(kThreads), 0, stream, label_job, labels), kName);
    }
    if (kEmulated && *label_job.wrong) refuse_label(call.tasks.specs[*label_job.wrong - 1], *label_job.wrong - 1, n);

    job.x = view<Element>(call.x);
    job.weight = view<Element>(call.weight);
    if (call.bias.has_value()) {
      job.bias = static_cast<const Element*>(call.bias->const_data_ptr());
      job.bias_stride = call.bias->stride(0);
    }
    job.labels = labels;
    job.norm = {job.tasks,
                call.need_gramian ? nullptr : weight_,
                label_job.counts,
                label_job.norms,
                count,
                label_blocks,
                static_cast<long long*>(call.number.mutable_data_ptr()),
                norm_};
    job.task_count = count;
    job.dx = call.need_x ? static_cast<Element*>(call.dx.mutable_data_ptr()) : nullptr;
    job.need_sums = call.need_weight || call.need_bias;
    job.scale = finishes_labels_soon(job.norm) ? nullptr : finished_labels();
    if (call.need_gramian || !(in_warps() || fused())) through_memory(tasks_across);
  }

 private:
  int64_t label_rows_ = 0;
  std::vector<Slot> slots_;
  std::vector<WarpTask> warp_tasks_;
  bool slots_fit_ = true;
  const Slot* device_slots_ = nullptr;
  const WarpTask* device_warp_tasks_ = nullptr;
  const double* weight_ = nullptr;
  double *norm_ = nullptr, *means_ = nullptr;
  Sum* scale_ = nullptr;

  // The task's fragments of eight columns, where a warp can keep its logits in registers.
  void add_slots(const DeviceTask& t) {
    const bool plain = t.loss == Loss::kCrossEntropy && t.option == 0 && t.numbers < 0;
    slots_fit_ =
        slots_fit_ && (plain || !t.counts) && static_cast<int64_t>(slots_.size()) + (t.width + 7) / 8 <= kMostSlots;
    if (slots_fit_)
      warp_tasks_.push_back({static_cast<int>(slots_.size()), static_cast<int>((t.width + 7) / 8),
                             t.counts ? static_cast<int>(t.label_row) : -1, 0.0f});
    for (int64_t c = 0; slots_fit_ && c < t.width; c += 8)
      slots_.push_back({static_cast<int>(t.begin + c), static_cast<int>(std::min<int64_t>(8, t.width - c))});
    if (!slots_fit_) slots_.clear(), warp_tasks_.clear();
  }

  const Sum* finished_labels() {
    check_launch(finish_labels<Sum>(job.norm, scale_, stream), kName);
    return scale_;
  }

  // Sums of the blocks: gradients of the parameters, and losses.
  Scratch make_parts(int64_t blocks) {
    Scratch parts;
    parts.add(&job.loss_parts, blocks * count);
    parts.add(&job.weight_parts, job.need_sums ? blocks * k * d : 0);
    parts.add(&job.bias_parts, job.need_sums ? blocks * k : 0);
    parts.make(call.x);
    return parts;
  }
  FinishJob<Sum> losses(int64_t blocks) const {
    return {count,
            blocks,
            job.loss_parts,
            norm_,
            weight_,
            static_cast<Sum*>(call.per_task.mutable_data_ptr()),
            static_cast<Sum*>(call.total.mutable_data_ptr()),
            means_};
  }
  void add_up(int64_t blocks) {
    check_launch(finish<Sum, Element>({call.need_weight ? job.weight_parts : nullptr, blocks, k * d,
                                       static_cast<Element*>(call.dw.mutable_data_ptr())},
                                      {call.need_bias ? job.bias_parts : nullptr, blocks, k,
                                       static_cast<Element*>(call.db.mutable_data_ptr())},
                                      losses(blocks), stream),
                 kName);
  }
  template <class Kernel, class Job>
  void launch_persistent(Kernel kernel, int64_t blocks, int threads, size_t shared, const Job& with) {
    // As much as there is, whatever this call takes: another thread of the host may be launching the same kernel.
    check_launch(allow_shared(kernel, static_cast<size_t>(max_shared(call.x))), kName);
    check_launch(launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), shared, stream, with), kName);
    add_up(blocks);
  }

  // One launch, logits in registers. Returns whether that could be done.
  bool in_warps() {
    if constexpr (sizeof(Element) == 2) {
      if (!slots_fit_ || n == 0 || d > 128 || d == 0) return false;
      if (slots_.size() <= 4) return d <= 64 ? in_warps_as<32, 64>() : in_warps_as<32, 128>();
      if (slots_.size() <= 8) return d <= 64 ? in_warps_as<64, 64>() : in_warps_as<64, 128>();
      return d <= 64 ? in_warps_as<128, 64>() : in_warps_as<128, 128>();
    }
    return false;
  }
  template <int K, int D>
  bool in_warps_as() {
    using Shape = WarpLossShape<Engine, K, D>;
    const size_t shared = Shape::shared(label_rows_);
    if (static_cast<int64_t>(shared) > max_shared(call.x)) return false;
    const int64_t tiles = (n + Shape::kRows - 1) / Shape::kRows;
    const int64_t blocks = std::min<int64_t>(tiles, Shape::kBlocks * multiprocessors(call.x));
    const Scratch parts = make_parts(blocks);
    launch_persistent(warp_loss_kernel<Engine, K, D>, blocks, Shape::kBlock, shared,
                      WarpLossJob<Element>{job, device_slots_, device_warp_tasks_, static_cast<int>(slots_.size()),
                                           static_cast<int>(warp_tasks_.size()), static_cast<int>(label_rows_)});
    return true;
  }

  // One launch, logits in shared memory: where that was no slower on a GPU than the library's products.
  bool fused() {
    constexpr bool kTf32 = std::is_same_v<Engine, TensorTf32>;
    if constexpr (sizeof(Sum) == 4) {
      if (n == 0 || k > (kTf32 ? 32 : 128) || d > 128 || d == 0) return false;
      if (k <= 32) return d <= 64 ? fused_as<32, 64>() : fused_as<32, 128>();
      if constexpr (!kTf32) return d <= 64 ? fused_as<128, 64>() : fused_as<128, 128>();
    }
    return false;
  }
  template <int K, int D>
  bool fused_as() {
    using Shape = FusedShape<Engine, K, D>;
    if (static_cast<int64_t>(Shape::kShared) > max_shared(call.x)) return false;
    const int64_t tiles = (n + Shape::kRows - 1) / Shape::kRows;
    const int64_t blocks = std::min<int64_t>(tiles, multiprocessors(call.x));
    const Scratch parts = make_parts(blocks);
    launch_persistent(fused_loss_kernel<Engine, K, D>, blocks, kThreads, Shape::kShared, job);
    return true;
  }
  void add_up(const Sum* parts, int64_t number, int64_t size, Tensor& out) {
    check_launch(sum_parts(parts, number, size, static_cast<Element*>(out.mutable_data_ptr()), stream), kName);
  }

  template <int kAtOnce>
  void tiles_of_logits(const LogitsJob<Element, Sum>& with, const LogitTile& tile, int64_t blocks) {
    const auto kernel = logit_tiles_kernel<Element, Sum, kAtOnce>;
    check_launch(allow_shared(kernel, static_cast<size_t>(max_shared(call.x))), kName);
    check_launch(launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), tile.shared, stream, with, tile),
                 kName);
  }

  // Losses, and gradients in the place of the logits or beside them; and the sums of their columns where those are
  // wanted. Returns whether these are there.
  bool losses_of_logits(LogitsJob<Element, Sum> with, unsigned tasks_across) {
    constexpr int64_t kMostBlocks = 1024;  // a number that no device decides, so that no sum depends on it
    TaskWidths widths{count, 0, 0};
    for (const TaskSpec& t : call.tasks.specs) {
      widths.beyond_narrow += t.width > kNarrowTask;
      widths.beyond_narrow_in_wide += t.width > kNarrowInWide;
    }
    const int at_once = widths.beyond_narrow > 0 && k % 4 == 0 ? 4 : k % 2 == 0 ? 2 : 1;
    const LogitTile tile = logit_tile<Sum>(n, widths, k, at_once);
    const bool tiled = tile.rows > 0, sums = tiled && call.need_bias;
    const int64_t rows = tiled ? tile.rows : kThreads;
    int64_t blocks = std::max<int64_t>(1, (n + rows - 1) / rows);
    if (tiled) blocks = std::min(blocks, kMostBlocks);
    Scratch parts;
    parts.add(&with.loss.loss_parts, blocks * count);
    parts.add(&with.loss.bias_parts, sums ? blocks * k : 0);
    double* task_sums;
    parts.add(&task_sums, count);
    parts.make(call.x);
    if (!sums) with.loss.bias_parts = nullptr;
    job.loss_parts = with.loss.loss_parts;
    if (!tiled)
      check_launch(launch(logits_loss_kernel<Element, Sum>, dim3(static_cast<unsigned>(blocks), tasks_across),
                          dim3(kThreads), 0, stream, with),
                   kName);
    else if (at_once == 4)
      tiles_of_logits<4>(with, tile, blocks);
    else if (at_once == 2)
      tiles_of_logits<2>(with, tile, blocks);
    else
      tiles_of_logits<1>(with, tile, blocks);
    PartsJob<Sum, Element> of_bias{};
    int64_t blocks_of_losses = blocks;
    if (sums) of_bias = {with.loss.bias_parts, blocks, k, static_cast<Element*>(call.db.mutable_data_ptr())};
    // The last launch has one block for all losses, which would be slow to add up the parts of many tasks.
    constexpr int64_t kFewTasks = 32;
    if (count > kFewTasks && blocks > 1) {
      check_launch(sum_parts(static_cast<const double*>(job.loss_parts), blocks, count, task_sums, stream), kName);
      job.loss_parts = task_sums;
      blocks_of_losses = 1;
    }
    check_launch(finish<Sum, Element>({}, of_bias, losses(blocks_of_losses), stream), kName);
    return sums;
  }

  // Logits, then losses and gradients at the logits, then a product for each gradient.
  void through_memory(unsigned tasks_across) {
    if (!job.scale) job.scale = finished_labels();
    const bool wants = gradient() || call.need_gramian, some = n > 0 && d > 0;
    constexpr bool kOne = sizeof(Element) == sizeof(Sum);
    Tensor logits = empty_on(call.x, {n, k}, call.per_task.scalar_type());
    Tensor rounded = gradient() && !kOne ? empty_on(call.x, {n, k}, call.x.scalar_type()) : logits;
    Sum* const z = static_cast<Sum*>(logits.mutable_data_ptr());
    Element* const g = static_cast<Element*>(rounded.mutable_data_ptr());
    // The library's product leaves the bias to the next kernel.
    const bool add_bias = some && library_product(call.x, turned(call.weight), logits);
    if (!add_bias)
      check_launch(
          gemm<Engine, Sum, false, false>({job.x, job.weight, job.bias, job.bias_stride, z, n, k, d}, 1, stream),
          kName);
    const bool summed = losses_of_logits(
        {job, n, k, z, gradient() && !kOne ? g : nullptr, wants, add_bias, kOne || call.need_gramian}, tasks_across);
    const auto gradients = view_of<Element>(g, n, k, k, 1);
    if (call.need_x && !(some && library_product(rounded, call.weight, call.dx)))
      check_launch(gemm<Engine, Element, false, true>({gradients, job.weight, nullptr, 0, job.dx, n, d, k}, 1, stream),
                   kName);
    const int64_t slices = row_slices(n, k, d);
    const bool own_sums = call.need_weight && !(some && library_product(turned(rounded), call.x, call.dw));
    Scratch more;
    more.add(&job.weight_parts, own_sums ? slices * k * d : 0);
    more.add(&job.bias_parts, call.need_bias && !summed ? slices * k : 0);
    more.make(call.x);
    if (own_sums) {
      check_launch(
          gemm<Engine, Sum, true, true>({gradients, job.x, nullptr, 0, job.weight_parts, k, d, n}, slices, stream),
          kName);
      add_up(job.weight_parts, slices, k * d, call.dw);
    }
    if (call.need_bias && !summed) {
      check_launch(column_sums(view_of<Sum>(z, n, k, k, 1), slices, job.bias_parts, stream), kName);
      add_up(job.bias_parts, slices, k, call.db);
    }
    if (call.need_gramian) gramian(view_of<Sum>(z, n, k, k, 1));
  }

  // G = blockwise sum of (g^T g) * (W W^T), for as many tasks at a time as keep both below 2^24 numbers. The gradients
  // are not rounded: what cancels in a sum over the rows would otherwise be lost.
  void gramian(const View<Sum>& gradients) {
    using Wide = std::conditional_t<sizeof(Sum) == 8, Exact64, Exact32>;
    const int64_t rows = std::max<int64_t>(1, (int64_t(1) << 24) / std::max<int64_t>(1, k));
    const std::vector<TaskSpec>& specs = call.tasks.specs;
    for (int64_t first = 0; first < count;) {
      int64_t last = first + 1;
      const int64_t begin = specs[first].begin;
      while (last < count && specs[last].begin + specs[last].width - begin <= rows) ++last;
      const int64_t width = specs[last - 1].begin + specs[last - 1].width - begin;
      const int64_t slices = std::max<int64_t>(1, std::min(row_slices(n, width, k), (int64_t(1) << 26) / (width * k)));
      Sum *parts, *s, *p;
      Scratch pieces;
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
  with_engine(type, tf32_allowed, [&](auto engine) { Run<decltype(engine)>{call}(); });
  return {call.per_task, call.total, call.number, call.gram, call.dx, call.dw, call.db};
}

}  // namespace
}  // namespace mtl::cuda

STABLE_TORCH_LIBRARY_IMPL(torch_mtl_pyg, MTL_CUDA_KEY, m) {
  m.impl("multi_head_loss", TORCH_BOX(&mtl::cuda::multi_head_loss));
}
