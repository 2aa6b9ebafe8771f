// exp, log and their kin on vectors. float32: argument reduction and a polynomial (Cephes, S. Moshier), within 2 units
// in the last place; float64, which serves checks: the C library, lane by lane. NaN comes out as NaN. Included inside
// an unnamed namespace by kernels_impl.h.
#pragma once

template <class T>
struct IntOf {
  using type = int32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
};
template <class T>
using VecInt = Vec<typename IntOf<T>::type>;

template <class T>
MTL_INLINE Vec<T> broadcast(T v) {
  return Vec<T>{} + v;
}
template <class T>
MTL_INLINE Vec<T> keep(VecInt<T> mask, Vec<T> v) {  // v where the mask is set, else 0
  return reinterpret_cast<Vec<T>>(mask & reinterpret_cast<VecInt<T>>(v));
}
template <class T>
MTL_INLINE Vec<T> absolute(Vec<T> v) {
  constexpr typename IntOf<T>::type kNotSign = ~(typename IntOf<T>::type(1) << (8 * sizeof(T) - 1));
  return reinterpret_cast<Vec<T>>(reinterpret_cast<VecInt<T>>(v) & kNotSign);
}
// The larger one; b where one of them is NaN.
MTL_INLINE Vec<float> larger(Vec<float> a, Vec<float> b) {
#if defined(__AVX2__) && MTL_VECTOR_BYTES == 32  // one instruction, which the compiler does not find by itself
  return reinterpret_cast<Vec<float>>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}
MTL_INLINE Vec<double> larger(Vec<double> a, Vec<double> b) { return a > b ? a : b; }
// Of an ordered comparison a NaN in v stays.
template <class T>
MTL_INLINE Vec<T> at_most(Vec<T> v, T bound) {
  return v > bound ? broadcast(bound) : v;
}
template <class T>
MTL_INLINE Vec<T> at_least(Vec<T> v, T bound) {
  return v < bound ? broadcast(bound) : v;
}
template <class T>
MTL_INLINE double sum_lanes(Vec<T> v) {
  double sum = 0;
  MTL_UNROLL
  for (int i = 0; i < VectorOf<T>::lanes; ++i) sum += static_cast<double>(v[i]);
  return sum;
}

// e^r * 2^n = e^x with |r| <= ln(2) / 2; n comes as a float and as an integer.
struct Exponent {
  Vec<float> mantissa;
  Vec<int32_t> n;
};
MTL_INLINE Exponent reduce_exp(Vec<float> x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Vec<float> t = x * 1.44269504088896341f + kMagic;
  const Vec<float> n = t - kMagic;
  Vec<float> r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec<float> p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return {p * (r * r) + (r + 1.0f), reinterpret_cast<Vec<int32_t>>(t) - 0x4B400000};
}
MTL_INLINE Vec<float> power_of_two(Vec<int32_t> n) { return reinterpret_cast<Vec<float>>((n + 127) << 23); }

// For x <= 0. Results below the smallest normal number are 0.
MTL_INLINE Vec<float> exp_negative(Vec<float> x) {
  constexpr float kLowest = -87.33654f;
  const Exponent e = reduce_exp(x);
  const Vec<float> result = e.mantissa * power_of_two(e.n);  // anything below kLowest
  return x < kLowest ? Vec<float>{} : result;
}
MTL_INLINE Vec<float> exp_any(Vec<float> x) {
  constexpr float kLowest = -87.33654f, kHighest = 88.72283f;
  const Exponent e = reduce_exp(at_most(at_least(x, kLowest), kHighest));
  const Vec<int32_t> half = e.n >> 1;  // 2^128 is no float
  Vec<float> result = e.mantissa * power_of_two(half) * power_of_two(e.n - half);
  result = x > kHighest ? broadcast(__builtin_inff()) : result;
  return x < kLowest ? Vec<float>{} : result;
}
// log(1 + m) + n * ln(2) for -0.293 <= m <= 0.415.
MTL_INLINE Vec<float> log_reduced(Vec<float> m, Vec<float> n) {
  const Vec<float> z = m * m;
  Vec<float> p = broadcast(7.0376836292e-2f);
  p = p * m + -1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m + -1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m + -1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m + -2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  Vec<float> y = p * (m * z) + n * -2.12194440e-4f;
  y = y - z * 0.5f;
  return (m + y) + n * 0.693359375f;
}
// For finite s >= 1, or NaN.
MTL_INLINE Vec<float> log_of(Vec<float> s) {
  const Vec<int32_t> bits = reinterpret_cast<Vec<int32_t>>(s);
  Vec<int32_t> n = (bits >> 23) - 127;
  Vec<float> m = reinterpret_cast<Vec<float>>((bits & 0x007fffff) | 0x3f800000);  // in [1, 2)
  const Vec<int32_t> large = m > 1.41421356f;
  m = large ? m * 0.5f : m;
  n = n - large;  // a set mask is -1
  return log_reduced(m - 1.0f, __builtin_convertvector(n, Vec<float>)) + (s - s);
}
// log(1 + e) for 0 <= e <= 1.
MTL_INLINE Vec<float> log_one_plus(Vec<float> e) {
  const Vec<int32_t> large = e > 0.41421356f;
  return log_reduced(large ? (e - 1.0f) * 0.5f : e, large ? broadcast(1.0f) : Vec<float>{});
}

#define MTL_LANE_BY_LANE(name, expression)              \
  MTL_INLINE Vec<double> name(Vec<double> x) {          \
    Vec<double> out;                                    \
    for (int i = 0; i < VectorOf<double>::lanes; ++i) { \
      const double v = x[i];                            \
      out[i] = expression;                              \
    }                                                   \
    return out;                                         \
  }
MTL_LANE_BY_LANE(exp_negative, __builtin_exp(v))
MTL_LANE_BY_LANE(exp_any, __builtin_exp(v))
MTL_LANE_BY_LANE(log_of, __builtin_log(v))
MTL_LANE_BY_LANE(log_one_plus, __builtin_log1p(v))
#undef MTL_LANE_BY_LANE
