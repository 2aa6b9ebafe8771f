// A graph as the ops get it: checked, its hubs worked out beforehand, its rows shared out by the work they are.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "../common/checks.h"
#include "../common/graph.h"
#include "buffer.h"
#include "host.h"

namespace mtl {

inline const int64_t* indices_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 1 && t.scalar_type() == ScalarType::Long && t.is_contiguous(), name,
                  ": expected a contiguous CPU vector of int64");
  return static_cast<const int64_t*>(t.const_data_ptr());
}

// The pointers are checked here; `index` and `place` by the kernels, before they read through them.
inline Neighbours neighbours_of(const Tensor& ptr, const Tensor& index, const std::optional<Tensor>& place,
                                int64_t sources) {
  Neighbours graph{indices_of(ptr, "ptr"), indices_of(index, "index"), nullptr, ptr.size(0) - 1, sources,
                   index.size(0)};
  STD_TORCH_CHECK(graph.rows >= 0, "ptr: expected at least one entry");
  bool rises = graph.ptr[0] == 0 && graph.ptr[graph.rows] == graph.edges;
  for (int64_t r = 0; r < graph.rows; ++r) rises &= graph.ptr[r] <= graph.ptr[r + 1];
  STD_TORCH_CHECK(rises, "ptr: expected numbers that rise from 0 to ", graph.edges, ", the size of index");
  if (place.has_value()) {
    graph.place = indices_of(*place, "place");
    check_size(place->size(0), graph.edges, "place: size");
  }
  return graph;
}

inline Reduce reduce_of(int64_t reduce) {
  STD_TORCH_CHECK(reduce >= 0 && reduce <= static_cast<int64_t>(Reduce::kMin), "reduce: expected 0 to 3, got ", reduce);
  return static_cast<Reduce>(reduce);
}

// good: of each share of the work, whether all its edges were in range.
inline void check_good(const std::vector<char>& good) {
  STD_TORCH_CHECK(std::find(good.begin(), good.end(), 0) == good.end(),
                  "index: expected rows of x and, in place, edges; got a number out of range");
}

// A job without coefficients that gathers the rows of x.
inline GatherJob job_of(const Tensor& x, DType type, const Neighbours& graph, Reduce reduce, const char* name) {
  check_cpu_matrix(x, name, type);
  STD_TORCH_CHECK(x.stride(1) == 1 || x.size(1) <= 1 || x.size(0) == 0, name, ": expected contiguous columns");
  return {graph, reduce, x.const_data_ptr(), x.size(1), x.stride(0), nullptr, type, nullptr, nullptr, nullptr, 0};
}

// Weights of the edges, and of the rows they read, where there are any.
inline void set_coefficients(GatherJob& job, const std::optional<Tensor>& weights, const std::optional<Tensor>& factors,
                             ScalarType wide) {
  if (weights.has_value()) {
    STD_TORCH_CHECK(weights->is_cpu() && weights->dim() == 1 && weights->is_contiguous(),
                    "edge_weight: expected a contiguous CPU vector");
    check_size(weights->size(0), job.graph.edges, "edge_weight: size");
    job.weight_type = dtype_of(*weights, "edge_weight");
    job.weights = weights->const_data_ptr();
  }
  if (factors.has_value()) {
    STD_TORCH_CHECK(
        factors->is_cpu() && factors->dim() == 1 && factors->is_contiguous() && factors->scalar_type() == wide,
        "factors: expected a contiguous CPU vector of the dtype of the sums");
    check_size(factors->size(0), job.graph.sources, "factors: size");
    job.factors = factors->const_data_ptr();
  }
  STD_TORCH_CHECK((!job.weights && !job.factors) || job.reduce == Reduce::kSum || job.reduce == Reduce::kMean,
                  "edge_weight: expected none for max and min");
}

// The rows of a job, those of hubs worked out by all threads. Which edges make a piece depends on the graph alone.
class Gathering {
 public:
  GatherJob job;

  // gathers: whether the rows will be gathered, and not only shared out.
  Gathering(const Kernels& k, DType type, const GatherJob& of, bool gathers = true) : job(of) {
    const Neighbours& graph = job.graph;
    if (gathers && graph.edges > kHubEdges)
      for (int64_t r = 0; r < graph.rows; ++r)
        if (graph.ptr[r + 1] - graph.ptr[r] > kHubEdges) hubs_.push_back(r);
    std::vector<int64_t> pieces(1, 0);  // of the hubs before each one
    edges_before_.assign(1, 0);
    for (int64_t r : hubs_) {
      const int64_t edges = graph.ptr[r + 1] - graph.ptr[r];
      pieces.push_back(pieces.back() + (edges + kHubEdges - 1) / kHubEdges);
      edges_before_.push_back(edges_before_.back() + edges);
    }
    if (hubs_.empty()) return;
    const int64_t bytes = job.columns * accumulator_bytes(type);
    const Buffer parts = make_buffer(pieces.back() * bytes);
    results_ = make_buffer(static_cast<int64_t>(hubs_.size()) * bytes);
    std::vector<char> good(pieces.back(), 0);
    torch::stable::parallel_for(0, pieces.back(), grain(2 * kHubEdges * job.columns), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t hub = std::upper_bound(pieces.begin(), pieces.end(), i) - pieces.begin() - 1;
        const int64_t e0 = graph.ptr[hubs_[hub]] + (i - pieces[hub]) * kHubEdges, last = graph.ptr[hubs_[hub] + 1];
        good[i] = k.gather_edges(type, job, e0, std::min(e0 + kHubEdges, last), last - graph.ptr[hubs_[hub]],
                                 static_cast<char*>(parts.get()) + i * bytes);
      }
    });
    check_good(good);
    for (size_t hub = 0; hub < hubs_.size(); ++hub) {
      char* const result = static_cast<char*>(results_.get()) + static_cast<int64_t>(hub) * bytes;
      const char* part = static_cast<const char*>(parts.get()) + pieces[hub] * bytes;
      std::copy(part, part + bytes, result);
      for (int64_t i = pieces[hub] + 1; i < pieces[hub + 1]; ++i)
        k.combine(type, job.reduce, static_cast<const char*>(parts.get()) + i * bytes, job.columns, result);
    }
    job.hubs = hubs_.data();
    job.hub_results = results_.get();
    job.hub_count = static_cast<int64_t>(hubs_.size());
  }

  // The rows [first, last) side by side.
  bool gather(const Kernels& k, DType type, int64_t first, int64_t last, bool accumulate, void* out) const {
    return k.gather(type, job, first, last, accumulate, out, job.columns);
  }

  // The borders of `parts` runs of rows of about equal work; a row costs row_work edges besides its own.
  std::vector<int64_t> borders(int64_t parts, int64_t row_work) const {
    const Neighbours& graph = job.graph;
    auto work = [&](int64_t row) {
      const size_t hub = std::lower_bound(hubs_.begin(), hubs_.end(), row) - hubs_.begin();
      return graph.ptr[row] - edges_before_[hub] + row * row_work;
    };
    std::vector<int64_t> borders(1, 0);
    for (int64_t part = 1; part < parts; ++part) {
      const int64_t wanted = work(graph.rows) / parts * part;
      int64_t low = borders.back(), high = graph.rows;
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (work(middle) < wanted)
          low = middle + 1;
        else
          high = middle;
      }
      borders.push_back(low);
    }
    borders.push_back(graph.rows);
    return borders;
  }

 private:
  std::vector<int64_t> hubs_, edges_before_;
  Buffer results_;
};

}  // namespace mtl
