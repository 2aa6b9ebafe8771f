// What a kernel needs to know of heads with hidden layers. No torch.
#pragma once

#include <stdint.h>

namespace mtl {

// In the order of ACTIVATIONS in torch_mtl_pyg/ops/reference_mlp.py.
enum class Activation : int { kRelu = 0, kGelu = 1, kSilu = 2, kTanh = 3, kElu = 4 };
constexpr int kActivations = 5;

struct HeadsSpec {
  int64_t layers;        // at least 1; with 1 the heads are linear
  const int64_t* sizes;  // [layers]: inputs of each layer: D, then the units of a head's hidden layers
  Activation act;
  // Dropout: a hidden unit stays if its 32 random bits are at least `threshold`, and is multiplied by `scale`.
  bool drops;
  double scale;
  uint64_t threshold;
  uint64_t seed;
  int64_t first_task;  // the number of task 0 in the masks
};

}  // namespace mtl
