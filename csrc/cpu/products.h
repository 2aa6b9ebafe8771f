// Packing, and the products by row tiles that the ops are made of. Included inside an unnamed namespace by
// kernels_impl.h.
#pragma once

// Sizes of the blocks, in elements. A panel of kDepth x 16 float32 (24 KiB) stays in the first-level cache while a
// tile of kTileRows rows, kept in the second level, passes by it.
constexpr int64_t kDepth = 384;     // steps of p between two visits of C
constexpr int64_t kTileRows = 192;  // rows of a tile; a multiple of the tile heights
// Rows of a tile of `outer`: the tiles of G and X and the block of the sum share the second-level cache.
constexpr int64_t kOuterRows = 192;

// ---- Which arithmetic a stored type uses.
template <class In>
struct ArithmeticOf {
  using type = Fma<float>;
};
template <>
struct ArithmeticOf<double> {
  using type = Fma<double>;
};
#ifdef MTL_BFLOAT16_PAIRS
template <>
struct ArithmeticOf<BFloat16> {
  using type = BFloat16Pairs;
};
#endif

// Element e of a run along p that starts at `in` and has n steps.
template <class K, class In>
MTL_INLINE typename K::Element element_at(const In* in, int64_t e, int64_t stride, int64_t n) {
  if constexpr (K::depth == 1) {
    return widen(in[e * stride]);
  } else {
    uint32_t pair;
    if (stride == 1 && 2 * e + 1 < n) {
      __builtin_memcpy(&pair, in + 2 * e, 4);
      return pair;
    }
    const uint32_t low = in[2 * e * stride].bits;
    const uint32_t high = 2 * e + 1 < n ? in[(2 * e + 1) * stride].bits : 0u;
    return low | high << 16;
  }
}

template <class In>
MTL_INLINE const In* at(const Matrix& m, int64_t i, int64_t j) {
  return static_cast<const In*>(m.data) + i * m.row_stride + j * m.col_stride;
}

// Stored rows can be multiplied where they lie, without a copy, if they hold the elements the arithmetic reads.
template <class K, class In>
constexpr bool kSameElement = __is_same(typename K::Element, In);
template <class K, class In>
constexpr bool kSameAccumulator = __is_same(typename K::Acc, In);

// ---- Panels of B.
template <class K>
MTL_INLINE int64_t padded_columns(int64_t n) {
  constexpr int64_t L = VectorOf<typename K::Acc>::lanes;
  return ceil_div(n, L) * L;
}

template <class E>
MTL_INLINE void copy_vectors(const E* in, int64_t n, E* out) {
  for (int64_t i = 0; i < n; i += VectorOf<E>::lanes) store<E>(out + i, load<E>(in + i));
}

// Packs the columns [j, j + width) and steps [p0, p1) of B to out[element][NV * L].
template <class K, class In>
static void pack_panel(const Matrix& b, int64_t p0, int64_t p1, int64_t j, int64_t width, int64_t padded,
                       typename K::Element* out) {
  using E = typename K::Element;
  const int64_t elements = ceil_div(p1 - p0, K::depth);
  if (width < padded)
    for (int64_t e = 0; e < elements; ++e)
      for (int64_t c = width; c < padded; ++c) out[e * padded + c] = E(0);
  if constexpr (K::depth == 1) {
    if (b.col_stride == 1) {
      if (kSameElement<K, In> && width == padded) {
        for (int64_t e = 0; e < elements; ++e) copy_vectors(at<E>(b, p0 + e, j), padded, out + e * padded);
      } else {
        for (int64_t e = 0; e < elements; ++e) widen_run(at<In>(b, p0 + e, j), width, 1, out + e * padded);
      }
      return;
    }
  }
  // A block of steps at a time: the lines written stay in the first-level cache.
  for (int64_t e0 = 0; e0 < elements; e0 += 32)
    for (int64_t c = 0; c < width; ++c) {
      const In* column = at<In>(b, p0, j + c);
      for (int64_t e = e0; e < min_of(e0 + 32, elements); ++e)
        out[e * padded + c] = element_at<K>(column, e, b.row_stride, p1 - p0);
    }
}

template <class K, class In>
static void pack_panels_as(const Matrix& b, int64_t first, int64_t last, void* panels) {
  using E = typename K::Element;
  constexpr int64_t L = VectorOf<typename K::Acc>::lanes;
  const int64_t padded = padded_columns<K>(b.cols);
  for (int64_t p0 = 0; p0 < b.rows; p0 += kDepth) {
    const int64_t p1 = min_of(p0 + kDepth, b.rows);
    const int64_t elements = ceil_div(p1 - p0, K::depth);
    E* block = static_cast<E*>(panels) + ceil_div(p0, K::depth) * padded;
    int64_t index = 0;
    for (int64_t j = 0; j < b.cols && index < last; ++index) {
      const int64_t width = panel_vectors<typename K::Acc>(b.cols - j) * L;
      if (index >= first) pack_panel<K, In>(b, p0, p1, j, min_of(width, b.cols - j), width, block + j * elements);
      j += width;
    }
  }
}

// ---- Rows: out (+)= A * B + bias.
// A part of the next tile's rows, asked for while this tile is worked on: bytes [begin, end) of each row.
struct Ahead {
  const char* rows;  // or null
  int64_t row_bytes, count, begin, end;
  MTL_INLINE void fetch(int64_t first, int64_t last) const {
    if (rows)
      for (int64_t i = first; i < min_of(last, count); ++i)
        for (int64_t b = begin; b < end; b += 64) __builtin_prefetch(rows + i * row_bytes + b, 0, 2);
  }
};
constexpr Ahead kNothingAhead{nullptr, 0, 0, 0, 0};

// One panel past all rows of A. interleaved: the tile of height h that starts at row i lies at a + i * elements, and in
// it element (i, p) at [p * h + i]; else (i, p) lies at a[i * a_row + p].
template <class K, int NV>
static MTL_NOINLINE void multiply_panel(int64_t rows, int64_t elements, const typename K::Element* a, int64_t a_row,
                                        bool interleaved, const typename K::Element* panel, bool accumulate,
                                        const typename K::Acc* bias, typename K::Acc* c, int64_t c_stride, int width,
                                        const Ahead& ahead) {
  const Heights heights(rows, kMaxRows<K, NV>);
  for (int64_t t = 0; t < heights.tiles; ++t) {
    const int64_t i = heights.begin(t), height = heights.begin(t + 1) - i;
    ahead.fetch(i, i + height);
    call_height<K, NV>(static_cast<int>(height), elements, a + i * (interleaved ? elements : a_row),
                       interleaved ? 1 : a_row, interleaved ? height : 1, panel, accumulate, bias, c + i * c_stride,
                       c_stride, width);
  }
}

// C[rows, j0:j1] (+)= A * B for one block of p; j0 and j1 are edges of panels of the n columns.
template <class K>
static void multiply_columns(int64_t rows, int64_t elements, const typename K::Element* a, int64_t a_stride,
                             const typename K::Element* block, int64_t n, int64_t j0, int64_t j1, bool accumulate,
                             const typename K::Acc* bias, typename K::Acc* c, int64_t c_stride, Ahead ahead) {
  using T = typename K::Acc;
  constexpr int64_t L = VectorOf<T>::lanes;
  const int64_t ahead_bytes = ahead.end;
  for (int64_t j = j0; j < j1;) {
    const int vectors = panel_vectors<T>(n - j);
    const int width = static_cast<int>(min_of(vectors * L, n - j));
    const typename K::Element* panel = block + j * elements;
    const T* bias_j = bias ? bias + j : nullptr;
    T* c_j = c + (j - j0);
    // Each panel asks for its share of the lines.
    ahead.begin = ahead_bytes * j / n / 64 * 64;
    ahead.end = j + vectors * L >= n ? ahead_bytes : ahead_bytes * (j + vectors * L) / n / 64 * 64;
    if (vectors == 1)
      multiply_panel<K, 1>(rows, elements, a, a_stride, false, panel, accumulate, bias_j, c_j, c_stride, width, ahead);
    else if (vectors == 2)
      multiply_panel<K, 2>(rows, elements, a, a_stride, false, panel, accumulate, bias_j, c_j, c_stride, width, ahead);
    else
      multiply_panel<K, 3>(rows, elements, a, a_stride, false, panel, accumulate, bias_j, c_j, c_stride, width, ahead);
    j += vectors * L;
  }
}

// Columns worked on at a time where the stored type is not the accumulator: bounds the scratch. A multiple of two
// vectors; one vector more is taken rather than left alone, since the last panel may be three wide.
constexpr int64_t kColumns = 384;
template <class T>
constexpr int64_t kSumStride = kColumns + VectorOf<T>::lanes;

template <class K, class In>
static void rows_as(const Matrix& a, const void* panels, int64_t n, const void* bias_in, bool accumulate, void* out_in,
                    int64_t out_stride, void* scratch) {
  using E = typename K::Element;
  using T = typename K::Acc;
  const int64_t padded = padded_columns<K>(n);
  const T* bias = static_cast<const T*>(bias_in);
  const bool in_place = kSameElement<K, In> && (a.col_stride == 1 || a.cols == 1);
  T* sums = static_cast<T*>(scratch);
  E* packed = reinterpret_cast<E*>(sums + (kSameAccumulator<K, In> ? 0 : kTileRows * kSumStride<T>));
  for (int64_t i0 = 0; i0 < a.rows; i0 += kTileRows) {
    const int64_t rows = min_of(kTileRows, a.rows - i0);
    for (int64_t j0 = 0, j1; j0 < n; j0 = j1) {
      j1 = kSameAccumulator<K, In> || n - j0 <= kSumStride<T> ? n : j0 + kColumns;
      T* c = nullptr;
      int64_t c_stride = kSumStride<T>;
      if constexpr (kSameAccumulator<K, In>) {
        c = static_cast<T*>(out_in) + i0 * out_stride + j0;
        c_stride = out_stride;
      } else {
        c = sums;
      }
      for (int64_t p0 = 0; p0 == 0 || p0 < a.cols; p0 += kDepth) {
        const int64_t p1 = min_of(p0 + kDepth, a.cols);
        const int64_t elements = ceil_div(p1 - p0, K::depth);
        const E* block = static_cast<const E*>(panels) + ceil_div(p0, K::depth) * padded;
        const E* a_rows = packed;
        int64_t a_stride = kDepth / K::depth;
        if constexpr (kSameElement<K, In>) {
          if (in_place) a_rows = at<In>(a, i0, p0), a_stride = a.row_stride;
        }
        if (!in_place && (j0 == 0 || a.cols > kDepth)) {
          for (int64_t i = 0; i < rows; ++i) {
            const In* row = at<In>(a, i0 + i, p0);
            if constexpr (K::depth == 1)
              widen_run(row, elements, a.col_stride, packed + i * a_stride);
            else
              for (int64_t e = 0; e < elements; ++e)
                packed[i * a_stride + e] = element_at<K>(row, e, a.col_stride, p1 - p0);
          }
        }
        Ahead ahead = kNothingAhead;
        if (i0 + rows < a.rows && a.col_stride == 1)
          ahead = {reinterpret_cast<const char*>(at<In>(a, i0 + rows, p0)),
                   a.row_stride * static_cast<int64_t>(sizeof(In)), a.rows - i0 - rows, 0,
                   (p1 - p0) * static_cast<int64_t>(sizeof(In))};
        multiply_columns<K>(rows, elements, a_rows, a_stride, block, n, j0, j1, accumulate || p0 > 0,
                            p1 == a.cols ? bias : nullptr, c, c_stride, ahead);
      }
      if constexpr (!kSameAccumulator<K, In>) {
        for (int64_t i = 0; i < rows; ++i)
          narrow_run(sums + i * kSumStride<T>, j1 - j0, static_cast<In*>(out_in) + (i0 + i) * out_stride + j0);
      }
    }
  }
}

template <class K, class In>
static int64_t rows_scratch_bytes_as() {
  return kTileRows *
             (kSameAccumulator<K, In> ? 0 : kSumStride<typename K::Acc>)*static_cast<int64_t>(sizeof(typename K::Acc)) +
         kTileRows * (kDepth / K::depth) * static_cast<int64_t>(sizeof(typename K::Element));
}

// ---- Outer: sum[k, d] += sum over the rows of a tile of G[row, k] * X[row, d].
// The tile of X is packed as panels (B of the product), the tile of G interleaved by tile heights (A).
template <class K, class In, int MR>
MTL_INLINE void interleave(const In* g, int64_t row_stride, int64_t col_stride, int64_t rows,
                           typename K::Element* out) {
  const int64_t elements = ceil_div(rows, K::depth);
  if (K::depth == 1 && col_stride == 1) {
    for (int64_t e = 0; e < elements; ++e) {
      const In* in = g + e * row_stride;
      if constexpr (kSameElement<K, In>) {
        __builtin_memcpy(out + e * MR, in, MR * sizeof(In));
      } else if constexpr (K::depth == 1) {
        MTL_UNROLL
        for (int i = 0; i < MR; ++i) out[e * MR + i] = widen(in[i]);
      }
    }
  } else {
    for (int64_t e = 0; e < elements; ++e)
      for (int i = 0; i < MR; ++i) out[e * MR + i] = element_at<K>(g + i * col_stride, e, row_stride, rows);
  }
}
template <class K, class In, int MR>
static void interleave_height(int height, const In* g, int64_t row_stride, int64_t col_stride, int64_t rows,
                              typename K::Element* out) {
  if (height == MR)
    interleave<K, In, MR>(g, row_stride, col_stride, rows, out);
  else if constexpr (MR > 1)
    interleave_height<K, In, MR - 1>(height, g, row_stride, col_stride, rows, out);
}

template <class K, class In, int NV>
static void interleave_tile(const Matrix& g, typename K::Element* out) {
  const int64_t elements = ceil_div(g.rows, K::depth);
  const Heights heights(g.cols, kMaxRows<K, NV>);
  for (int64_t t = 0; t < heights.tiles; ++t) {
    const int64_t k = heights.begin(t);
    interleave_height<K, In, kMaxRows<K, NV>>(static_cast<int>(heights.begin(t + 1) - k), at<In>(g, 0, k), g.row_stride,
                                              g.col_stride, g.rows, out + k * elements);
  }
}

// The panels of a tile of X lie this many elements apart: one vector more than they need, so that the panels, written
// side by side row after row, do not fall into the same set of the first-level cache.
template <class K>
constexpr int64_t kPanelPad = VectorOf<typename K::Acc>::lanes;
template <class K>
MTL_INLINE int64_t panel_at(int64_t elements, int64_t d) {
  constexpr int64_t L = VectorOf<typename K::Acc>::lanes;
  return elements * d + d / (2 * L) * kPanelPad<K>;
}

// Packs a tile of X. Row by row where it can: a panel alone is one cache line of each row, which no hardware prefetcher
// follows.
template <class K, class In>
static void pack_tile(const Matrix& x, typename K::Element* out) {
  using E = typename K::Element;
  using T = typename K::Acc;
  constexpr int64_t L = VectorOf<T>::lanes;
  const int64_t elements = ceil_div(x.rows, K::depth);
  int64_t d = 0;
  if constexpr (kSameElement<K, In>) {
    if (x.col_stride == 1) {
      while (d + 2 * L <= x.cols && panel_vectors<T>(x.cols - d) == 2) d += 2 * L;
      for (int64_t r = 0; r < x.rows; ++r) {
        const E* row = at<E>(x, r, 0);
        E* to = out + r * 2 * L;
        for (int64_t c = 0; c < d; c += 2 * L, to += elements * 2 * L + kPanelPad<K>) copy_vectors(row + c, 2 * L, to);
      }
    }
  }
  for (int vectors; d < x.cols; d += vectors * L) {
    vectors = panel_vectors<T>(x.cols - d);
    pack_panel<K, In>(x, 0, x.rows, d, min_of(vectors * L, x.cols - d), vectors * L, out + panel_at<K>(elements, d));
  }
}

template <class K, class In, int NV>
static void outer_panels(const Matrix& g, int64_t columns, typename K::Acc* sum, int64_t sum_stride,
                         const typename K::Element* x_tile, typename K::Element* g_tile) {
  using T = typename K::Acc;
  constexpr int64_t L = VectorOf<T>::lanes;
  const int64_t elements = ceil_div(g.rows, K::depth);
  bool interleaved = false;
  for (int64_t d = 0; d < columns;) {
    const int vectors = panel_vectors<T>(columns - d);
    if (vectors == NV) {
      if (!interleaved) interleave_tile<K, In, NV>(g, g_tile);
      interleaved = true;
      multiply_panel<K, NV>(g.cols, elements, g_tile, 0, true, x_tile + panel_at<K>(elements, d), true, nullptr,
                            sum + d, sum_stride, static_cast<int>(min_of(NV * L, columns - d)), kNothingAhead);
    }
    d += vectors * L;
  }
}

template <class K, class In>
static void outer_as(const Matrix& g, const Matrix& x, void* sum_in, int64_t sum_stride, void* column_sum,
                     void* scratch) {
  using E = typename K::Element;
  using T = typename K::Acc;
  T* sum = static_cast<T*>(sum_in);
  T* tile_sum = static_cast<T*>(scratch);
  T* row_wide = tile_sum + ceil_div(g.cols, 16) * 16;
  E* g_tile = reinterpret_cast<E*>(row_wide + ceil_div(g.cols, 16) * 16);
  E* x_tile = g_tile + ceil_div(g.cols * (kOuterRows / K::depth), 16) * 16;
  pack_tile<K, In>(x, x_tile);
  outer_panels<K, In, 2>(g, x.cols, sum, sum_stride, x_tile, g_tile);
  outer_panels<K, In, 1>(g, x.cols, sum, sum_stride, x_tile, g_tile);
  outer_panels<K, In, 3>(g, x.cols, sum, sum_stride, x_tile, g_tile);
  if (!column_sum) return;
  // First over the tile, so that the rounding error grows with kOuterRows + rows / kOuterRows, not with the rows.
  for (int64_t i = 0; i < g.cols; ++i) tile_sum[i] = T(0);
  for (int64_t r = 0; r < g.rows; ++r) {
    const In* row = at<In>(g, r, 0);
    if (kSameAccumulator<K, In> && g.col_stride == 1) {
      add_run(reinterpret_cast<const T*>(row), g.cols, tile_sum);
    } else {
      widen_run(row, g.cols, g.col_stride, row_wide);
      add_run(row_wide, g.cols, tile_sum);
    }
  }
  add_run(tile_sum, g.cols, static_cast<T*>(column_sum));
}

// For k columns of G and d columns of X.
template <class K, class In>
static int64_t outer_scratch_bytes_as(int64_t k, int64_t d) {
  using E = typename K::Element;
  using T = typename K::Acc;
  constexpr int64_t L = VectorOf<T>::lanes;
  constexpr int64_t kElements = kOuterRows / K::depth;
  return 2 * ceil_div(k, 16) * 16 * static_cast<int64_t>(sizeof(T)) +
         (ceil_div(k * kElements, 16) * 16 + panel_at<K>(kElements, d) + kElements * 2 * L) *
             static_cast<int64_t>(sizeof(E));
}

template <class K, class In>
static void sum_parts_as(const void* parts_in, int64_t count, int64_t stride, int64_t begin, int64_t end,
                         void* out_in) {
  using T = typename K::Acc;
  const T* parts = static_cast<const T*>(parts_in);
  In* out = static_cast<In*>(out_in);
  T sum[64];
  for (int64_t i0 = begin; i0 < end; i0 += 64) {
    const int64_t n = min_of(64, end - i0);
    widen_run(parts + i0, n, 1, sum);
    for (int64_t part = 1; part < count; ++part) add_run(parts + part * stride + i0, n, sum);
    narrow_run(sum, n, out + i0);
  }
}
