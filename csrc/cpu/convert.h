// Conversions between the stored types and the accumulators, bit for bit those of IEEE 754 (round to nearest even).
// Included inside an unnamed namespace by kernels_impl.h.
#pragma once

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

MTL_INLINE float float_of_bits(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
MTL_INLINE uint32_t bits_of_float(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}

MTL_INLINE float widen(float v) { return v; }
MTL_INLINE double widen(double v) { return v; }
MTL_INLINE float widen(BFloat16 v) { return float_of_bits(static_cast<uint32_t>(v.bits) << 16); }

MTL_INLINE void narrow(float v, float* out) { *out = v; }
MTL_INLINE void narrow(double v, double* out) { *out = v; }
MTL_INLINE void narrow(float v, BFloat16* out) {
  const uint32_t u = bits_of_float(v);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (u >> 16) | 0x40u;
  out->bits = static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
}

#ifdef __F16C__
MTL_INLINE float widen(Float16 v) { return _cvtsh_ss(v.bits); }
MTL_INLINE void narrow(float v, Float16* out) { out->bits = _cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT); }
#else
MTL_INLINE float widen(Float16 v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  const uint32_t magnitude = v.bits & 0x7fffu;
  if (magnitude >= 0x7c00u)
    return float_of_bits(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13) | ((magnitude & 0x3ffu) ? 0x400000u : 0u));
  // Read the half's bits as a float's: the value is off by 2^-112 exactly, subnormals included.
  return float_of_bits(sign | bits_of_float(float_of_bits(magnitude << 13) * 0x1p112f));
}
MTL_INLINE void narrow(float v, Float16* out) {
  const uint32_t u = bits_of_float(v);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);  // NaN stays NaN, quiet
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // rounds to 65536 or more: infinity
  } else if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 moves the last bit kept to the last bit of the float, which rounds to nearest even.
    half = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}
#endif

// ---- Runs: out[i] = in[i * stride], and back. The vectors are written out, so that the speed does not hang on what a
// compiler chooses to vectorise.
constexpr int kLanes = VectorOf<float>::lanes;
using Bits = Vec<uint32_t>;
using HalfBits = Lanes<uint16_t, kLanes>;

MTL_INLINE int64_t widen_vectors(const float* in, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store<float>(out + i, load<float>(in + i));
  return i;
}
MTL_INLINE int64_t widen_vectors(const double* in, int64_t n, double* out) {
  constexpr int L = VectorOf<double>::lanes;
  int64_t i = 0;
  for (; i + L <= n; i += L) store<double>(out + i, load<double>(in + i));
  return i;
}
MTL_INLINE int64_t widen_vectors(const BFloat16* in, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const HalfBits::type half = *reinterpret_cast<const HalfBits::unaligned*>(in + i);
    store<uint32_t>(reinterpret_cast<uint32_t*>(out + i), __builtin_convertvector(half, Bits) << 16);
  }
  return i;
}
MTL_INLINE int64_t widen_vectors([[maybe_unused]] const Float16* in, [[maybe_unused]] int64_t n,
                                 [[maybe_unused]] float* out) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
#endif
  return i;
}

MTL_INLINE int64_t narrow_vectors(const float* in, int64_t n, float* out) { return widen_vectors(in, n, out); }
MTL_INLINE int64_t narrow_vectors(const double* in, int64_t n, double* out) { return widen_vectors(in, n, out); }
MTL_INLINE int64_t narrow_vectors(const float* in, int64_t n, BFloat16* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Bits u = reinterpret_cast<Bits>(load<float>(in + i));
    const Bits rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const Bits nan = reinterpret_cast<Bits>((u & 0x7fffffffu) > 0x7f800000u);
    const Bits half = (nan & ((u >> 16) | 0x40u)) | (~nan & rounded);
    *reinterpret_cast<HalfBits::unaligned*>(out + i) = __builtin_convertvector(half, HalfBits::type);
  }
  return i;
}
MTL_INLINE int64_t narrow_vectors([[maybe_unused]] const float* in, [[maybe_unused]] int64_t n,
                                  [[maybe_unused]] Float16* out) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  return i;
}

template <class In, class Acc>
MTL_INLINE void widen_run(const In* in, int64_t n, int64_t stride, Acc* out) {
  for (int64_t i = stride == 1 ? widen_vectors(in, n, out) : 0; i < n; ++i) out[i] = widen(in[i * stride]);
}
template <class Acc, class Out>
MTL_INLINE void narrow_run(const Acc* in, int64_t n, Out* out) {
  for (int64_t i = narrow_vectors(in, n, out); i < n; ++i) narrow(in[i], out + i);
}
// sum[i] += in[i]
template <class Acc>
MTL_INLINE void add_run(const Acc* in, int64_t n, Acc* sum) {
  constexpr int L = VectorOf<Acc>::lanes;
  int64_t i = 0;
  for (; i + L <= n; i += L) store<Acc>(sum + i, load<Acc>(sum + i) + load<Acc>(in + i));
  for (; i < n; ++i) sum[i] += in[i];
}
