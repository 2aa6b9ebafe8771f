// A graph as the ops get it: what the host can check of it without waiting for the device. The kernels check the rest,
// before they read through it.
#pragma once

#include <optional>

#include "../common/graph.h"
#include "host.h"

namespace mtl::cuda {

inline ScalarType sums_dtype(DType type) { return type == DType::kFloat64 ? ScalarType::Double : ScalarType::Float; }

inline const int64_t* indices_of(const Tensor& t, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(on_device(t) && t.dim() == 1 && t.scalar_type() == ScalarType::Long && t.is_contiguous(), name,
                  ": expected a contiguous ", kEmulated ? "CPU" : "CUDA", " vector of int64");
  check_device(t, name, like);
  return static_cast<const int64_t*>(t.const_data_ptr());
}

inline void refuse_ptr(int64_t edges) {
  STD_TORCH_CHECK(false, "ptr: expected numbers that rise from 0 to ", edges, ", the size of index");
}

inline Neighbours neighbours_of(const Tensor& ptr, const Tensor& index, const std::optional<Tensor>& place,
                                int64_t sources, const Tensor& like) {
  Neighbours graph{
      indices_of(ptr, "ptr", like), indices_of(index, "index", like), nullptr, ptr.size(0) - 1, sources, index.size(0)};
  STD_TORCH_CHECK(graph.rows >= 0, "ptr: expected at least one entry");
  if (graph.rows == 0 && graph.edges > 0) refuse_ptr(graph.edges);
  if (place.has_value()) {
    graph.place = indices_of(*place, "place", like);
    check_size(place->size(0), graph.edges, "place: size");
  }
  return graph;
}

inline Reduce reduce_of(int64_t reduce) {
  STD_TORCH_CHECK(reduce >= 0 && reduce <= static_cast<int64_t>(Reduce::kMin), "reduce: expected 0 to 3, got ", reduce);
  return static_cast<Reduce>(reduce);
}

// What the kernels have found wrong with a graph. On a GPU they end themselves.
class GraphCheck {
 public:
  int* flags() { return kEmulated ? wrong_ : nullptr; }
  void look(int64_t edges) const {
    if (wrong_[0]) refuse_ptr(edges);
    STD_TORCH_CHECK(!wrong_[1], "index: expected rows of x and, in place, edges; got a number out of range");
  }

 private:
  int wrong_[2] = {0, 0};
};

inline void check_columns(const Tensor& t, const char* name, DType type, const Tensor& like) {
  check_device_matrix(t, name, type, like);
  STD_TORCH_CHECK(t.stride(1) == 1 || t.size(1) <= 1 || t.size(0) == 0, name, ": expected contiguous columns");
}

// A job without coefficients that gathers the rows of x.
inline GatherJob job_of(const Tensor& x, DType type, const Neighbours& graph, Reduce reduce, const char* name,
                        const Tensor& like) {
  check_columns(x, name, type, like);
  return {graph, reduce, x.const_data_ptr(), x.size(1), x.stride(0), nullptr, type, nullptr, nullptr, nullptr, 0};
}

// Weights of the edges, and of the rows they read, where there are any.
inline void set_coefficients(GatherJob& job, const std::optional<Tensor>& weights, const std::optional<Tensor>& factors,
                             ScalarType wide, const Tensor& like) {
  const char* const device = kEmulated ? "CPU" : "CUDA";
  if (weights.has_value()) {
    STD_TORCH_CHECK(on_device(*weights) && weights->dim() == 1 && weights->is_contiguous(),
                    "edge_weight: expected a contiguous ", device, " vector");
    check_device(*weights, "edge_weight", like);
    check_size(weights->size(0), job.graph.edges, "edge_weight: size");
    job.weight_type = dtype_of(*weights, "edge_weight");
    job.weights = weights->const_data_ptr();
  }
  if (factors.has_value()) {
    STD_TORCH_CHECK(
        on_device(*factors) && factors->dim() == 1 && factors->is_contiguous() && factors->scalar_type() == wide,
        "factors: expected a contiguous ", device, " vector of the dtype of the sums");
    check_device(*factors, "factors", like);
    check_size(factors->size(0), job.graph.sources, "factors: size");
    job.factors = factors->const_data_ptr();
  }
  STD_TORCH_CHECK((!job.weights && !job.factors) || job.reduce == Reduce::kSum || job.reduce == Reduce::kMean,
                  "edge_weight: expected none for max and min");
}

}  // namespace mtl::cuda
