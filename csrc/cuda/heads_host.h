// The layers of all heads as the kernels read them, checked.
#pragma once

#include <cmath>
#include <optional>
#include <vector>

#include "../cpu/tasks.h"
#include "activations.cuh"
#include "host.h"

namespace mtl::cuda {
namespace {

// The packed layers of all heads. Gradients of the parameters lie in one vector: all weights, then all biases.
struct Layers {
  DType type;
  int64_t depth, tasks, numbers = 0;
  const std::vector<Tensor>&weights, &biases;
  std::vector<int64_t> inputs, rows, weight_place, bias_place;  // of each layer
  Units hidden;                                                 // what the hidden layers share

  Layers(const Tensor& x, const std::vector<Tensor>& weights_in, const std::vector<Tensor>& biases_in,
         const Tasks& packed, const std::optional<Tensor>& seed, int64_t act, double dropout)
      : type(dtype_of(x, "x")),
        depth(static_cast<int64_t>(weights_in.size())),
        tasks(static_cast<int64_t>(packed.specs.size())),
        weights(weights_in),
        biases(biases_in) {
    check_device_matrix(x, "x", type, x);
    STD_TORCH_CHECK(depth >= 1 && depth < 64 && tasks >= 1, "weights: expected 1 to 63 layers and at least one task");
    STD_TORCH_CHECK(tasks <= INT32_MAX, "integers: expected at most ", INT32_MAX, " tasks");
    STD_TORCH_CHECK(biases.empty() || static_cast<int64_t>(biases.size()) == depth,
                    "biases: expected none or one for each layer");
    int64_t before = x.size(1);
    for (int64_t layer = 0; layer < depth; ++layer) {
      const Tensor& weight = weights[layer];
      check_device_matrix(weight, "weights", type, x);
      check_size(weight.size(1), before, "weights: size of dimension 1");
      const int64_t own = weight.size(0);
      // Expanded tensors may have more elements than there are numbers.
      STD_TORCH_CHECK(own <= kMost && before <= kMost && own * std::max<int64_t>(1, before) <= (int64_t(1) << 46),
                      "weights: expected at most 2^46 elements in layer ", layer);
      if (last(layer))
        check_size(own, packed.k, "weights: size of dimension 0 of the last layer");
      else
        STD_TORCH_CHECK(own > 0 && own % tasks == 0, "weights: expected as many rows for each task in layer ", layer);
      inputs.push_back(before);
      rows.push_back(own);
      before = own / tasks;
      weight_place.push_back(numbers);
      numbers += own * weight.size(1);
    }
    for (size_t layer = 0; layer < biases.size(); ++layer) {
      const Tensor& bias = biases[layer];
      STD_TORCH_CHECK(on_device(bias) && bias.get_device_index() == x.get_device_index() && bias.dim() == 1 &&
                          dtype_of(bias, "biases") == type,
                      kEmulated ? "biases: expected CPU vectors of the dtype of x"
                                : "biases: expected CUDA vectors of the dtype of x, on its device");
      check_size(bias.size(0), rows[layer], "biases: size of dimension 0");
      bias_place.push_back(numbers);
      numbers += rows[layer];
    }
    STD_TORCH_CHECK(act >= 0 && act < kActivations, "act: expected a number in [0, ", kActivations, "), got ", act);
    STD_TORCH_CHECK(dropout >= 0 && dropout <= 1, "dropout: expected a number in [0, 1]");
    hidden = {static_cast<Activation>(act),
              dropout > 0 && depth > 1,
              dropout < 1 ? 1.0 / (1.0 - dropout) : 0.0,
              static_cast<uint64_t>(std::nearbyint(dropout * 0x1p32)),
              0,
              0,
              0,
              1};
    if (!hidden.drops) return;
    STD_TORCH_CHECK(seed.has_value() && seed->is_cpu() && seed->dim() == 1 && seed->size(0) == 2 &&
                        seed->is_contiguous() && seed->scalar_type() == ScalarType::Long,
                    "seed: expected a contiguous CPU tensor [2] of int64");
    const int64_t* numbers_in = static_cast<const int64_t*>(seed->const_data_ptr());
    hidden.seed = static_cast<uint64_t>(numbers_in[0]);
    hidden.first_task = numbers_in[1];
  }
  Layers(const Layers&) = delete;

  bool last(int64_t layer) const { return layer + 1 == depth; }
  int64_t units(int64_t layer) const { return rows[layer] / tasks; }  // of a task in a hidden layer

 private:
  static constexpr int64_t kMost = int64_t(1) << 31;
};

// But for its values, which the device checks.
inline void check_route(const Tensor& route, int64_t rows, const Tensor& x) {
  STD_TORCH_CHECK(on_device(route) && route.get_device_index() == x.get_device_index() && route.dim() == 1 &&
                      route.scalar_type() == ScalarType::Long,
                  kEmulated ? "route: expected a CPU vector of int64"
                            : "route: expected a CUDA vector of int64 on the device of x");
  check_size(route.size(0), rows, "route: size of dimension 0");
}

}  // namespace
}  // namespace mtl::cuda
