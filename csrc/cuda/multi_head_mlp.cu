// Heads with hidden layers, and rows routed to one head each: the ops, their checks and results. What is launched is in
// heads_run.h and heads_chunk.h.
//
//   multi_head_mlp           outputs [N, K], or routed [N, max C]
//   multi_head_mlp_backward  dx [N, D] and the gradients of all parameters, from those of the outputs
//   multi_head_mlp_loss      losses [T], their weighted sum, counts [T], Gramian [T, T], and the same gradients
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "engines.h"
#include "heads_chunk.h"

namespace mtl::cuda {
namespace {

void run(const Call& call) {
  const DeviceGuard guard(call.x);
  with_own_engine(call.layers.type, [&](auto engine) { HeadsRun<decltype(engine)>{call}(); });
}

Tensor multi_head_mlp(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                      const std::optional<Tensor>& route, const Tensor& integers, const std::optional<Tensor>& seed,
                      int64_t act, double dropout, int64_t columns) {
  const Tasks tasks(integers);
  const Layers layers(x, weights, biases, tasks, seed, act, dropout);
  int64_t widest = 0;
  for (const TaskSpec& task : tasks.specs) widest = std::max(widest, task.width);
  check_size(columns, route.has_value() ? widest : tasks.k, "columns");
  if (route.has_value()) check_route(*route, x.size(0), x);
  const DeviceGuard guard(x);
  // Routed rows have zeros in the columns that their head does not have.
  Tensor out = route.has_value() ? zeros_on(x, {x.size(0), columns}, x.scalar_type())
                                 : empty_on(x, {x.size(0), columns}, x.scalar_type());
  if (x.size(0) == 0) return out;
  Call call{"multi_head_mlp", x, layers, tasks, route, nullptr, nullptr, nullptr, 0, {}};
  call.wanted.out = out.mutable_data_ptr();
  call.wanted.out_columns = columns;
  run(call);
  return out;
}

// The gradients of a call, and where they go.
std::tuple<Tensor, Tensor> gradients_of(Call& call, bool need_x, bool need_parameters) {
  const Tensor& x = call.x;
  using Sizes = std::vector<int64_t>;
  Tensor dx = empty_on(x, need_x ? Sizes{x.size(0), x.size(1)} : Sizes{0}, x.scalar_type());
  Tensor flat = empty_on(x, {need_parameters ? call.layers.numbers : 0}, x.scalar_type());
  call.wanted.dx = need_x && dx.numel() > 0 ? dx.mutable_data_ptr() : nullptr;
  call.wanted.flat = need_parameters && flat.numel() > 0 ? flat.mutable_data_ptr() : nullptr;
  return {dx, flat};
}

std::tuple<Tensor, Tensor> multi_head_mlp_backward(const std::vector<Tensor>& grads, const Tensor& x,
                                                   const std::vector<Tensor>& weights,
                                                   const std::vector<Tensor>& biases,
                                                   const std::optional<Tensor>& route, const Tensor& integers,
                                                   const std::optional<Tensor>& seed, int64_t act, double dropout,
                                                   bool need_x, bool need_parameters) {
  check_device_matrix(x, "x", dtype_of(x, "x"), x);
  const Tasks tasks(integers, grads, route.has_value(), x, dtype_of(x, "x"));
  const Layers layers(x, weights, biases, tasks, seed, act, dropout);
  if (route.has_value()) check_route(*route, x.size(0), x);
  const DeviceGuard guard(x);
  Call call{"multi_head_mlp_backward", x, layers, tasks, route, nullptr, nullptr, &grads, 0, {}};
  const auto results = gradients_of(call, need_x, need_parameters);
  if (call.wanted.dx || call.wanted.flat) run(call);
  return results;
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Results multi_head_mlp_loss(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                            const std::optional<Tensor>& route, const Tensor& integers,
                            const std::optional<Tensor>& seed, int64_t act, double dropout,
                            const std::vector<Tensor>& targets, const Tensor& reals, const Tensor& task_weight,
                            bool need_x, bool need_parameters, bool need_gramian) {
  const DType type = dtype_of(x, "x");
  check_device_matrix(x, "x", type, x);
  STD_TORCH_CHECK(!route.has_value() || targets.size() == 1, "targets: expected 1 tensor for routed rows, got ",
                  targets.size());
  const Tasks tasks =
      route.has_value() ? Tasks(integers, reals, targets[0], x) : Tasks(integers, reals, targets, x, type);
  const Layers layers(x, weights, biases, tasks, seed, act, dropout);
  const int64_t count = layers.tasks;
  STD_TORCH_CHECK(task_weight.dim() == 1 && task_weight.size(0) == count && task_weight.is_contiguous() &&
                      task_weight.scalar_type() == ScalarType::Double &&
                      (task_weight.is_cpu() || beside(task_weight, x)),
                  "task_weight: expected a contiguous vector [", count, "] of float64, on the CPU or the device of x");
  STD_TORCH_CHECK(!need_gramian || !(need_x || need_parameters),
                  "need_gramian: expected no gradients together with the Gramian");
  if (route.has_value()) check_route(*route, x.size(0), x);
  const DeviceGuard guard(x);
  const ScalarType wide = type == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  Call call{"multi_head_mlp_loss", x, layers, tasks, route, &reals, &task_weight, nullptr, 0, {}};
  if (route.has_value()) call.given = targets[0].dim() == 2 ? targets[0].size(1) : 1;
  Tensor per_task = empty_on(x, {count}, wide), total = empty_on(x, {}, wide);
  Tensor number = empty_on(x, {count}, ScalarType::Long);
  Tensor gram = empty_on(x, need_gramian ? std::vector<int64_t>{count, count} : std::vector<int64_t>{0}, wide);
  const auto [dx, flat] = gradients_of(call, need_x, need_parameters);
  call.wanted.per_task = per_task.mutable_data_ptr();
  call.wanted.total = total.mutable_data_ptr();
  call.wanted.number = number.mutable_data_ptr();
  call.wanted.gram = need_gramian ? gram.mutable_data_ptr() : nullptr;
  run(call);
  return {per_task, total, number, gram, dx, flat};
}

}  // namespace
}  // namespace mtl::cuda

STABLE_TORCH_LIBRARY_IMPL(torch_mtl_pyg, MTL_CUDA_KEY, m) {
  m.impl("multi_head_mlp", TORCH_BOX(&mtl::cuda::multi_head_mlp));
  m.impl("multi_head_mlp_backward", TORCH_BOX(&mtl::cuda::multi_head_mlp_backward));
  m.impl("multi_head_mlp_loss", TORCH_BOX(&mtl::cuda::multi_head_mlp_loss));
}
