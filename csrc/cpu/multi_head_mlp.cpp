// Heads with hidden layers, and rows routed to one head each, on the CPU: checks, allocation, sharing out the rows.
// What happens in a tile of rows is in heads_tile.h.
//
//   multi_head_mlp           outputs [N, K], or routed [N, max C]
//   multi_head_mlp_backward  dx [N, D] and the gradients of all parameters, from those of the outputs
//   multi_head_mlp_loss      losses [T], their weighted sum, counts [T], Gramian [T, T], and the same gradients
//
// Determinism: the rows, or those of each task, are cut into pieces that depend on the shape and the route alone, and
// the sums of the pieces are added in order, so every result is bitwise equal whatever the number of threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "heads_host.h"
#include "isa.h"
#include "routes.h"

namespace mtl {
namespace {

using torch::stable::parallel_for;

// What a run computes, and where it puts it. Null: not wanted.
struct Wanted {
  bool losses = false, parameters = false, gramian = false;
  void* out = nullptr;
  int64_t out_columns = 0;
  void* dx = nullptr;
  void* flat = nullptr;  // gradients of the parameters, [numbers]
};
struct Found {
  std::vector<double> loss, gramian;
  std::vector<int64_t> count;
  std::vector<double> norm;
};

struct Run {
  const Kernels& k;
  const Layers& layers;
  const Tasks& tasks;
  Matrix x;
  Wanted wanted;
  const double* weight;  // of the tasks; null: gradients from outside
  HeadsJob job;
  std::vector<double> scale;
  Found found;

  int64_t acc() const { return accumulator_bytes(layers.type); }
  int64_t count() const { return layers.tasks; }
  bool same_type() const { return element_bytes(layers.type) == acc(); }

  // The job, but for what depends on the groups.
  void prepare(bool routed) {
    scale.assign(count(), 1.0);
    found.count.assign(count(), 0);
    found.norm.assign(count(), 0.0);
    found.loss.assign(count(), 0.0);
    job.loss = {};
    job.loss.k = tasks.k;
    job.loss.d = x.cols;
    job.loss.tasks = tasks.specs.data();
    job.loss.scale = scale.data();
    job.loss.label_matrix = routed ? Labels{} : tasks.matrix;
    job.loss.need_x = wanted.dx != nullptr;
    job.loss.need_weight = job.loss.need_bias = wanted.parameters;
    job.loss.need_gramian = wanted.gramian;
    job.heads = layers.spec;
    job.widest_units = layers.widest_units();
    job.routed = routed;
    job.x_in_place = same_type() && (x.col_stride == 1 || x.cols <= 1);
    job.needs_dx = wanted.dx != nullptr || (routed && wanted.gramian);
    job.dx_in_place = same_type() && wanted.dx != nullptr;
    job.gradient = job.needs_dx || wanted.parameters || wanted.gramian;
    job.out = wanted.out;
    job.out_columns = wanted.out_columns;
  }
  // Rows of a tile: more than the second-level cache keeps, since the weights and their sums pass by once for each
  // tile.
  int64_t rows_that_fit(int64_t hidden, int64_t logits) const {
    constexpr int64_t kTileBytes = 640 << 10, kMost = 192, kLeast = 32;
    const int64_t layered = (layers.depth - 1) * hidden;
    const int64_t row = acc() * (2 * x.cols + (job.gradient ? 3 : 1) * layered + logits);
    return std::clamp<int64_t>(kTileBytes / std::max<int64_t>(1, row) / 16 * 16, kLeast, kMost);
  }
  // Factors of the gradients, once the labels are counted.
  void set_scale() {
    for (int64_t t = 0; t < count(); ++t) {
      if (tasks.specs[t].loss == Loss::kOutside) continue;
      const double v = weight && !wanted.gramian ? weight[t] : 1.0;
      scale[t] = found.norm[t] > 0 ? v / found.norm[t] : 0.0;
    }
  }
  // The number of labels stands for the sum of their weights where there are none.
  void finish_counts() {
    for (int64_t t = 0; t < count(); ++t)
      if (tasks.specs[t].loss != Loss::kCrossEntropy || !tasks.specs[t].numbers)
        found.norm[t] = static_cast<double>(found.count[t]);
  }

  void all();
  void routed(const Routes& routes);

 private:
  void count_all(int64_t slices);
  void count_routed(const Routes& routes, const std::vector<Piece>& pieces);
};

// ---- Every row through every head.

// Whole tasks side by side, as many as stay in the cache with their tile; for the Gramian each one alone.
std::vector<std::pair<int64_t, int64_t>> groups_of(const Layers& layers, const Tasks& tasks, bool alone) {
  constexpr int64_t kColumns = 192;
  const int64_t units = layers.depth > 1 ? layers.widest_units() : 0;
  std::vector<std::pair<int64_t, int64_t>> groups;
  for (int64_t t = 0; t < layers.tasks; ++t) {
    const bool more = !groups.empty() && !alone && (t + 1 - groups.back().first) * units <= kColumns &&
                      tasks.specs[t].begin + tasks.specs[t].width - tasks.specs[groups.back().first].begin <= kColumns;
    if (more)
      groups.back().second = t + 1;
    else
      groups.emplace_back(t, t + 1);
  }
  return groups;
}

void Run::count_all(int64_t slices) {
  const int64_t n = x.rows;
  std::vector<int64_t> counts(slices * count(), 0), wrong(slices, -1);
  std::vector<double> norms(slices * count(), 0.0);
  parallel_for(0, slices, grain(16 * count() * n / slices), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      wrong[i] = k.count_labels(job.loss, count(), n * i / slices, n * (i + 1) / slices, &counts[i * count()],
                                &norms[i * count()]);
  });
  for (int64_t task : wrong)
    if (task >= 0) refuse_label(tasks.specs[task], task, n);
  for (int64_t i = 0; i < slices; ++i)
    for (int64_t t = 0; t < count(); ++t) {
      found.count[t] += counts[i * count() + t];
      found.norm[t] += norms[i * count() + t];
    }
  finish_counts();
}

void Run::all() {
  prepare(false);
  const int64_t n = x.rows, numbers = wanted.parameters ? layers.numbers : 0;
  const auto spans = groups_of(layers, tasks, wanted.gramian);
  const int64_t groups = static_cast<int64_t>(spans.size());
  int64_t widest_hidden = 0, widest_logits = 0;
  for (const auto& [first, last] : spans) {
    widest_hidden = std::max(widest_hidden, (last - first) * job.widest_units);
    widest_logits =
        std::max(widest_logits, tasks.specs[last - 1].begin + tasks.specs[last - 1].width - tasks.specs[first].begin);
  }
  job.widest_hidden = widest_hidden;
  job.loss.widest_group = widest_logits;
  job.loss.group_count = groups;
  int64_t tile_rows = rows_that_fit(widest_hidden, widest_logits);
  if (wanted.gramian)  // the tile holds a Jacobian
    tile_rows = std::clamp<int64_t>((256 << 10) / std::max<int64_t>(1, acc() * groups * x.cols), 8, tile_rows);
  // A slice costs sums of its own, written and read once.
  const int64_t sums = numbers + (wanted.gramian ? count() * count() : 0);
  const int64_t wished = std::min(n / (sums > 65536 ? 192 : 64), std::max<int64_t>(16, n / 1024));
  int64_t slices = std::clamp<int64_t>(wished, 1, 32);
  slices = std::clamp<int64_t>((int64_t(1) << 24) / std::max<int64_t>(1, sums), 1, slices);
  if (slices > 1 && slices % 2) --slices;  // few threads get equal shares
  tile_rows = std::max<int64_t>(1, std::min(tile_rows, (n + slices - 1) / slices));
  job.tile_rows = job.loss.tile_rows = tile_rows;
  if (wanted.losses) count_all(slices);
  set_scale();

  std::vector<PackedGroup> packed(groups);
  std::vector<Buffer> memory(groups);
  std::vector<HeadsGroup> list(groups);
  parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const auto [first, last] = spans[g];
      memory[g] = make_buffer(PackedGroup::bytes(k, layers, tasks, first, last));
      packed[g].pack(k, layers, tasks, first, last, job.gradient, job.needs_dx || wanted.gramian, memory[g].get());
      list[g] = packed[g].group();
    }
  });
  const bool direct = slices == 1 && same_type();
  const Buffer parts = direct || !numbers ? Buffer() : make_buffer(slices * numbers * acc());
  std::vector<double> loss(slices * count(), 0.0), gramian(wanted.gramian ? slices * count() * count() : 0, 0.0);
  const int64_t work = n * count() * (layers.hidden_work() + 1) + n * tasks.k * (layers.sizes.back() + 8);
  parallel_for(0, slices, grain(work / slices), [&](int64_t begin, int64_t end) {
    const Buffer scratch = make_buffer(k.heads_scratch_bytes(layers.type, job));
    for (int64_t slice = begin; slice < end; ++slice) {
      char* const own = static_cast<char*>(direct ? wanted.flat : parts.get()) + (direct ? 0 : slice * numbers * acc());
      std::vector<void*> weights(layers.depth, nullptr), biases(layers.depth, nullptr);
      if (numbers) {
        std::memset(own, 0, numbers * acc());
        for (int64_t layer = 0; layer < layers.depth; ++layer) {
          weights[layer] = own + layers.weight_place[layer] * acc();
          if (!layers.biases.empty()) biases[layer] = own + layers.bias_place[layer] * acc();
        }
      }
      const HeadsSums into{&loss[slice * count()], weights.data(), biases.data(), 0,
                           wanted.gramian ? &gramian[slice * count() * count()] : nullptr};
      const int64_t first = n * slice / slices, end_row = n * (slice + 1) / slices, rows = end_row - first;
      const int64_t tiles = std::max<int64_t>(1, (rows + tile_rows - 1) / tile_rows);
      const int64_t step = std::min(tile_rows, ((rows + tiles - 1) / tiles + 15) / 16 * 16);
      for (int64_t r = first; r < end_row; r += step)
        k.heads_tile(layers.type, job, list.data(), groups, {x, nullptr, r, std::min(step, end_row - r), wanted.dx},
                     into, scratch.get());
    }
  });
  if (numbers && !direct)
    parallel_for(0, numbers, grain(4 * slices), [&](int64_t begin, int64_t end) {
      k.sum_parts(layers.type, parts.get(), slices, numbers, begin, end, wanted.flat);
    });
  for (int64_t slice = 0; slice < slices; ++slice)
    for (int64_t t = 0; t < count(); ++t) found.loss[t] += loss[slice * count() + t];
  found.gramian.assign(wanted.gramian ? count() * count() : 0, 0.0);
  for (size_t i = 0; i < gramian.size(); ++i) found.gramian[i % (count() * count())] += gramian[i];
}

// ---- Each row through the head of its own task.

void Run::count_routed(const Routes& routes, const std::vector<Piece>& pieces) {
  constexpr int64_t kRows = 512;
  const int64_t size = static_cast<int64_t>(pieces.size());
  std::vector<int64_t> counts(size, 0), wrong(size, 0);
  std::vector<double> norms(size, 0.0);
  share_out(
      pieces, [](const Piece& piece) { return 16.0 * static_cast<double>(piece.rows); },
      [&](int64_t begin, int64_t end) {
        double labels[kRows];
        for (int64_t i = begin; i < end; ++i) {
          const Piece& piece = pieces[i];
          const TaskSpec& task = tasks.specs[piece.task];
          if (!task.counts()) continue;
          // The same task with labels that lie in order, one column at a time.
          TaskSpec own = task;
          own.labels = {labels, LabelType::kFloat64, 1, 0, 1};
          LossJob one{};
          one.tasks = &own;
          for (int64_t c = 0; c < task.labels.columns; ++c)
            for (int64_t r0 = 0; r0 < piece.rows; r0 += kRows) {
              const int64_t rows = std::min(kRows, piece.rows - r0);
              const int64_t* order = routes.order() + piece.first + r0;
              with_label_type(task.labels, [&](auto* in) {
                for (int64_t r = 0; r < rows; ++r)
                  labels[r] = static_cast<double>(
                      label_value(in[order[r] * task.labels.row_stride + c * task.labels.col_stride]));
              });
              if (k.count_labels(one, 1, 0, rows, &counts[i], &norms[i]) >= 0) wrong[i] = 1;
            }
        }
      });
  for (int64_t i = 0; i < size; ++i) {
    STD_TORCH_CHECK(!wrong[i], "targets: expected other labels for task ", pieces[i].task);
    found.count[pieces[i].task] += counts[i];
    found.norm[pieces[i].task] += norms[i];
  }
  finish_counts();
}

void Run::routed(const Routes& routes) {
  prepare(true);
  const int64_t depth = layers.depth;
  const std::vector<Piece> pieces = pieces_of(routes, wanted.parameters ? layers.numbers : 0);
  const int64_t size = static_cast<int64_t>(pieces.size());
  int64_t widest_logits = 0, most_rows = 1, most_bytes = 0;
  for (const Piece& piece : pieces) {
    widest_logits = std::max(widest_logits, tasks.specs[piece.task].width);
    most_rows = std::max(most_rows, piece.rows);
    if (piece.number == 0)
      most_bytes = std::max(most_bytes, PackedGroup::bytes(k, layers, tasks, piece.task, piece.task + 1));
  }
  job.widest_hidden = job.widest_units;
  job.loss.widest_group = widest_logits;
  job.loss.group_count = 1;
  job.tile_rows = job.loss.tile_rows = std::min(most_rows, rows_that_fit(job.widest_hidden, widest_logits));
  if (wanted.losses) count_routed(routes, pieces);
  set_scale();

  // The sums of a piece: the rows of its task, layer by layer, weights and then biases.
  const auto rows_of = [&](int64_t layer, int64_t t) {
    return layers.row(layer, t + 1, tasks) - layers.row(layer, t, tasks);
  };
  const auto numbers_of = [&](int64_t t) {
    int64_t sum = 0;
    for (int64_t layer = 0; layer < depth; ++layer)
      sum += rows_of(layer, t) * (layers.sizes[layer] + (layers.biases.empty() ? 0 : 1));
    return sum;
  };
  const auto direct = [&](const Piece& piece) { return piece.of == 1 && same_type(); };
  std::vector<int64_t> place(size + 1, 0);
  if (wanted.parameters)
    for (int64_t i = 0; i < size; ++i) place[i + 1] = place[i] + (direct(pieces[i]) ? 0 : numbers_of(pieces[i].task));
  const Buffer parts = place[size] ? make_buffer(place[size] * acc()) : Buffer();
  std::vector<double> loss(size, 0.0), squares(size, 0.0);
  const int64_t in_bytes = element_bytes(layers.type);
  // The blocks of a task: f(place in the sums of a piece, elements, pointer in the gradients).
  const auto each_block = [&](int64_t t, auto f) {
    int64_t at = 0;
    for (int64_t layer = 0; layer < depth; ++layer) {
      const int64_t row = layers.row(layer, t, tasks), elements = rows_of(layer, t) * layers.sizes[layer];
      f(at, elements,
        static_cast<char*>(wanted.flat) + (layers.weight_place[layer] + row * layers.sizes[layer]) * in_bytes);
      at += elements;
    }
    for (int64_t layer = 0; layer < depth && !layers.biases.empty(); ++layer) {
      f(at, rows_of(layer, t),
        static_cast<char*>(wanted.flat) + (layers.bias_place[layer] + layers.row(layer, t, tasks)) * in_bytes);
      at += rows_of(layer, t);
    }
  };
  const auto cost = [&](const Piece& piece) {
    const double of_row = static_cast<double>(layers.hidden_work() +
                                              tasks.specs[piece.task].width * layers.sizes.back() + 4 * x.cols + 64);
    return (static_cast<double>(piece.rows) + 8) * of_row;  // packing costs as much as some rows
  };
  share_out(pieces, cost, [&](int64_t begin, int64_t end) {
    const Buffer scratch = make_buffer(k.heads_scratch_bytes(layers.type, job)), memory = make_buffer(most_bytes);
    PackedGroup packed;
    std::vector<void*> weights(depth, nullptr), biases(depth, nullptr);
    for (int64_t i = begin; i < end; ++i) {
      const Piece& piece = pieces[i];
      const int64_t t = piece.task;
      if (i == begin || pieces[i - 1].task != t)
        packed.pack(k, layers, tasks, t, t + 1, job.gradient, job.needs_dx, memory.get());
      if (wanted.parameters) {
        int64_t block = 0;
        each_block(t, [&](int64_t at, int64_t elements, char* out) {
          void* const to = direct(piece) ? out : static_cast<char*>(parts.get()) + (place[i] + at) * acc();
          std::memset(to, 0, elements * acc());
          (block < depth ? weights[block] : biases[block - depth]) = to;
          ++block;
        });
      }
      const HeadsSums into{&loss[i], weights.data(), biases.data(), t, &squares[i]};
      const int64_t tiles = (piece.rows + job.tile_rows - 1) / job.tile_rows;
      const int64_t step = std::min(job.tile_rows, ((piece.rows + tiles - 1) / tiles + 7) / 8 * 8);
      for (int64_t r = 0; r < piece.rows; r += step)
        k.heads_tile(layers.type, job, &packed.group(), 1,
                     {x, routes.order() + piece.first + r, 0, std::min(step, piece.rows - r), wanted.dx}, into,
                     scratch.get());
    }
  });
  found.gramian.assign(wanted.gramian ? count() * count() : 0, 0.0);
  for (int64_t i = 0; i < size; ++i) {
    found.loss[pieces[i].task] += loss[i];
    if (wanted.gramian) found.gramian[pieces[i].task * (count() + 1)] += squares[i];
  }
  if (!wanted.parameters) return;
  std::vector<int64_t> first_piece(count(), -1);
  for (int64_t i = size - 1; i >= 0; --i) first_piece[pieces[i].task] = i;
  parallel_for(0, count(), grain(4 * layers.numbers / count()), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t i = first_piece[t];
      each_block(t, [&](int64_t at, int64_t elements, char* out) {
        if (i < 0)
          std::memset(out, 0, elements * in_bytes);
        else if (!direct(pieces[i]))
          k.sum_parts(layers.type, static_cast<const char*>(parts.get()) + (place[i] + at) * acc(), pieces[i].of,
                      numbers_of(t), 0, elements, out);
      });
    }
  });
}

void run(Run& r, const std::optional<Tensor>& route) {
  if (route.has_value())
    r.routed(Routes(*route, r.x.rows, r.count()));
  else
    r.all();
}

// ---- The ops.

Tensor multi_head_mlp(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                      const std::optional<Tensor>& route, const Tensor& integers, const std::optional<Tensor>& seed,
                      int64_t act, double dropout, int64_t columns) {
  const Tasks tasks(integers);
  const Layers layers(x, weights, biases, tasks, seed, act, dropout);
  int64_t widest = 0;
  for (const TaskSpec& task : tasks.specs) widest = std::max(widest, task.width);
  check_size(columns, route.has_value() ? widest : tasks.k, "columns");
  Tensor out = empty(x, {x.size(0), columns});
  Wanted wanted;
  wanted.out = out.mutable_data_ptr();
  wanted.out_columns = columns;
  if (x.size(0) == 0) {
    if (route.has_value()) Routes(*route, 0, layers.tasks);
    return out;
  }
  Run r{kernels(), layers, tasks, matrix(x), wanted, nullptr, {}, {}, {}};
  run(r, route);
  return out;
}

std::tuple<Tensor, Tensor> multi_head_mlp_backward(const std::vector<Tensor>& grads, const Tensor& x,
                                                   const std::vector<Tensor>& weights,
                                                   const std::vector<Tensor>& biases,
                                                   const std::optional<Tensor>& route, const Tensor& integers,
                                                   const std::optional<Tensor>& seed, int64_t act, double dropout,
                                                   bool need_x, bool need_parameters) {
  check_cpu_matrix(x, "x", dtype_of(x, "x"));
  const Tasks tasks(integers, grads, route.has_value(), x, dtype_of(x, "x"));
  const Layers layers(x, weights, biases, tasks, seed, act, dropout);
  Tensor dx = need_x ? empty(x, {x.size(0), x.size(1)}) : empty(x, {0});
  Tensor flat = empty(x, {need_parameters ? layers.numbers : 0});
  if (!need_x && !need_parameters) return {dx, flat};
  Wanted wanted;
  wanted.parameters = need_parameters;
  wanted.dx = need_x ? dx.mutable_data_ptr() : nullptr;
  wanted.flat = flat.mutable_data_ptr();
  Run r{kernels(), layers, tasks, matrix(x), wanted, nullptr, {}, {}, {}};
  run(r, route);
  return {dx, flat};
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Results multi_head_mlp_loss(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                            const std::optional<Tensor>& route, const Tensor& integers,
                            const std::optional<Tensor>& seed, int64_t act, double dropout,
                            const std::vector<Tensor>& targets, const Tensor& reals, const Tensor& task_weight,
                            bool need_x, bool need_parameters, bool need_gramian) {
  const DType type = dtype_of(x, "x");
  check_cpu_matrix(x, "x", type);
  STD_TORCH_CHECK(!route.has_value() || targets.size() == 1, "targets: expected 1 tensor for routed rows, got ",
                  targets.size());
  const Tasks tasks =
      route.has_value() ? Tasks(integers, reals, targets[0], x) : Tasks(integers, reals, targets, x, type);
  const Layers layers(x, weights, biases, tasks, seed, act, dropout);
  const int64_t count = layers.tasks;
  STD_TORCH_CHECK(task_weight.is_cpu() && task_weight.dim() == 1 && task_weight.size(0) == count &&
                      task_weight.is_contiguous() && task_weight.scalar_type() == ScalarType::Double,
                  "task_weight: expected a contiguous CPU vector [", count, "] of float64");
  STD_TORCH_CHECK(!need_gramian || !(need_x || need_parameters),
                  "need_gramian: expected no gradients together with the Gramian");
  const double* v = static_cast<const double*>(task_weight.const_data_ptr());
  const ScalarType wide = type == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  Tensor dx = need_x ? empty(x, {x.size(0), x.size(1)}) : empty(x, {0});
  Tensor flat = empty(x, {need_parameters ? layers.numbers : 0});
  Wanted wanted;
  wanted.losses = true;
  wanted.parameters = need_parameters;
  wanted.gramian = need_gramian;
  wanted.dx = need_x ? dx.mutable_data_ptr() : nullptr;
  wanted.flat = flat.mutable_data_ptr();
  Run r{kernels(), layers, tasks, matrix(x), wanted, v, {}, {}, {}};
  if (route.has_value()) {
    const Routes routes(*route, x.size(0), count);
    const int64_t given = targets[0].dim() == 2 ? targets[0].size(1) : 1;
    for (int64_t t = 0; t < count; ++t)
      STD_TORCH_CHECK(routes.count(t) == 0 || tasks.specs[t].labels.columns <= given, "targets: expected ",
                      tasks.specs[t].labels.columns, " labels a row for task ", t, ", got ", given);
    r.routed(routes);
  } else {
    r.all();
  }
  Tensor per_task = empty({count}, wide), total = empty({}, wide), number = empty({count}, ScalarType::Long);
  Tensor gram = need_gramian ? empty({count, count}, wide) : empty({0}, wide);
  with_accumulator(type, [&](auto zero) {
    using T = decltype(zero);
    T* out = static_cast<T*>(per_task.mutable_data_ptr());
    int64_t* numbers = static_cast<int64_t*>(number.mutable_data_ptr());
    double weighted = 0;
    for (int64_t t = 0; t < count; ++t) {
      const double norm = r.found.norm[t], mean = norm > 0 ? r.found.loss[t] / norm : 0.0;
      out[t] = static_cast<T>(mean);
      numbers[t] = r.found.count[t];
      weighted += v[t] * mean;
    }
    *static_cast<T*>(total.mutable_data_ptr()) = static_cast<T>(weighted);
    if (!need_gramian) return;
    T* g = static_cast<T*>(gram.mutable_data_ptr());
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = i; j < count; ++j)
        g[i * count + j] = g[j * count + i] = static_cast<T>(r.found.gramian[i * count + j]);
  });
  return {per_task, total, number, gram, dx, flat};
}

}  // namespace
}  // namespace mtl

STABLE_TORCH_LIBRARY_IMPL(torch_mtl_pyg, CPU, m) {
  m.impl("multi_head_mlp", TORCH_BOX(&mtl::multi_head_mlp));
  m.impl("multi_head_mlp_backward", TORCH_BOX(&mtl::multi_head_mlp_backward));
  m.impl("multi_head_mlp_loss", TORCH_BOX(&mtl::multi_head_mlp_loss));
}
