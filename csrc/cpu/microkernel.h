// The register-tiled micro-kernel: C[MR, NV vectors] (+)= A[MR, P] * B[P, NV vectors], one chain of multiply-adds per
// element in the order of p. Included inside an unnamed namespace by kernels_impl.h.
#pragma once

// How a product is computed: the element of A and B in memory, the accumulator, one multiply-add.
template <class T>
struct Fma {  // T is float or double
  using Element = T;
  using Acc = T;
  static constexpr int depth = 1;  // steps of p in one element
  static MTL_INLINE Vec<T> multiply_add(T a, Vec<T> b, Vec<T> c) { return c + a * b; }
};

// Two neighbouring bfloat16 along p in one element: float32 sums of exact products.
struct BFloat16Pairs {
  using Element = uint32_t;
  using Acc = float;
  static constexpr int depth = 2;
  static MTL_INLINE Vec<float> multiply_add(uint32_t a, Vec<uint32_t> b, Vec<float> c) {
#if defined(__AVX512BF16__) && MTL_VECTOR_BYTES == 64
    return reinterpret_cast<Vec<float>>(_mm512_dpbf16_ps(
        reinterpret_cast<__m512>(c), reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a))),
        reinterpret_cast<__m512bh>(b)));
#else  // the same sum without the instruction, so that it can be tested on any CPU
    const float a0 = float_of_bits(a << 16), a1 = float_of_bits(a & 0xffff0000u);
    c = c + a0 * reinterpret_cast<Vec<float>>(b << 16);
    return c + a1 * reinterpret_cast<Vec<float>>(b & 0xffff0000u);
#endif
  }
};

// Tile heights by panel width: MR * NV accumulators, NV vectors of B and a broadcast fit the registers (16, or 32 with
// AVX-512), and at least 8 independent chains hide the latency of the multiply-add. float64 gets by with fewer: it is
// for checks, and each height is one more function to compile.
template <class K, int NV>
constexpr int kMaxRows = sizeof(typename K::Acc) == 8 ? (NV == 3 ? 3 : 4)
                         : MTL_VECTOR_BYTES == 64     ? (NV == 1   ? 8
                                                         : NV == 2 ? 12
                                                                   : 8)
                                                      : (NV == 1   ? 8
                                                         : NV == 2 ? 6
                                                                   : 4);

// The end of a tile whose last columns are padding: one function for all heights, off the fast path.
template <class T>
static MTL_NOINLINE void store_part(const T* tile, int rows, int tile_stride, int width, bool accumulate, const T* bias,
                                    T* c, int64_t c_stride) {
  for (int i = 0; i < rows; ++i) {
    const T* in = tile + i * tile_stride;
    T* out = c + i * c_stride;
    for (int j = 0; j < width; ++j) {
      T sum = in[j];
      if (accumulate) sum = out[j] + sum;
      if (bias) sum = sum + bias[j];
      out[j] = sum;
    }
  }
}

// A(i, p) lies at a[i * a_row + p * a_step]. bias: NV vectors added once, or null. `width` columns of the last vectors
// are valid; the rest is never stored.
template <class K, int MR, int NV>
static MTL_NOINLINE void micro_kernel(int64_t elements, const typename K::Element* a, int64_t a_row, int64_t a_step,
                                      const typename K::Element* b, bool accumulate, const typename K::Acc* bias,
                                      typename K::Acc* c, int64_t c_stride, int width) {
  using E = typename K::Element;
  using T = typename K::Acc;
  constexpr int L = VectorOf<T>::lanes;
  // One pointer per three rows, at [p], [p + row], [p + 2 row]: few enough to stay in registers at 12 rows.
  constexpr int kGroups = (MR + 2) / 3;
  const E* group[kGroups];
  MTL_UNROLL
  for (int g = 0; g < kGroups; ++g) group[g] = a + 3 * g * a_row;
  Vec<T> sum[MR][NV];
  MTL_UNROLL
  for (int i = 0; i < MR; ++i) {
    MTL_UNROLL
    for (int v = 0; v < NV; ++v) sum[i][v] = Vec<T>{};
  }
  if (accumulate) {  // asked for while the products run
    MTL_UNROLL
    for (int i = 0; i < MR; ++i) {
      __builtin_prefetch(c + i * c_stride, 1, 3);
      __builtin_prefetch(c + i * c_stride + NV * L - 1, 1, 3);
    }
  }
  for (int64_t p = 0; p < elements; ++p) {
    Vec<E> bv[NV];
    MTL_UNROLL
    for (int v = 0; v < NV; ++v) bv[v] = load<E>(b + v * L);
    b += NV * L;
    MTL_UNROLL
    for (int i = 0; i < MR; ++i) {
      const E ai = group[i / 3][i % 3 * a_row];
      MTL_UNROLL
      for (int v = 0; v < NV; ++v) sum[i][v] = K::multiply_add(ai, bv[v], sum[i][v]);
    }
    MTL_UNROLL
    for (int g = 0; g < kGroups; ++g) group[g] += a_step;
  }
  if (width < NV * L) {
    T tile[MR * NV * L];
    MTL_UNROLL
    for (int i = 0; i < MR; ++i) {
      MTL_UNROLL
      for (int v = 0; v < NV; ++v) store<T>(tile + (i * NV + v) * L, sum[i][v]);
    }
    store_part<T>(tile, MR, NV * L, width, accumulate, bias, c, c_stride);
    return;
  }
  if (accumulate) {
    MTL_UNROLL
    for (int i = 0; i < MR; ++i) {
      MTL_UNROLL
      for (int v = 0; v < NV; ++v) sum[i][v] = load<T>(c + i * c_stride + v * L) + sum[i][v];
    }
  }
  if (bias) {
    MTL_UNROLL
    for (int i = 0; i < MR; ++i) {
      MTL_UNROLL
      for (int v = 0; v < NV; ++v) sum[i][v] = sum[i][v] + load<T>(bias + v * L);
    }
  }
  MTL_UNROLL
  for (int i = 0; i < MR; ++i) {
    MTL_UNROLL
    for (int v = 0; v < NV; ++v) store<T>(c + i * c_stride + v * L, sum[i][v]);
  }
}

// Calls the micro-kernel of the height `rows` <= kMaxRows.
template <class K, int NV, int MR = kMaxRows<K, NV>>
MTL_INLINE void call_height(int rows, int64_t elements, const typename K::Element* a, int64_t a_row, int64_t a_step,
                            const typename K::Element* b, bool accumulate, const typename K::Acc* bias,
                            typename K::Acc* c, int64_t c_stride, int width) {
  if (rows == MR)
    micro_kernel<K, MR, NV>(elements, a, a_row, a_step, b, accumulate, bias, c, c_stride, width);
  else if constexpr (MR > 1)
    call_height<K, NV, MR - 1>(rows, elements, a, a_row, a_step, b, accumulate, bias, c, c_stride, width);
}

// Splits `rows` into tiles of nearly equal height: 7 rows of at most 6 become 4 + 3, for short tiles leave the
// multiply-add units waiting.
struct Heights {
  int64_t tiles, rows;
  MTL_INLINE Heights(int64_t rows, int max_rows) : tiles(ceil_div(rows, max_rows)), rows(rows) {}
  MTL_INLINE int64_t begin(int64_t tile) const { return tile * (rows / tiles) + min_of(tile, rows % tiles); }
};

// A panel of B is NV vectors wide: 2, and for the last one 1 to 3, so that no vector is only padding.
template <class T>
MTL_INLINE int panel_vectors(int64_t columns_left) {
  const int64_t vectors = ceil_div(columns_left, VectorOf<T>::lanes);
  return vectors >= 4 ? 2 : static_cast<int>(vectors);
}
