// Activations of hidden units with their slopes, and dropout masks. Included inside an unnamed namespace by
// kernels_impl.h. Maths of the masks: keep_mask in torch_mtl_pyg/ops/reference_mlp.py.
#pragma once

// e^x - 1 for x <= 0: a polynomial near 0, where the difference would cancel.
MTL_INLINE Vec<float> exp_minus_one(Vec<float> x) {
  Vec<float> p = broadcast(1.0f / 40320);
  p = p * x + 1.0f / 5040;
  p = p * x + 1.0f / 720;
  p = p * x + 1.0f / 120;
  p = p * x + 1.0f / 24;
  p = p * x + 1.0f / 6;
  p = p * x + 0.5f;
  p = (p * x) * x + x;
  return x > -0.5f ? p : exp_negative(x) - 1.0f;
}
// The normal distribution's density at a, and its integral from -inf to a. With y = |a| / sqrt(2) and t = 3 / (3 + y),
// e^(y^2) erfc(y) = t p(t); p interpolates at the Chebyshev nodes of 0 <= y <= 9, relative error 2.5e-9.
MTL_INLINE void normal(Vec<float> a, Vec<float>& density, Vec<float>& integral) {
  const Vec<float> y = absolute<float>(a) * 0.70710678f, e = exp_negative(-0.5f * a * a), t = 3.0f / (3.0f + y);
  Vec<float> p = broadcast(0.05724684597f);
  p = p * t + -0.3006555469f;
  p = p * t + 0.5563062166f;
  p = p * t + -0.4695501137f;
  p = p * t + 0.4280487285f;
  p = p * t + -0.01570735884f;
  p = p * t + 0.197170465f;
  p = p * t + 0.1702789518f;
  p = p * t + 0.1888343317f;
  p = p * t + 0.1880274814f;
  const Vec<float> tail = 0.5f * e * t * p;
  density = e * 0.39894228f;
  integral = a > 0.0f ? 1.0f - tail : tail;
}
MTL_INLINE Vec<double> exp_minus_one(Vec<double> x) {
  for (int i = 0; i < VectorOf<double>::lanes; ++i) x[i] = __builtin_expm1(x[i]);
  return x;
}
MTL_INLINE void normal(Vec<double> a, Vec<double>& density, Vec<double>& integral) {
  for (int i = 0; i < VectorOf<double>::lanes; ++i) {
    density[i] = __builtin_exp(-0.5 * a[i] * a[i]) * 0.39894228040143267794;
    integral[i] = 0.5 * __builtin_erfc(-a[i] * 0.70710678118654752440);
  }
}

// h = act(a), slope = act'(a). NaN stays NaN.
template <class T>
MTL_INLINE void activate(Activation act, Vec<T> a, Vec<T>& h, Vec<T>& slope) {
  const Vec<T> zero{}, one = broadcast(T(1));
  switch (act) {
    case Activation::kGelu: {
      Vec<T> density, integral;
      normal(a, density, integral);
      h = a * integral;
      slope = integral + a * density;
      return;
    }
    case Activation::kSilu: {
      const Vec<T> e = exp_negative(-absolute<T>(a)), near = T(1) / (T(1) + e), far = e * near;
      const VecInt<T> up = a >= T(0);
      const Vec<T> s = up ? near : far;
      h = a * s;
      slope = s * (T(1) + a * (up ? far : near));
      return;
    }
    case Activation::kTanh: {
      const Vec<T> m = exp_minus_one(T(-2) * absolute<T>(a)), t = -m / (T(2) + m);
      h = a < T(0) ? -t : t;
      slope = T(1) - h * h;
      return;
    }
    case Activation::kElu: {
      const VecInt<T> up = a > T(0);
      const Vec<T> m = exp_minus_one(up ? zero : a);
      h = up ? a : m;
      slope = up ? one : m + T(1);
      return;
    }
    default: {
      const VecInt<T> down = a <= T(0);
      h = down ? zero : a;
      slope = down ? zero : one;
    }
  }
}

// n values, with what follows them up to a whole vector; slope may be null.
template <class T>
static MTL_NOINLINE void activate_run(Activation act, int64_t n, T* h, T* slope) {
  for (int64_t i = 0; i < n; i += VectorOf<T>::lanes) {
    Vec<T> value, of_value;
    activate<T>(act, load<T>(h + i), value, of_value);
    store<T>(h + i, value);
    if (slope) store<T>(slope + i, of_value);
  }
}

// ---- Dropout: factors 0 or `scale` of the units of one row and task, up to a whole vector.
MTL_INLINE uint64_t mask_key(const HeadsSpec& spec, int64_t row, int64_t task, int64_t layer) {
  uint64_t z = spec.seed + static_cast<uint64_t>(row) * 0x9E3779B97F4A7C15u;
  z += static_cast<uint64_t>((task + spec.first_task) * 64 + layer + 1) * 0xD1B54A32D192ED03u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}
template <class T>
static MTL_NOINLINE void mask_run(const HeadsSpec& spec, int64_t row, int64_t task, int64_t layer, int64_t n, T* out) {
  constexpr int L = VectorOf<T>::lanes;
  typedef typename Lanes<uint32_t, L>::type U;
  const uint64_t key = mask_key(spec, row, task, layer);
  const uint32_t low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32);
  const T scale = static_cast<T>(spec.scale);
  const bool all = spec.threshold > 0xffffffffu;
  U place;
  for (int i = 0; i < L; ++i) place[i] = static_cast<uint32_t>(i);
  for (int64_t j = 0; j < n; j += L) {
    U v = low + (place + static_cast<uint32_t>(j)) * 0x9E3779B9u;
    v = (v ^ (v >> 16)) * 0x85EBCA6Bu;
    v = v ^ high;
    v = (v ^ (v >> 13)) * 0xC2B2AE35u;
    v = v ^ (v >> 16);
    for (int i = 0; i < L; ++i) out[j + i] = !all && v[i] >= static_cast<uint32_t>(spec.threshold) ? scale : T(0);
  }
}
