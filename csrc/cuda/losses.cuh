// The losses of one row and one task, and their gradients at the logits, in place: by one thread, or by some lanes of a
// warp, each with every kLanes-th column. Maths and sources: torch_mtl_pyg/ops/multi_head_loss.py.
//
// A row without a label adds nothing and gets a gradient of exactly 0, whatever its logits are.
#pragma once

#include "../common/losses.h"
#include "device.cuh"

namespace mtl::cuda {

// A task as the kernels read it from device memory. Labels come from `labels` and go, as numbers with NaN for a missing
// one, to the rows [label_row, label_row + labels.columns) of a matrix [label columns, N].
struct DeviceTask {
  int64_t begin, width, label_row;
  int64_t numbers;  // where its class weights or positive weights begin, or -1
  int64_t missing;
  Labels labels;
  double option, numbers_sum;
  Loss loss;
  bool missing_number, counts;
};

template <int kLanes>
struct Lanes {
  static constexpr int value = kLanes;
};

// The lanes that work together: neighbours, kLanes of them.
template <int kLanes>
__device__ unsigned lanes_mask() {
  if constexpr (kLanes == 32) return 0xffffffffu;
  return ((1u << kLanes % 32) - 1) << static_cast<int>(threadIdx.x) % 32 / kLanes * kLanes;
}
template <int kLanes, class T>
__device__ T lanes_sum(T v) {
  if constexpr (kLanes > 1)
    for (int offset = kLanes / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(lanes_mask<kLanes>(), v, offset);
  return v;
}
template <int kLanes, class T>
__device__ T lanes_max(T v) {
  if constexpr (kLanes > 1)
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      const T other = __shfl_xor_sync(lanes_mask<kLanes>(), v, offset);
      v = other > v ? other : v;
    }
  return v;
}

// With class weights w, smoothing e and W = sum of w, of a row with class y:
//   loss = (1 - e) w_y (lse - z_y) + e / C sum_c w_c (lse - z_c)
//   gradient_c = p_c ((1 - e) w_y + e W / C) - [c = y] (1 - e) w_y - e w_c / C
// Exponentials as large as that of the largest logit are counted, not added, and one of them is left out, so that
// log(1 + rest) is accurate where the loss is small.
template <class T, int kLanes>
__device__ T cross_entropy(const DeviceTask& task, const double* reals, T* z, int64_t step, T label, T scale,
                           bool gradient, int lane) {
  const int width = static_cast<int>(task.width);
  if (label != label) {
    if (gradient)
      for (int c = lane; c < width; c += kLanes) z[c * step] = T(0);
    return T(0);
  }
  const int own = static_cast<int>(label);
  const double* const weights = task.numbers < 0 ? nullptr : reals + task.numbers;
  T largest = z[0];
  for (int c = lane; c < width; c += kLanes) largest = z[c * step] > largest ? z[c * step] : largest;
  largest = lanes_max<kLanes>(largest);
  const T smoothing = static_cast<T>(task.option), share = smoothing / static_cast<T>(width);
  const T all = weights ? static_cast<T>(task.numbers_sum) : static_cast<T>(width);
  const T at_own = z[own * step] - largest;
  T spread = T(0);
  if (smoothing > T(0)) {
    for (int c = lane; c < width; c += kLanes)
      spread -= (z[c * step] - largest) * (weights ? static_cast<T>(weights[c]) : T(1));
    spread = lanes_sum<kLanes>(spread);
  }
  if constexpr (kLanes > 1) __syncwarp(lanes_mask<kLanes>());  // all have read it: the logits become exponentials
  T rest = T(0), ones = T(0);
  for (int c = lane; c < width; c += kLanes) {
    const T e = exp(z[c * step] - largest);
    rest += e >= T(1) ? T(0) : e;
    ones += e >= T(1) ? T(1) : T(0);
    if (gradient) z[c * step] = e;
  }
  rest = lanes_sum<kLanes>(rest) + (lanes_sum<kLanes>(ones) - T(1));
  // As inf - inf in a softmax: an infinite logit gives NaN.
  const T log_total = log1p(rest) + (largest - largest);
  const T weight = (weights ? static_cast<T>(weights[own]) : T(1)) * (T(1) - smoothing);
  T loss = weight * (log_total - at_own);
  if (smoothing > T(0)) loss += share * (spread + all * log_total);
  if (gradient) {
    const T of_all = (weight + share * all) * scale / (T(1) + rest);
    for (int c = lane; c < width; c += kLanes) z[c * step] *= of_all;
    if (own % kLanes == lane) z[own * step] -= weight * scale;
    if (smoothing > T(0))
      for (int c = lane; c < width; c += kLanes)
        z[c * step] -= share * scale * (weights ? static_cast<T>(weights[c]) : T(1));
  }
  return lane == 0 ? loss : T(0);
}

// The loss of one number z with label y, and its slope.
template <class T>
__device__ T number_loss(Loss loss, T z, T y, T option, T positive, T& slope) {
  const T d = z - y;
  switch (loss) {
    case Loss::kBce: {  // p y softplus(-z) + (1 - y) softplus(z): all terms of one sign
      const T size = z < T(0) ? -z : z, e = exp(-size), tail = log1p(e), s = T(1) / (T(1) + e), es = e * s;
      const bool up = z >= T(0);
      const T on = positive * y, off = T(1) - y;
      slope = off * (up ? s : es) - on * (up ? es : s);
      return on * ((up ? T(0) : -z) + tail) + off * ((up ? z : T(0)) + tail);
    }
    case Loss::kMse:
      slope = d + d;
      return d * d;
    case Loss::kL1:
      slope = d > T(0) ? T(1) : d < T(0) ? T(-1) : d;  // 0 at 0, NaN at NaN
      return d < T(0) ? -d : d;
    case Loss::kHuber: {
      const T size = d < T(0) ? -d : d;
      slope = d < -option ? -option : d > option ? option : d;
      return size < option ? T(0.5) * size * size : option * (size - T(0.5) * option);
    }
    default: {  // kPoissonNll
      const T rate = exp(z);
      slope = rate - y;
      return rate - y * z;
    }
  }
}

// Mean m and log-variance s, of which the variance is at least 1e-6 in the value, not in the gradient's path.
template <class T>
__device__ T gaussian_loss(T* mean, T* log_variance, T y, T scale, bool gradient) {
  constexpr T kLogEps = static_cast<T>(-13.815510557964274);
  const T s = *log_variance, clamped = s < kLogEps ? kLogEps : s;
  const T inverse = exp(-clamped), d = *mean - y, ratio = d * d * inverse;
  if (gradient) {
    *mean = scale * d * inverse;
    *log_variance = scale * T(0.5) * exp(s - kLogEps > T(0) ? T(0) : s - kLogEps) * (T(1) - ratio);
  }
  return T(0.5) * (clamped + ratio);
}

// One row of one task: returns this lane's part of its loss; with `gradient`, z becomes scale * d loss / d z.
// Logit c lies at z[c * step], label c at labels[c * label_step].
template <class T, int kLanes>
__device__ T row_loss(const DeviceTask& task, const double* reals, T* z, int64_t step, const T* labels,
                      int64_t label_step, T scale, bool gradient, int lane) {
  if (!task.counts) {
    if (gradient)
      for (int64_t c = lane; c < task.width; c += kLanes) z[c * step] = T(0);
    return T(0);
  }
  if (task.loss == Loss::kCrossEntropy)
    return cross_entropy<T, kLanes>(task, reals, z, step, labels[0], scale, gradient, lane);
  const int64_t columns = task.labels.columns;
  T sum = T(0);
  for (int64_t c = lane; c < columns; c += kLanes) {
    const T y = labels[c * label_step];
    T* const at = z + c * step;
    if (task.loss == Loss::kOutside) {
      if (gradient) *at = y;
    } else if (y != y) {
      if (gradient) *at = T(0);
      if (gradient && task.loss == Loss::kGaussianNll) at[columns * step] = T(0);
    } else if (task.loss == Loss::kGaussianNll) {
      sum += gaussian_loss<T>(at, at + columns * step, y, scale, gradient);
    } else {
      T slope;
      const T positive = task.numbers < 0 ? T(1) : static_cast<T>(reals[task.numbers + c]);
      sum += number_loss<T>(task.loss, *at, y, static_cast<T>(task.option), positive, slope);
      if (gradient) *at = slope * scale;
    }
  }
  return sum;
}

}  // namespace mtl::cuda
