// Launches of the kernels in gather.cuh, none of which the host has to wait for.
#include "gather.cuh"

#include "gather.h"

namespace mtl::cuda {
namespace {

bool aligned(const void* data, int64_t row, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row * bytes % 16 == 0;
}

dim3 grid_of(int64_t blocks, int64_t columns, int64_t columns_of_a_block) {
  const int64_t chunks = (columns + columns_of_a_block - 1) / columns_of_a_block;
  STD_TORCH_CHECK(blocks <= INT32_MAX && chunks <= 65535, "aggregate: expected a smaller matrix");
  return {static_cast<unsigned>(blocks), static_cast<unsigned>(chunks)};
}

}  // namespace

Gathering::Gathering(const GatherCall& call, const Tensor& like)
    : call_(call), stream_(stream_of(like)), blocks_(2 * multiprocessors(like)), most_pieces_(0) {
  const Neighbours& graph = call_.job.graph;
  if (graph.edges <= kPieceEdges || graph.rows == 0) return;
  // A hub has two pieces at least, and none of them, but for its last, is not full.
  most_pieces_ = 2 * graph.edges / kPieceEdges;
  counts_ = zeros_on(like, {1}, ScalarType::Long);
  list_ = empty_on(like, {most_pieces_, 2}, ScalarType::Long);
  parts_ = empty_on(like, {most_pieces_, call_.job.columns}, sums_dtype(call_.in));
  const Hubs hubs{static_cast<unsigned long long*>(counts_->mutable_data_ptr()),
                  static_cast<Hub*>(list_->mutable_data_ptr()), most_pieces_};
  const dim3 grid = grid_of((graph.rows + kThreads - 1) / kThreads, 1, 1);
  check_launch(launch(find_hubs_kernel, grid, dim3(kThreads), 0, stream_, graph, hubs, check_.flags()), "aggregate");
  check_.look(graph.edges);
}

template <class Take, class In, class Out>
void Gathering::run(int64_t first, int64_t last, const GatherTarget& target) {
  using Task = GatherTask<In, Out>;
  using Sum = typename Task::Sum;
  const GatherJob& job = call_.job;
  // The gradient of max and min alone compares rows with those of a second matrix: not worth kernels of its own.
  constexpr bool kVector = !Take::kOwn;
  const bool vectors = kVector && job.columns % kPart<In, true> == 0 && aligned(job.x, job.row_stride, sizeof(In)) &&
                       aligned(target.out, 0, 0) && aligned(target.wide, 0, 0);
  const int64_t per = vectors ? kPart<In, true> : kPart<In, false>, sums = kPart<Sum, false>;
  Task task{job,
            lanes_for(job.columns, per),
            first,
            last,
            pieces_done_ ? 0 : most_pieces_,
            {},
            nullptr,
            static_cast<const In*>(call_.own),
            call_.own_row,
            static_cast<const In*>(call_.grad),
            call_.grad_row,
            call_.grad_col,
            static_cast<const Sum*>(call_.shares),
            static_cast<const Sum*>(target.add),
            target.add_row,
            static_cast<Out*>(target.out),
            static_cast<Sum*>(target.wide),
            check_.flags()};
  if (most_pieces_ > 0) {
    task.hubs = {static_cast<unsigned long long*>(counts_->mutable_data_ptr()),
                 static_cast<Hub*>(list_->mutable_data_ptr()), most_pieces_};
    task.parts = static_cast<Sum*>(parts_->mutable_data_ptr());
  }
  const int64_t items = task.pieces + last - first, groups = kThreads / task.lanes;
  const dim3 grid = grid_of((items + groups - 1) / groups, job.columns, task.lanes * per);
  const cudaError_t error =
      launch(vectors ? gather_kernel<Take, kVector, In, Out> : gather_kernel<Take, false, In, Out>, grid,
             dim3(kThreads), 0, stream_, task);
  check_launch(error, "aggregate");
  check_.look(job.graph.edges);
  pieces_done_ = true;
  if (most_pieces_ == 0) return;
  task.lanes = lanes_for(job.columns, sums);
  const int64_t hubs = std::min<int64_t>(blocks_, most_pieces_ / 2 + 1);
  check_launch(launch(add_parts_kernel<Take, In, Out>, grid_of(hubs, job.columns, task.lanes * sums), dim3(kThreads), 0,
                      stream_, task),
               "aggregate");
}

void Gathering::rows(int64_t first, int64_t last, const GatherTarget& target) {
  if (first >= last || call_.job.columns == 0) return;
  const auto as = [&](auto in, auto out) {
    using In = decltype(in);
    using Out = decltype(out);
    if constexpr (sizeof(In) == sizeof(Out)) {
      if (call_.what == Gathered::kCountTies) return run<CountTies, In, Out>(first, last, target);
      if (call_.what == Gathered::kSumTies) return run<SumTies, In, Out>(first, last, target);
      if (call_.job.reduce == Reduce::kMax || call_.job.reduce == Reduce::kMin)
        return run<TakeExtreme, In, Out>(first, last, target);
    }
    return run<TakeSum, In, Out>(first, last, target);
  };
  switch (call_.in) {
    case DType::kFloat64:
      return as(double{}, double{});
    case DType::kBFloat16:
      return as(BFloat16{}, BFloat16{});
    case DType::kFloat16:
      return as(Float16{}, Float16{});
    default:
      if (call_.out == DType::kBFloat16) return as(float{}, BFloat16{});
      if (call_.out == DType::kFloat16) return as(float{}, Float16{});
      return as(float{}, float{});
  }
}

}  // namespace mtl::cuda
