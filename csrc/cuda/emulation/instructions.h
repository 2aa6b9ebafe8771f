// The instructions that kernels use, one lane at a time. Included by device.cuh, which has the same for a GPU.
#pragma once

namespace mtl::cuda {
namespace emulated {

inline int lane() { return fiber->index % kWarp; }

// Shows a value to the warp, waits for all in the mask, and returns what they show: valid until the next exchange.
template <class T>
const unsigned char (*exchange(uint32_t mask, const T& value))[64] {
  static_assert(sizeof(T) <= 64, "a lane's place");
  auto& values = block->warps[fiber->index / kWarp].values;
  std::memcpy(values[fiber->exchanges++ % 2][lane()], &value, sizeof(T));
  meet_warp(mask);
  return values[(fiber->exchanges + 1) % 2];
}
template <class T>
T shown(const unsigned char (*values)[64], int by) {
  T value;
  std::memcpy(&value, values[by], sizeof(T));
  return value;
}
template <class T>
T shuffle(uint32_t mask, const T& value, int from) {
  const auto values = exchange(mask, value);
  return mask >> from & 1 ? shown<T>(values, from) : value;
}

}  // namespace emulated

// ---- 16-bit numbers.
inline float to_float(float v) { return v; }
inline float to_float(BFloat16 v) { return __uint_as_float(static_cast<uint32_t>(v.bits) << 16); }
inline float to_float(Float16 v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000) << 16;
  const uint32_t exponent = v.bits >> 10 & 31, fraction = v.bits & 1023;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
  const float size =
      exponent ? __uint_as_float((exponent + 112) << 23 | fraction << 13) : static_cast<float>(fraction) * 0x1p-24f;
  return __uint_as_float(sign | __float_as_uint(size));
}
template <class T>
T from_float(float v);
template <>
inline float from_float<float>(float v) {
  return v;
}
template <>
inline BFloat16 from_float<BFloat16>(float v) {
  const uint32_t bits = __float_as_uint(v);
  if (v != v) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline Float16 from_float<Float16>(float v) {
  const uint32_t bits = __float_as_uint(v), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000u) return {0x7fff};
  if (size >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00)};  // 65520 and above
  if (size < 0x38800000u) {  // subnormal: units of 2^-24, which adding 0.5 leaves in the last bits
    const uint32_t sum = __float_as_uint(__uint_as_float(size) + 0.5f);
    return {static_cast<uint16_t>(sign | (sum - __float_as_uint(0.5f)))};
  }
  return {static_cast<uint16_t>(sign | ((size - 0x38000000u + 0xfff + (size >> 13 & 1)) >> 13))};
}
// To nearest, ties away from zero; a GPU's product ignores the last 13 bits.
template <class T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}
inline float fast_exp(float v) { return expf(v); }
inline float fast_log(float v) { return logf(v); }
inline float fast_divide(float a, float b) { return a / b; }
inline uint32_t to_tf32(float v) {
  const uint32_t bits = __float_as_uint(v);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000) & 0xffffe000u;
}

// ---- Tensor cores. Lane l has rows l / 4 and l / 4 + 8 of A and of the sums, and column l / 4 of B.
namespace emulated {

struct Operands {
  uint32_t a[4], b[2];
};
inline float number_of(uint32_t word, int half, BFloat16) {
  return to_float(BFloat16{static_cast<uint16_t>(word >> 16 * half)});
}
inline float number_of(uint32_t word, int half, Float16) {
  return to_float(Float16{static_cast<uint16_t>(word >> 16 * half)});
}
inline float number_of(uint32_t word, int, Tf32) { return __uint_as_float(word & 0xffffe000u); }

// kPer numbers in a word along the depth, 8 kPer deep: the word of (row, k) is in lane row * 4 + k / kPer % 4.
template <int kPer, class Tag>
void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Tag tag) {
  Operands own{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const auto values = exchange(0xffffffffu, own);
  const int row = lane() / 4, column = lane() % 4 * 2;
  Operands left[4], right[2][4];
  for (int q = 0; q < 4; ++q) {
    left[q] = shown<Operands>(values, row * 4 + q);
    for (int c = 0; c < 2; ++c) right[c][q] = shown<Operands>(values, (column + c) * 4 + q);
  }
  for (int i = 0; i < 4; ++i) {
    const int low = i / 2, c = i % 2;
    float sum = d[i];
    for (int k = 0; k < 8 * kPer; ++k) {
      const int q = k / kPer % 4, second = k / (4 * kPer);
      sum += number_of(left[q].a[low + 2 * second], k % kPer, tag) * number_of(right[c][q].b[second], k % kPer, tag);
    }
    d[i] = sum;
  }
}

inline const unsigned char* checked_row(const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) stop("a row of ldmatrix does not lie at 16 bytes");
  return static_cast<const unsigned char*>(row);
}

}  // namespace emulated

inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BFloat16 tag) {
  emulated::multiply<2>(d, a, b, tag);
}
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Float16 tag) {
  emulated::multiply<2>(d, a, b, tag);
}
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Tf32 tag) {
  emulated::multiply<1>(d, a, b, tag);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  using namespace emulated;
  const auto rows = exchange(0xffffffffu, checked_row(row));
  for (int m = 0; m < 4; ++m)
    std::memcpy(&r[m], shown<const unsigned char*>(rows, m * 8 + lane() / 4) + lane() % 4 * 4, 4);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  using namespace emulated;
  const auto rows = exchange(0xffffffffu, checked_row(row));
  for (int m = 0; m < 4; ++m) {
    uint16_t two[2];
    for (int i = 0; i < 2; ++i)
      std::memcpy(&two[i], shown<const unsigned char*>(rows, m * 8 + lane() % 4 * 2 + i) + lane() / 4 * 2, 2);
    r[m] = two[0] | static_cast<uint32_t>(two[1]) << 16;
  }
}

// ---- Copies: what they bring is not there before it is waited for, and what was there is gone at once.
inline void cp_async_16(void* shared, const void* global, bool there) {
  using namespace emulated;
  if (reinterpret_cast<uintptr_t>(shared) % 16 || (there && reinterpret_cast<uintptr_t>(global) % 16))
    stop("cp.async with an address that is no multiple of 16");
  Copy copy{shared, {}, fiber->group};
  if (there) std::memcpy(copy.bytes, global, 16);
  std::memset(shared, 0xff, 16);
  fiber->copies.push_back(copy);
}
inline void cp_async_commit() { ++emulated::fiber->group; }
template <int kPending>
void cp_async_wait() {
  using namespace emulated;
  size_t kept = 0;
  for (const Copy& copy : fiber->copies) {
    if (copy.group < fiber->group - kPending)
      std::memcpy(copy.to, copy.bytes, 16);
    else
      fiber->copies[kept++] = copy;
  }
  fiber->copies.resize(kept);
}
inline void sync_threads(int barrier, int threads) { emulated::meet_barrier(barrier, threads); }

}  // namespace mtl::cuda

// ---- CUDA's own.
inline void __syncthreads() { mtl::cuda::emulated::meet_block(0); }
inline int __syncthreads_count(int predicate) {
  mtl::cuda::emulated::meet_block(predicate);
  return mtl::cuda::emulated::block->votes[0];
}
inline int __syncthreads_and(int predicate) {
  mtl::cuda::emulated::meet_block(predicate);
  return mtl::cuda::emulated::block->votes[1];
}
inline int __syncthreads_or(int predicate) {
  mtl::cuda::emulated::meet_block(predicate);
  return mtl::cuda::emulated::block->votes[2];
}
inline void __syncwarp(unsigned mask = 0xffffffffu) { mtl::cuda::emulated::meet_warp(mask); }
template <class T>
T __shfl_sync(unsigned mask, T v, int from, int width = 32) {
  const int lane = mtl::cuda::emulated::lane();
  return mtl::cuda::emulated::shuffle(mask, v, lane / width * width + (from & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32) {
  const int lane = mtl::cuda::emulated::lane(), from = lane ^ bits;
  return mtl::cuda::emulated::shuffle(mask, v, from / width > lane / width ? lane : from);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32) {
  const int lane = mtl::cuda::emulated::lane(), from = lane + static_cast<int>(by);
  return mtl::cuda::emulated::shuffle(mask, v, from / width != lane / width ? lane : from);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32) {
  const int lane = mtl::cuda::emulated::lane(), from = lane - static_cast<int>(by);
  return mtl::cuda::emulated::shuffle(mask, v, from < lane / width * width ? lane : from);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const int yes = predicate != 0;
  const auto values = mtl::cuda::emulated::exchange(mask, yes);
  unsigned all = 0;
  for (int l = 0; l < 32; ++l)
    if (mask >> l & 1 && mtl::cuda::emulated::shown<int>(values, l)) all |= 1u << l;
  return all;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(static_cast<unsigned>(v)) : 32; }
template <class T>
T __ldg(const T* p) {
  return *p;
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
template <class T>
T atomicAdd(T* p, T v) {
  return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
template <class T>
T atomicCAS(T* p, T expected, T wanted) {
  __atomic_compare_exchange_n(p, &expected, wanted, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}
