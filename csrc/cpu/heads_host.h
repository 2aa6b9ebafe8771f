// Heads with hidden layers as the kernels read them: arguments checked, weights packed.
#pragma once

#include <cmath>
#include <optional>
#include <vector>

#include "isa.h"
#include "tasks.h"

namespace mtl {
namespace {

// The packed layers of all heads. Gradients of the parameters lie in one vector: all weights, then all biases.
struct Layers {
  DType type;
  int64_t depth, tasks, numbers = 0;
  std::vector<Matrix> weights;
  std::vector<Buffer> biases;  // accumulators, padded; or empty
  std::vector<int64_t> sizes;  // inputs of each layer
  std::vector<int64_t> weight_place, bias_place;
  HeadsSpec spec;

  Layers(const Tensor& x, const std::vector<Tensor>& weights_in, const std::vector<Tensor>& biases_in,
         const Tasks& packed, const std::optional<Tensor>& seed, int64_t act, double dropout)
      : type(dtype_of(x, "x")),
        depth(static_cast<int64_t>(weights_in.size())),
        tasks(static_cast<int64_t>(packed.specs.size())) {
    check_cpu_matrix(x, "x", type);
    STD_TORCH_CHECK(depth >= 1 && depth < 64 && tasks >= 1, "weights: expected 1 to 63 layers and at least one task");
    STD_TORCH_CHECK(biases_in.empty() || static_cast<int64_t>(biases_in.size()) == depth,
                    "biases: expected none or one for each layer");
    int64_t before = x.size(1);
    for (int64_t layer = 0; layer < depth; ++layer) {
      const Tensor& weight = weights_in[layer];
      check_cpu_matrix(weight, "weights", type);
      check_size(weight.size(1), before, "weights: size of dimension 1");
      const int64_t rows = weight.size(0);
      // Expanded tensors may have more elements than there are numbers.
      STD_TORCH_CHECK(rows <= kMost && before <= kMost && rows * std::max<int64_t>(1, before) <= (int64_t(1) << 46),
                      "weights: expected at most 2^46 elements in layer ", layer);
      if (layer + 1 == depth)
        check_size(rows, packed.k, "weights: size of dimension 0 of the last layer");
      else
        STD_TORCH_CHECK(rows > 0 && rows % tasks == 0, "weights: expected as many rows for each task in layer ", layer);
      sizes.push_back(before);
      weights.push_back(matrix(weight));
      before = rows / tasks;
      weight_place.push_back(numbers);
      numbers += rows * weight.size(1);
    }
    for (int64_t layer = 0; layer < static_cast<int64_t>(biases_in.size()); ++layer) {
      const Tensor& bias = biases_in[layer];
      STD_TORCH_CHECK(bias.is_cpu() && bias.dim() == 1 && dtype_of(bias, "biases") == type,
                      "biases: expected CPU vectors of the dtype of x");
      const int64_t rows = weights[layer].rows;
      check_size(bias.size(0), rows, "biases: size of dimension 0");
      const int64_t bytes = rows * accumulator_bytes(type);
      biases.push_back(make_buffer(bytes + kPad));
      kernels().widen(type, bias.const_data_ptr(), rows, bias.stride(0), biases.back().get());
      std::memset(static_cast<char*>(biases.back().get()) + bytes, 0, kPad);
      bias_place.push_back(numbers);
      numbers += rows;
    }
    STD_TORCH_CHECK(act >= 0 && act < kActivations, "act: expected a number in [0, ", kActivations, "), got ", act);
    STD_TORCH_CHECK(dropout >= 0 && dropout <= 1, "dropout: expected a number in [0, 1]");
    const bool drops = dropout > 0 && depth > 1;
    uint64_t from = 0;
    int64_t first_task = 0;
    if (drops) {
      STD_TORCH_CHECK(seed.has_value() && seed->is_cpu() && seed->dim() == 1 && seed->size(0) == 2 &&
                          seed->is_contiguous() && seed->scalar_type() == ScalarType::Long,
                      "seed: expected a contiguous CPU tensor [2] of int64");
      const int64_t* numbers_in = static_cast<const int64_t*>(seed->const_data_ptr());
      from = static_cast<uint64_t>(numbers_in[0]);
      first_task = numbers_in[1];
    }
    spec = {depth,
            sizes.data(),
            static_cast<Activation>(act),
            drops,
            dropout < 1 ? 1.0 / (1.0 - dropout) : 0.0,
            static_cast<uint64_t>(std::nearbyint(dropout * 0x1p32)),
            from,
            first_task};
  }
  Layers(const Layers&) = delete;  // the spec points into it

  bool last(int64_t layer) const { return layer + 1 == depth; }
  int64_t units(int64_t layer) const { return weights[layer].rows / tasks; }  // of a task in a hidden layer
  // The rows of the tasks [first, last) in a layer.
  int64_t row(int64_t layer, int64_t task, const Tasks& packed) const {
    if (!last(layer)) return task * units(layer);
    return task == tasks ? packed.k : packed.specs[task].begin;
  }
  Matrix part(int64_t layer, int64_t first, int64_t last_task, const Tasks& packed) const {
    return weights[layer].part(type, row(layer, first, packed), row(layer, last_task, packed), 0, sizes[layer]);
  }
  int64_t widest_units() const {
    int64_t widest = 0;
    for (int64_t layer = 0; !last(layer); ++layer) widest = std::max(widest, units(layer));
    return widest;
  }
  // Multiply-adds of one row through one task's layers, but for the last.
  int64_t hidden_work() const {
    int64_t work = 0;
    for (int64_t layer = 0; !last(layer); ++layer) work += units(layer) * sizes[layer];
    return work;
  }
  static constexpr int64_t kPad = 64 * 8, kMost = int64_t(1) << 31;
};

// The packed weights of the tasks [first, last), in memory of bytes().
class PackedGroup {
 public:
  static int64_t bytes(const Kernels& k, const Layers& layers, const Tasks& tasks, int64_t first, int64_t last) {
    int64_t sum = 0;
    each(k, layers, tasks, first, last, [&](int64_t, int64_t, const Matrix& w) {
      sum += size(k, layers.type, w.cols, w.rows) + size(k, layers.type, w.rows, w.cols);
    });
    return sum;
  }
  // back: also for the products of the backward; dx: for that of the first layer.
  void pack(const Kernels& k, const Layers& layers, const Tasks& tasks, int64_t first, int64_t last, bool back, bool dx,
            void* memory) {
    char* place = static_cast<char*>(memory);
    const auto put = [&](const Matrix& b) {
      char* const panels = place;
      k.pack_wide(layers.type, b, panels);
      place += size(k, layers.type, b.rows, b.cols);
      return static_cast<const void*>(panels);
    };
    panels_.clear();
    back_.clear();
    bias_.clear();
    group_ = {
        first,   last,   tasks.specs[first].begin, layers.row(layers.depth - 1, last, tasks), nullptr, nullptr, nullptr,
        nullptr, nullptr};
    each(k, layers, tasks, first, last, [&](int64_t, int64_t layer, const Matrix& w) {
      const void* const forward = put(transposed(w));
      const void* const backward = (layer ? back : dx) ? put(w) : nullptr;
      if (layer) {
        panels_.push_back(forward);
        back_.push_back(backward);
      } else {
        group_.panels = forward;
        group_.back_panels = backward;
      }
    });
    for (int64_t layer = 0; layer < layers.depth; ++layer)
      bias_.push_back(layers.biases.empty() ? nullptr
                                            : static_cast<const char*>(layers.biases[layer].get()) +
                                                  layers.row(layer, first, tasks) * accumulator_bytes(layers.type));
    group_.task_panels = panels_.data();
    group_.task_back = back_.data();
    group_.bias = bias_.data();
  }
  const HeadsGroup& group() const { return group_; }

 private:
  static int64_t size(const Kernels& k, DType type, int64_t p, int64_t n) {
    return (k.wide_panels_bytes(type, p, n) + 63) / 64 * 64;
  }
  // The first layer of all tasks at once, then each task's other layers.
  template <class F>
  static void each(const Kernels&, const Layers& layers, const Tasks& tasks, int64_t first, int64_t last, F f) {
    f(first, 0, layers.part(0, first, last, tasks));
    for (int64_t t = first; t < last; ++t)
      for (int64_t layer = 1; layer < layers.depth; ++layer) f(t, layer, layers.part(layer, t, t + 1, tasks));
  }

  HeadsGroup group_{};
  std::vector<const void*> panels_, back_, bias_;
};

}  // namespace
}  // namespace mtl
