// The losses of one task over a tile of rows, and their gradients at the logits, in place. The tile is transposed:
// logit (row r, column c) lies at z[c * stride + r], so that rows fill the vectors whatever the number of classes.
// Rows come in whole vectors; those past the tile's end have no label. Maths and sources:
// torch_mtl_pyg/ops/multi_head_loss.py.
//
// A row without a label adds nothing and gets a gradient of exactly 0, whatever its logits are.
// Included inside an unnamed namespace by kernels_impl.h.
#pragma once

// ---- Labels of a tile, gathered as numbers, become what the losses read, in place. Both come in whole vectors.
template <class T>
MTL_INLINE VecInt<T> labelled(const TaskSpec& task, Vec<T> v) {
  const VecInt<T> number = v == v;
  return task.missing_number ? number & (v != static_cast<T>(task.missing)) : number;
}
// Classes; -1: missing.
template <class T>
static void as_classes(const TaskSpec& task, int64_t padded, T* labels) {
  using Int = typename IntOf<T>::type;
  for (int64_t r = 0; r < padded; r += VectorOf<T>::lanes) {
    const Vec<T> v = load<T>(labels + r);
    const VecInt<T> present = labelled<T>(task, v);
    const VecInt<T> classes = __builtin_convertvector(keep<T>(present, v), VecInt<T>);
    store<Int>(reinterpret_cast<Int*>(labels + r), classes | ~present);
  }
}
// Numbers; NaN: missing.
template <class T>
static void as_numbers(const TaskSpec& task, int64_t padded, T* labels) {
  if (!task.missing_number) return;
  for (int64_t r = 0; r < padded; r += VectorOf<T>::lanes) {
    const Vec<T> v = load<T>(labels + r);
    store<T>(labels + r, labelled<T>(task, v) ? v : broadcast(static_cast<T>(__builtin_nan(""))));
  }
}

// ---- Cross-entropy. With class weights w, smoothing e and W = sum of w, of a row with class y:
//   loss = (1 - e) w_y (lse - z_y) + e / C sum_c w_c (lse - z_c)
//   gradient_c = p_c ((1 - e) w_y + e W / C) - [c = y] (1 - e) w_y - e w_c / C
// kGeneral: with weights or smoothing.
template <class T, bool kGeneral>
static double cross_entropy(const TaskSpec& task, T* z, int64_t stride, int64_t rows,
                            const typename IntOf<T>::type* classes, T scale, bool gradient) {
  using Int = typename IntOf<T>::type;
  constexpr int L = VectorOf<T>::lanes;
  const int64_t width = task.width;
  const T smoothing = static_cast<T>(task.option), share = smoothing / static_cast<T>(width);
  const T all = task.numbers ? static_cast<T>(task.numbers_sum) : static_cast<T>(width);
  Vec<T> sum{};
  for (int64_t r = 0; r < rows; r += L) {
    const VecInt<T> y = load<Int>(classes + r), present = y >= Int(0);
    T* column = z + r;
    Vec<T> largest = load<T>(column), own{};
    for (int64_t c = 0; c < width; ++c) {
      const Vec<T> v = load<T>(column + c * stride);
      largest = larger(v, largest);
      own = y == static_cast<Int>(c) ? v : own;
    }
    Vec<T> total{}, spread{};
    for (int64_t c = 0; c < width; ++c) {
      const Vec<T> v = load<T>(column + c * stride) - largest, e = exp_negative(v);
      total = total + e;
      if (gradient) store<T>(column + c * stride, e);
      if constexpr (kGeneral) spread = spread - v * (task.numbers ? static_cast<T>(task.numbers[c]) : T(1));
    }
    const Vec<T> log_total = log_of(total);
    Vec<T> weight = broadcast(T(1));
    if constexpr (kGeneral) {
      if (task.numbers)
        for (int i = 0; i < L; ++i) weight[i] = y[i] >= 0 ? static_cast<T>(task.numbers[y[i]]) : T(0);
    }
    Vec<T> loss = (largest - own) + log_total;
    if constexpr (kGeneral) {
      weight = weight * (T(1) - smoothing);
      loss = weight * loss;
      if (smoothing > T(0)) loss = loss + share * (spread + all * log_total);
    }
    sum = sum + keep<T>(present, loss);
    if (!gradient) continue;
    const Vec<T> at_own = weight * scale;
    Vec<T> of_all = at_own;
    if constexpr (kGeneral) of_all = of_all + share * all * scale;
    of_all = of_all / total;
    for (int64_t c = 0; c < width; ++c) {
      Vec<T> g = load<T>(column + c * stride) * of_all - keep<T>(y == static_cast<Int>(c), at_own);
      if constexpr (kGeneral) g = g - share * scale * (task.numbers ? static_cast<T>(task.numbers[c]) : T(1));
      store<T>(column + c * stride, keep<T>(present, g));
    }
  }
  return sum_lanes<T>(sum);
}

// Two classes: with the margin m of the own class, softplus(-m), whose slope is -1 / (1 + e^m).
template <class T>
static double cross_entropy_of_two(T* z, int64_t stride, int64_t rows, const typename IntOf<T>::type* classes, T scale,
                                   bool gradient) {
  using Int = typename IntOf<T>::type;
  Vec<T> sum{};
  for (int64_t r = 0; r < rows; r += VectorOf<T>::lanes) {
    const VecInt<T> y = load<Int>(classes + r), present = y >= Int(0), second = y == Int(1);
    const Vec<T> z0 = load<T>(z + r), z1 = load<T>(z + stride + r), d = z1 - z0, m = second ? d : -d;
    const Vec<T> most = larger(z0, z1), nan_if_infinite = most - most;  // as inf - inf in a softmax
    const Vec<T> e = exp_negative(-absolute<T>(m)), zero{};
    const VecInt<T> right = m >= zero;
    sum = sum + keep<T>(present, (right ? zero : -m) + log_one_plus(e) + nan_if_infinite);
    if (!gradient) continue;
    const Vec<T> slope = keep<T>(present, scale * (right ? e : broadcast(T(1))) / (T(1) + e) + nan_if_infinite);
    store<T>(z + r, second ? slope : -slope);
    store<T>(z + stride + r, second ? -slope : slope);
  }
  return sum_lanes<T>(sum);
}

// ---- Losses of single numbers: f(z, y, loss, gradient).
template <class T, class F>
MTL_INLINE double each_number(T* z, int64_t rows, const T* targets, T scale, bool gradient, F f) {
  constexpr int L = VectorOf<T>::lanes;
  Vec<T> sum{};
  for (int64_t r = 0; r < rows; r += L) {
    const Vec<T> y = load<T>(targets + r);
    const VecInt<T> present = y == y;
    Vec<T> loss, g;
    f(load<T>(z + r), y, loss, g);
    sum = sum + keep<T>(present, loss);
    if (gradient) store<T>(z + r, keep<T>(present, g * scale));
  }
  return sum_lanes<T>(sum);
}

// p y softplus(-z) + (1 - y) softplus(z): all terms of one sign, where (1 - y) z + ... would cancel.
template <class T>
static double bce(T positive, T* z, int64_t rows, const T* targets, T scale, bool gradient) {
  return each_number<T>(z, rows, targets, scale, gradient, [&](Vec<T> x, Vec<T> y, Vec<T>& loss, Vec<T>& g) {
    const Vec<T> e = exp_negative(-absolute<T>(x)), tail = log_one_plus(e), s = T(1) / (T(1) + e), es = e * s;
    const VecInt<T> up = x >= T(0);
    const Vec<T> zero{}, on = positive * y, off = T(1) - y;
    loss = on * ((up ? zero : -x) + tail) + off * ((up ? x : zero) + tail);
    g = off * (up ? s : es) - on * (up ? es : s);
  });
}

template <class T>
static double simple_loss(const TaskSpec& task, T* z, int64_t rows, const T* targets, T scale, bool gradient) {
  const T delta = static_cast<T>(task.option);
  switch (task.loss) {
    case Loss::kMse:
      return each_number<T>(z, rows, targets, scale, gradient, [](Vec<T> x, Vec<T> y, Vec<T>& loss, Vec<T>& g) {
        const Vec<T> d = x - y;
        loss = d * d;
        g = d + d;
      });
    case Loss::kL1:
      return each_number<T>(z, rows, targets, scale, gradient, [](Vec<T> x, Vec<T> y, Vec<T>& loss, Vec<T>& g) {
        const Vec<T> d = x - y, zero{};
        loss = absolute<T>(d);
        g = d > zero ? broadcast(T(1)) : d < zero ? broadcast(T(-1)) : d;  // 0 at 0, NaN at NaN
      });
    case Loss::kHuber:
      return each_number<T>(z, rows, targets, scale, gradient, [&](Vec<T> x, Vec<T> y, Vec<T>& loss, Vec<T>& g) {
        const Vec<T> d = x - y, a = absolute<T>(d);
        loss = a < delta ? T(0.5) * a * a : delta * (a - T(0.5) * delta);
        g = at_most<T>(at_least<T>(d, -delta), delta);
      });
    case Loss::kPoissonNll:
      return each_number<T>(z, rows, targets, scale, gradient, [](Vec<T> x, Vec<T> y, Vec<T>& loss, Vec<T>& g) {
        const Vec<T> rate = exp_any(x);
        loss = rate - y * x;
        g = rate - y;
      });
    default:
      return 0.0;
  }
}

// Mean m and log-variance s, of which the variance is at least 1e-6 in the value, not in the gradient's path.
template <class T>
static double gaussian(T* mean, T* log_variance, int64_t rows, const T* targets, T scale, bool gradient) {
  constexpr int L = VectorOf<T>::lanes;
  constexpr T kLogEps = static_cast<T>(-13.815510557964274);
  Vec<T> sum{};
  for (int64_t r = 0; r < rows; r += L) {
    const Vec<T> y = load<T>(targets + r), s = load<T>(log_variance + r), clamped = at_least<T>(s, kLogEps);
    const VecInt<T> present = y == y;
    const Vec<T> inverse = exp_any(-clamped), d = load<T>(mean + r) - y, ratio = d * d * inverse;
    sum = sum + keep<T>(present, T(0.5) * (clamped + ratio));
    if (!gradient) continue;
    const Vec<T> damping = exp_any(at_most<T>(s - kLogEps, T(0)));
    store<T>(mean + r, keep<T>(present, scale * d * inverse));
    store<T>(log_variance + r, keep<T>(present, scale * T(0.5) * damping * (T(1) - ratio)));
  }
  return sum_lanes<T>(sum);
}

// One task over a tile: returns the sum of its losses; with `gradient`, z becomes scale * d loss / d z.
// labels: label column c, changed.
template <class T>
static double task_loss(const TaskSpec& task, T* z, int64_t stride, int64_t padded, T scale, bool gradient, T* labels,
                        int64_t c) {
  if (task.loss == Loss::kCrossEntropy) {
    as_classes<T>(task, padded, labels);
    const auto* classes = reinterpret_cast<const typename IntOf<T>::type*>(labels);
    if (task.numbers || task.option > 0)
      return cross_entropy<T, true>(task, z, stride, padded, classes, scale, gradient);
    if (task.width == 2) return cross_entropy_of_two<T>(z, stride, padded, classes, scale, gradient);
    return cross_entropy<T, false>(task, z, stride, padded, classes, scale, gradient);
  }
  as_numbers<T>(task, padded, labels);
  T* column = z + c * stride;
  if (task.loss == Loss::kGaussianNll)
    return gaussian<T>(column, column + task.labels.columns * stride, padded, labels, scale, gradient);
  if (task.loss == Loss::kBce)
    return bce<T>(task.numbers ? static_cast<T>(task.numbers[c]) : T(1), column, padded, labels, scale, gradient);
  return simple_loss<T>(task, column, padded, labels, scale, gradient);
}
