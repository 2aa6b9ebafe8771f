// Activations of hidden units with their slopes, and dropout masks. Maths of the masks: keep_mask in
// torch_mtl_pyg/ops/reference_mlp.py.
#pragma once

#include "../common/heads.h"
#include "device.cuh"

namespace mtl::cuda {

// h = act(a), slope = act'(a). NaN stays NaN.
template <class T>
__device__ void activate(Activation act, T a, T& h, T& slope) {
  switch (act) {
    case Activation::kGelu: {
      const T density = exp(T(-0.5) * a * a) * static_cast<T>(0.39894228040143267794);
      const T integral = T(0.5) * erfc(a * static_cast<T>(-0.70710678118654752440));
      h = a * integral;
      slope = integral + a * density;
      return;
    }
    case Activation::kSilu: {
      const T e = exp(a < T(0) ? a : -a), near = T(1) / (T(1) + e), far = e * near;
      const bool up = a >= T(0);
      const T s = up ? near : far;
      h = a * s;
      slope = s * (T(1) + a * (up ? far : near));
      return;
    }
    case Activation::kTanh: {
      const T m = expm1(T(2) * (a < T(0) ? a : -a)), t = -m / (T(2) + m);
      h = a < T(0) ? -t : t;
      slope = T(1) - h * h;
      return;
    }
    case Activation::kElu: {
      const bool up = a > T(0);
      const T m = expm1(up ? T(0) : a);
      h = up ? a : m;
      slope = up ? T(1) : m + T(1);
      return;
    }
    default: {
      const bool down = a <= T(0);
      h = down ? T(0) : a;
      slope = down ? T(0) : T(1);
    }
  }
}

// What happens to the units of a hidden layer.
struct Units {
  Activation act;
  bool drops;
  double scale;
  uint64_t threshold, seed;
  int64_t layer;
  int64_t first_task;  // the number of task 0 in the masks
  int64_t of_task;     // units of a task
};

// Whether unit `unit` of a task stays in a row.
__device__ inline bool stays(const Units& units, int64_t row, int64_t task, int64_t unit) {
  if (units.threshold > 0xffffffffu) return false;
  uint64_t z = units.seed + static_cast<uint64_t>(row) * 0x9E3779B97F4A7C15u;
  z += static_cast<uint64_t>((task + units.first_task) * 64 + units.layer + 1) * 0xD1B54A32D192ED03u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  z = z ^ (z >> 31);
  uint32_t v = static_cast<uint32_t>(z) + static_cast<uint32_t>(unit) * 0x9E3779B9u;
  v = (v ^ (v >> 16)) * 0x85EBCA6Bu;
  v = v ^ static_cast<uint32_t>(z >> 32);
  v = (v ^ (v >> 13)) * 0xC2B2AE35u;
  v = v ^ (v >> 16);
  return v >= static_cast<uint32_t>(units.threshold);
}

}  // namespace mtl::cuda
