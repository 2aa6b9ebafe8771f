// Heads with hidden layers, chunk of rows by chunk, so that what is on the way takes at most about 64 MiB, whatever the
// number of rows: the launches of one call. The kernels are in heads_products.cuh, heads_losses.cuh and routes.cuh.
#pragma once

#include <optional>
#include <vector>

#include "heads_host.h"
#include "heads_losses.cuh"
#include "heads_products.cuh"
#include "scratch.h"

namespace mtl::cuda {
namespace {

// What a call computes, and where it puts it. Null: not wanted.
struct Wanted {
  void* out = nullptr;  // outputs alone
  int64_t out_columns = 0;
  void* dx = nullptr;
  void* flat = nullptr;  // gradients of the parameters, [numbers]
  // Losses, if there are any, with counts; and the Gramian.
  void *per_task = nullptr, *total = nullptr, *number = nullptr, *gram = nullptr;
};

struct Call {
  const char* name;
  const Tensor& x;
  const Layers& layers;
  const Tasks& tasks;
  const std::optional<Tensor>& route;
  const Tensor *reals, *task_weight;  // of losses
  const std::vector<Tensor>* grads;   // from outside
  int64_t given;                      // label columns of routed rows
  Wanted wanted;
};

template <class Engine>
struct HeadsRun {
  using Element = typename Engine::Element;
  using Sum = typename Engine::Sum;
  const Call& call;
  const Layers& layers;
  const Wanted& wanted;
  const int64_t n, d, count, depth, k;
  const bool routed, losses, parameters, gramian, gradient, needs_dx;
  const int64_t numbers_of_chunk = chunk_bytes() / static_cast<int64_t>(sizeof(Sum));
  const cudaStream_t stream;

  // Of the whole call.
  Scratch memory;
  int64_t* begins = nullptr;  // [tasks + 1]: the columns of the logits
  DeviceTask* tasks = nullptr;
  int64_t sources = 0;  // of gradients from outside
  double *reals = nullptr, *device_weight = nullptr, *norm = nullptr, *means = nullptr, *loss_parts = nullptr,
         *square_parts = nullptr, *products = nullptr, *task_losses = nullptr;
  const double* weight = nullptr;
  Sum *labels = nullptr, *scale = nullptr, *sums = nullptr;
  RouteJob route{};
  Piece* pieces = nullptr;
  LabelJob label_job{};
  RoutedLabelJob routed_label_job{};
  int64_t slots = 0, blocks = 0, loss_blocks = 0, widest_logits = 0;
  // Of a chunk.
  Scratch chunk_memory;
  std::vector<Sum*> h, slope;
  Sum *z = nullptr, *jacobian = nullptr, *parts = nullptr;
  int64_t chunk_size = 0;  // rows or pieces
  ChunkRows chunk{};

  explicit HeadsRun(const Call& c)
      : call(c),
        layers(c.layers),
        wanted(c.wanted),
        n(c.x.size(0)),
        d(c.x.size(1)),
        count(c.layers.tasks),
        depth(c.layers.depth),
        k(c.tasks.k),
        routed(c.route.has_value()),
        losses(c.wanted.per_task),
        parameters(c.wanted.flat),
        gramian(c.wanted.gram),
        gradient(c.wanted.dx || c.wanted.flat || c.wanted.gram),
        needs_dx(c.wanted.dx || c.wanted.gram),
        stream(stream_of(c.x)) {}

  void operator()() {
    plan();
    if (routed) sort_rows();
    if (losses) read_labels();
    const int64_t all = routed ? slots : n;
    for (int64_t first = 0; first < all; first += chunk_size) {
      const int64_t size = std::min(chunk_size, all - first);
      chunk = {routed ? pieces + first : nullptr, route.order, routed ? 0 : first, size};
      forward();
      if (wanted.out) continue;
      if (call.grads)
        gradients_from_outside();
      else
        chunk_losses(first);
      if (gradient) backward(first);
    }
    finish();
  }

 private:
  void check(cudaError_t error) const { check_launch(error, call.name); }
  unsigned across(int64_t items) const { return static_cast<unsigned>(std::min<int64_t>(items, 65535)); }
  unsigned blocks_for(int64_t items, int64_t each) const {
    const int64_t number = (items + each - 1) / each;
    STD_TORCH_CHECK(number <= INT32_MAX, call.name, ": too large for a launch");
    return static_cast<unsigned>(number);
  }
  int64_t loss_rows() const { return std::min<int64_t>(chunk_size, kPieceRows); }  // of a block
  // The first layer of all tasks is one product where every row goes through every head.
  bool joint(int64_t layer) const { return layer == 0 && !routed; }
  int64_t columns(int64_t layer) const {  // of a row in scratch memory
    if (layers.last(layer)) return routed ? widest_logits : k;
    return routed ? layers.units(layer) : layers.rows[layer];
  }
  LayerPlace place(int64_t layer, bool together) const {
    if (together) return {nullptr, layers.rows[layer]};
    return layers.last(layer) ? LayerPlace{begins, 0} : LayerPlace{nullptr, layers.units(layer)};
  }
  int64_t widest(int64_t layer, bool together) const {
    return together ? layers.rows[layer] : layers.last(layer) ? widest_logits : layers.units(layer);
  }
  int64_t batch(bool together) const { return together || routed ? 1 : count; }
  View<Sum> scratch_view(const Sum* data, int64_t columns) const {
    return view_of<Sum>(data, (routed ? chunk.count * kPieceRows : chunk.count), columns, columns, 1);
  }

  void plan();
  void sort_rows();
  void read_labels();
  void forward();
  void gradients_from_outside();
  void chunk_losses(int64_t first);
  void backward(int64_t first);
  void layer_sums(int64_t layer, const View<Sum>& g, int64_t first);
  void add_up(int64_t items, int64_t part_size, int64_t layer, bool together, int64_t inputs, int64_t size, Sum* to,
              int64_t first);
  void add_gramian(int64_t first);
  void finish();
};

// ---- Memory, and what the device has to know.
template <class Engine>
void HeadsRun<Engine>::plan() {
  const std::vector<TaskSpec>& specs = call.tasks.specs;
  std::vector<int64_t> borders{0};
  for (const TaskSpec& t : specs) {
    borders.push_back(t.begin + t.width);
    widest_logits = std::max(widest_logits, t.width);
  }
  std::vector<DeviceTask> table;
  int64_t label_rows = 0;
  const auto add = [&](const TaskSpec& t) {
    const int64_t numbers =
        t.numbers ? t.numbers - static_cast<const double*>(call.reals->const_data_ptr()) : int64_t(-1);
    table.push_back({t.begin, t.width, label_rows, numbers, t.missing, t.labels, t.option, t.numbers_sum, t.loss,
                     t.missing_number, t.counts()});
    if (t.counts()) label_rows += t.labels.columns;
  };
  if (call.grads && call.grads->size() == 1 && !routed) {  // one matrix of all columns
    TaskSpec all = specs[0];
    all.width = all.labels.columns = k;
    add(all);
  } else if (losses || call.grads) {
    for (const TaskSpec& t : specs) add(t);
  }
  sources = static_cast<int64_t>(table.size());
  if (routed) {  // the labels of a row lie in its place among all rows
    label_rows = 0;
    for (const TaskSpec& t : specs)
      if (t.counts()) label_rows = std::max(label_rows, std::min(t.labels.columns, call.given));
    slots = piece_slots(n, count);
  }
  blocks = routed ? slots : std::max<int64_t>(1, (n + kLabelRows - 1) / kLabelRows);
  const int64_t real_count = losses ? call.reals->size(0) : 0, per_block = routed ? 1 : count;

  memory.add(&begins, count + 1);
  memory.add(&tasks, sources);
  if (losses) {
    memory.add(&reals, real_count);
    memory.add(&device_weight, count);
    memory.add(&norm, count);
    memory.add(&means, count);
    memory.add(&task_losses, count);
    memory.add(&labels, label_rows * n);
    memory.add(&scale, count);
    memory.add(&label_job.counts, blocks * per_block);
    memory.add(&label_job.norms, blocks * per_block);
    memory.add(&label_job.wrong, 2);
    memory.add(&square_parts, gramian && routed ? slots : 0);
    memory.add(&products, gramian && !routed ? count * count : 0);
  }
  if (routed) {
    route.n = n;
    route.tasks = count;
    route.slices = route_slices(n, count);
    route.route = static_cast<const int64_t*>(call.route->const_data_ptr());
    route.stride = call.route->stride(0);
    memory.add(&route.places, route.slices * count);
    memory.add(&route.begin, count + 1);
    memory.add(&route.piece_begin, count + 1);
    memory.add(&route.order, n);
    memory.add(&route.wrong, 2);
    memory.add(&pieces, slots);
  }
  // Sums and elements may be one type: then the sums are where they belong.
  memory.add(&sums, parameters && sizeof(Sum) != sizeof(Element) ? layers.numbers : 0);
  memory.make(call.x);
  send(borders.data(), (count + 1) * 8, begins, stream, call.name);
  send(table.data(), sources * static_cast<int64_t>(sizeof(DeviceTask)), tasks, stream, call.name);
  if (losses) {
    send(call.reals->const_data_ptr(), real_count * 8, reals, stream, call.name);
    weight = static_cast<const double*>(call.task_weight->const_data_ptr());
    if (call.task_weight->is_cpu()) {
      send(weight, count * 8, device_weight, stream, call.name);
      weight = device_weight;
    }
    clear(label_job.wrong, 8, stream, call.name);
    clear(products, gramian && !routed ? static_cast<size_t>(count * count) * 8 : 0, stream, call.name);
  }
  if (parameters) {
    if constexpr (sizeof(Sum) == sizeof(Element)) sums = static_cast<Sum*>(wanted.flat);
    clear(sums, static_cast<size_t>(layers.numbers) * sizeof(Sum), stream, call.name);
  }

  // ---- Chunks.
  int64_t row = 0;  // numbers of a row on the way
  for (int64_t layer = 0; layer + 1 < depth; ++layer) row += columns(layer) * (gradient ? 2 : 1);
  if (!wanted.out) row += columns(depth - 1);
  const int64_t of_jacobian = !gramian ? 0 : routed ? d : count * d;
  row = std::max<int64_t>(1, row + of_jacobian);
  int64_t part_numbers = 0, piece_numbers = 0;
  if (parameters)
    for (int64_t layer = 0; layer < depth; ++layer)
      piece_numbers = std::max(piece_numbers, columns(layer) * std::max<int64_t>(1, layers.inputs[layer]));
  const int64_t most = numbers_of_chunk;
  if (routed) {
    chunk_size = std::clamp<int64_t>(most / (row * kPieceRows + piece_numbers), 1, std::max<int64_t>(1, slots));
    part_numbers = chunk_size * piece_numbers;
  } else {
    chunk_size = std::clamp<int64_t>(most / row, 32, int64_t(1) << 20);
    if (chunk_size > kPieceRows) chunk_size = chunk_size / kPieceRows * kPieceRows;
    chunk_size = std::min(chunk_size, std::max<int64_t>(1, n));
    for (int64_t layer = 0; layer < depth && parameters; ++layer)
      part_numbers = std::max(part_numbers, row_slices(chunk_size, layers.rows[layer], layers.inputs[layer]) *
                                                layers.rows[layer] * std::max<int64_t>(1, layers.inputs[layer]));
  }
  if (gramian && !routed) part_numbers = std::max(part_numbers, most / 4 + count * count);
  const int64_t chunk_rows = routed ? chunk_size * kPieceRows : chunk_size;
  h.assign(depth, nullptr);
  slope.assign(depth, nullptr);
  for (int64_t layer = 0; layer + 1 < depth; ++layer) {
    chunk_memory.add(&h[layer], chunk_rows * columns(layer));
    if (gradient) chunk_memory.add(&slope[layer], chunk_rows * columns(layer));
  }
  chunk_memory.add(&z, wanted.out ? 0 : chunk_rows * columns(depth - 1));
  chunk_memory.add(&jacobian, chunk_rows * of_jacobian);
  chunk_memory.add(&parts, part_numbers);
  // Chunks have whole blocks of rows, or less than one.
  loss_blocks = routed ? slots : (n + loss_rows() - 1) / loss_rows();
  chunk_memory.add(&loss_parts, losses ? loss_blocks * per_block : 0);
  chunk_memory.make(call.x);
}

template <class Engine>
void HeadsRun<Engine>::sort_rows() {
  clear(route.wrong, 8, stream, call.name);
  clear(route.places, static_cast<size_t>(route.slices * count) * 8, stream, call.name);
  const dim3 by_slices(blocks_for(route.slices, kWarps)), threads(kThreads);
  check(launch(count_routes_kernel<>, by_slices, threads, 0, stream, route));
  if (kEmulated && *route.wrong)
    for (int64_t r = 0; r < n; ++r) {
      const int64_t t = route.route[r * route.stride];
      STD_TORCH_CHECK(t >= 0 && t < count, "route: expected tasks in [0, ", count, "), got another in row ", r);
    }
  check(launch(route_places_kernel<>, dim3(blocks_for(count, kWarps)), threads, 0, stream, route));
  check(launch(route_begins_kernel<>, dim3(1), threads, 0, stream, route));
  check(launch(place_routes_kernel<>, by_slices, threads, 0, stream, route));
  check(launch(pieces_kernel<>, dim3(blocks_for(slots, kThreads)), threads, 0, stream, route, slots, pieces));
}

template <class Engine>
void HeadsRun<Engine>::read_labels() {
  const dim3 threads(kThreads);
  long long* const number = static_cast<long long*>(wanted.number);
  const double* const v = gramian ? nullptr : weight;
  const std::vector<TaskSpec>& specs = call.tasks.specs;
  if (!routed) {
    label_job = {tasks, reals, count, n, blocks, n, label_job.counts, label_job.norms, label_job.wrong};
    check(launch(labels_kernel<Sum>, dim3(static_cast<unsigned>(blocks), across(count)), threads, 0, stream, label_job,
                 labels));
    if (kEmulated && *label_job.wrong) refuse_label(specs[*label_job.wrong - 1], *label_job.wrong - 1, n);
    check(
        finish_labels<Sum>({tasks, v, label_job.counts, label_job.norms, count, blocks, number, norm}, scale, stream));
    return;
  }
  routed_label_job = {
      pieces,          route.order,     route.piece_begin,  tasks, reals, n, call.given, label_job.counts,
      label_job.norms, label_job.wrong, label_job.wrong + 1};
  check(launch(routed_labels_kernel<Sum>, dim3(static_cast<unsigned>(slots)), threads, 0, stream, routed_label_job,
               labels));
  if (kEmulated) {
    const int64_t narrow = routed_label_job.narrow[0] - 1, wrong = routed_label_job.wrong[0] - 1;
    STD_TORCH_CHECK(narrow < 0, "targets: expected ", specs[std::max<int64_t>(0, narrow)].labels.columns,
                    " labels a row for task ", narrow, ", got ", call.given);
    STD_TORCH_CHECK(wrong < 0, "targets: expected other labels for task ", wrong);
  }
  check(launch(finish_routed_labels_kernel<Sum>, dim3(across(count)), threads, 0, stream, routed_label_job, count, v,
               number, norm, scale));
}

// ---- What comes out of all chunks.
template <class Engine>
void HeadsRun<Engine>::finish() {
  const dim3 threads(kThreads);
  if (parameters && sizeof(Sum) != sizeof(Element) && layers.numbers > 0)
    check(sum_parts(static_cast<const Sum*>(sums), 1, layers.numbers, static_cast<Element*>(wanted.flat), stream));
  if (!losses) return;
  const double* of_tasks = loss_parts;
  if (routed) {
    check(launch(task_sums_kernel<double>, dim3(across(count)), threads, 0, stream,
                 static_cast<const double*>(loss_parts), static_cast<const int64_t*>(route.piece_begin), count,
                 int64_t(1), task_losses));
    of_tasks = task_losses;
  }
  check(cuda::finish<Sum, Element>({}, {},
                                   {count, routed ? int64_t(1) : loss_blocks, of_tasks, norm, weight,
                                    static_cast<Sum*>(wanted.per_task), static_cast<Sum*>(wanted.total), means},
                                   stream));
  if (!gramian) return;
  Sum* const gram = static_cast<Sum*>(wanted.gram);
  if (!routed) {
    check(sum_parts(static_cast<const double*>(products), 1, count * count, gram, stream));
    return;
  }
  clear(gram, static_cast<size_t>(count * count) * sizeof(Sum), stream, call.name);
  check(launch(task_sums_kernel<Sum>, dim3(across(count)), threads, 0, stream, static_cast<const double*>(square_parts),
               static_cast<const int64_t*>(route.piece_begin), count, count + 1, gram));
}

}  // namespace
}  // namespace mtl::cuda
