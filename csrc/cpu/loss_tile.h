// Everything of one tile of rows while it is in the cache: logits, losses, their gradients at the logits, and from
// these the parts of dX, dW, db and of the Gramian. Included inside an unnamed namespace by kernels_impl.h.
#pragma once

// Takes pieces of a block of memory; from a null block it only measures.
struct Pieces {
  char* begin;
  int64_t used = 0;
  template <class E>
  E* take(int64_t count) {
    E* piece = reinterpret_cast<E*>(begin + used);
    used += ceil_div(count * static_cast<int64_t>(sizeof(E)), 64) * 64;
    return piece;
  }
};

// z[c * stride + r] = in[r * in_stride + c], in blocks of 16-byte vectors.
template <class T>
static MTL_NOINLINE void transpose(const T* in, int64_t in_stride, int64_t rows, int64_t columns, T* z,
                                   int64_t stride) {
  int64_t r = 0;
  if constexpr (sizeof(T) == 4) {
    typedef Lanes<float, 4>::type V;
    typedef Lanes<float, 4>::unaligned U;
    typedef Lanes<int32_t, 4>::type I;
    for (; r + 4 <= rows; r += 4)
      for (int64_t c = 0; c < columns; c += 4) {  // `in` is padded to whole vectors; z is not
        const T* p = in + r * in_stride + c;
        const V a0 = *reinterpret_cast<const U*>(p), a1 = *reinterpret_cast<const U*>(p + in_stride),
                a2 = *reinterpret_cast<const U*>(p + 2 * in_stride),
                a3 = *reinterpret_cast<const U*>(p + 3 * in_stride);
        const V b0 = __builtin_shuffle(a0, a1, I{0, 4, 1, 5}), b1 = __builtin_shuffle(a2, a3, I{0, 4, 1, 5});
        const V b2 = __builtin_shuffle(a0, a1, I{2, 6, 3, 7}), b3 = __builtin_shuffle(a2, a3, I{2, 6, 3, 7});
        const V c0 = __builtin_shuffle(b0, b1, I{0, 1, 4, 5}), c1 = __builtin_shuffle(b0, b1, I{2, 3, 6, 7});
        const V c2 = __builtin_shuffle(b2, b3, I{0, 1, 4, 5}), c3 = __builtin_shuffle(b2, b3, I{2, 3, 6, 7});
        T* q = z + c * stride + r;
        *reinterpret_cast<U*>(q) = c0;
        if (c + 1 < columns) *reinterpret_cast<U*>(q + stride) = c1;
        if (c + 2 < columns) *reinterpret_cast<U*>(q + 2 * stride) = c2;
        if (c + 3 < columns) *reinterpret_cast<U*>(q + 3 * stride) = c3;
      }
  }
  for (; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) z[c * stride + r] = in[r * in_stride + c];
}

template <class T, class P>
constexpr bool kSame = false;
template <class T>
constexpr bool kSame<T, const T*> = true;

// Label columns read at a time: a cache line of a matrix of labels.
constexpr int64_t kLabelColumns = 8;

// Some label columns of a tile as numbers; rows past the end are missing.
template <class T>
static void read_labels(const Labels& labels, int64_t first, int64_t step, int64_t columns, int64_t row, int64_t rows,
                        int64_t padded, T* out, int64_t stride) {
  with_label_type(labels, [&](auto* in) {
    if constexpr (kSame<T, decltype(in)>) {
      if (step == 1 && columns % 4 == 0)
        return transpose<T>(in + row * labels.row_stride + first, labels.row_stride, rows, columns, out, stride);
    }
    gather_labels<T>(in + row * labels.row_stride + first * step, labels.row_stride, step, columns, rows, out, stride);
  });
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = rows; r < padded; ++r) out[c * stride + r] = static_cast<T>(__builtin_nan(""));
}

template <class K, class In>
struct LossScratch {
  using E = typename K::Element;
  using T = typename K::Acc;
  T *panel, *z, *dx, *labels, *gram_panels;
  E *x_rows, *x_panels, *g_rows, *g_columns;
  int64_t stride, elements_d, bytes;

  // Rows of the transposed tile lie an odd number of cache lines apart, so that they spread over all sets of the cache.
  LossScratch(const LossJob& job, char* memory) {
    constexpr int64_t L = VectorOf<T>::lanes, kLine = 64 / static_cast<int64_t>(sizeof(T));
    const int64_t rows = job.tile_rows, elements_r = ceil_div(rows, K::depth);
    stride = (ceil_div(rows, kLine) | 1) * kLine;
    elements_d = ceil_div(job.d, K::depth);
    const int64_t columns = job.need_gramian ? job.k : job.widest_group;
    Pieces pieces{memory};
    panel = pieces.take<T>(rows * 3 * L);
    z = pieces.take<T>(columns * stride);
    labels = pieces.take<T>((kLabelColumns + 1) * stride);
    x_rows = pieces.take<E>(kSameElement<K, In> && job.x_in_place ? 0 : rows * elements_d);
    x_panels = pieces.take<E>(job.need_weight ? panel_at<K>(elements_r, job.d) + elements_r * 3 * L : 0);
    dx = pieces.take<T>(job.need_x && !kSameAccumulator<K, In> ? rows * job.d : 0);
    g_rows = pieces.take<E>(job.need_x && K::depth > 1 ? ceil_div(job.widest_group, K::depth) * stride : 0);
    g_columns = pieces.take<E>(job.need_weight && K::depth > 1 ? job.widest_group * (stride / K::depth) : 0);
    gram_panels = pieces.take<T>(job.need_gramian ? rows * (job.k + 3 * L) : 0);
    bytes = pieces.used;
  }
};

// C (+)= A * B for one block of p, all columns: A(i, p) at a[i * a_row + p * a_step].
template <class K, int NV>
static MTL_NOINLINE void multiply_strided(int64_t rows, int64_t elements, const typename K::Element* a, int64_t a_row,
                                          int64_t a_step, const typename K::Element* panel, bool accumulate,
                                          const typename K::Acc* bias, typename K::Acc* c, int64_t c_stride, int width,
                                          const Ahead& ahead) {
  const Heights heights(rows, kMaxRows<K, NV>);
  for (int64_t t = 0; t < heights.tiles; ++t) {
    const int64_t i = heights.begin(t), height = heights.begin(t + 1) - i;
    ahead.fetch(i, i + height);
    call_height<K, NV>(static_cast<int>(height), elements, a + i * a_row, a_row, a_step, panel, accumulate, bias,
                       c + i * c_stride, c_stride, width);
  }
}
template <class K>
MTL_INLINE void multiply_vectors(int vectors, int64_t rows, int64_t elements, const typename K::Element* a,
                                 int64_t a_row, int64_t a_step, const typename K::Element* panel, bool accumulate,
                                 const typename K::Acc* bias, typename K::Acc* c, int64_t c_stride, int width,
                                 const Ahead& ahead = kNothingAhead) {
  if (vectors == 2)
    multiply_strided<K, 2>(rows, elements, a, a_row, a_step, panel, accumulate, bias, c, c_stride, width, ahead);
  else if (vectors == 1)
    multiply_strided<K, 1>(rows, elements, a, a_row, a_step, panel, accumulate, bias, c, c_stride, width, ahead);
  else
    multiply_strided<K, 3>(rows, elements, a, a_row, a_step, panel, accumulate, bias, c, c_stride, width, ahead);
}

// The logits of one group of columns, transposed, with zeros in the rows past the end. Each panel asks for its share of
// the lines of `ahead`.
template <class K>
static void group_logits(const LossJob& job, const LossGroup& group, const typename K::Element* x, int64_t x_row,
                         int64_t rows, int64_t padded, typename K::Acc* panel_out, typename K::Acc* z, int64_t stride,
                         Ahead ahead) {
  using E = typename K::Element;
  using T = typename K::Acc;
  constexpr int64_t L = VectorOf<T>::lanes;
  const int64_t columns = group.end - group.begin, all = padded_columns<K>(columns);
  const int64_t ahead_bytes = ahead.end;
  for (int64_t j = 0; j < columns;) {
    const int vectors = panel_vectors<T>(columns - j);
    const int64_t width = vectors * L;
    ahead.begin = ahead_bytes * j / columns / 64 * 64;
    ahead.end = j + width >= columns ? ahead_bytes : ahead_bytes * (j + width) / columns / 64 * 64;
    for (int64_t p0 = 0; p0 < job.d || p0 == 0; p0 += kDepth) {
      const int64_t p1 = min_of(p0 + kDepth, job.d), elements = ceil_div(p1 - p0, K::depth);
      const E* panel = static_cast<const E*>(group.logit_panels) + p0 / K::depth * all + j * elements;
      const T* bias = p1 == job.d ? static_cast<const T*>(group.bias) + j : nullptr;
      multiply_vectors<K>(vectors, rows, elements, x + p0 / K::depth, x_row, 1, panel, p0 > 0, bias, panel_out, width,
                          static_cast<int>(width), p0 == 0 ? ahead : kNothingAhead);
    }
    transpose<T>(panel_out, width, rows, min_of(width, columns - j), z + j * stride, stride);
    j += width;
  }
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = rows; r < padded; ++r) z[c * stride + r] = T(0);
}

// The losses of one group's tasks.
template <class T>
static void group_losses(const LossJob& job, const LossGroup& group, int64_t row, int64_t rows, int64_t padded, T* z,
                         int64_t stride, bool gradient, T* labels, double* loss) {
  const int64_t step = job.label_matrix.col_stride;
  for (int64_t t = group.first_task; t < group.last_task; ++t) {
    const TaskSpec& task = job.tasks[t];
    T* own = z + (task.begin - group.begin) * stride;
    const T scale = static_cast<T>(job.scale[t]);
    // The labels of a matrix are read for several tasks at once, whether these have a loss or not.
    const int64_t ahead = (t - group.first_task) % kLabelColumns;
    if (step && ahead == 0)
      read_labels<T>(job.label_matrix, t, step, min_of(kLabelColumns, group.last_task - t), row, rows, padded, labels,
                     stride);
    if (task.loss == Loss::kNone || !task.labels.data) {
      if (gradient)
        for (int64_t c = 0; c < task.width; ++c)
          for (int64_t r = 0; r < padded; ++r) own[c * stride + r] = T(0);
    } else if (step && task.loss != Loss::kOutside) {
      loss[t] += task_loss<T>(task, own, stride, padded, scale, gradient, labels + ahead * stride, 0);
    } else {
      // Gradients from outside use the buffer too: after the labels read ahead.
      T* buffer = labels + kLabelColumns * stride;
      for (int64_t c = 0; c < task.labels.columns; ++c) {
        read_labels<T>(task.labels, c, task.labels.col_stride, 1, row, rows, padded, buffer, stride);
        if (task.loss == Loss::kOutside) {  // gradients as they are, NaN included
          for (int64_t r = 0; r < padded; ++r) own[c * stride + r] = r < rows ? buffer[r] : T(0);
          continue;
        }
        loss[t] += task_loss<T>(task, own, stride, padded, scale, gradient, buffer, c);
      }
    }
  }
}

// C += G^T X or G W for the panels of all columns of C.
template <class K>
static void multiply_panels(int64_t rows, int64_t p, const typename K::Element* a, int64_t a_row, int64_t a_step,
                            const typename K::Element* panels, int64_t columns, bool accumulate, typename K::Acc* c,
                            int64_t c_stride) {
  using T = typename K::Acc;
  constexpr int64_t L = VectorOf<T>::lanes;
  const int64_t all = padded_columns<K>(columns);
  for (int64_t p0 = 0; p0 < p; p0 += kDepth) {
    const int64_t elements = ceil_div(min_of(p0 + kDepth, p) - p0, K::depth);
    for (int64_t j = 0; j < columns;) {
      const int vectors = panel_vectors<T>(columns - j);
      multiply_vectors<K>(vectors, rows, elements, a + p0 / K::depth * a_step, a_row, a_step,
                          panels + p0 / K::depth * all + j * elements, accumulate || p0 > 0, nullptr, c + j, c_stride,
                          static_cast<int>(min_of(vectors * L, columns - j)));
      j += vectors * L;
    }
  }
}

// Pairs of neighbouring bfloat16: (k, k + 1) of each row, and (r, r + 1) of each column.
MTL_INLINE uint32_t pair_of(float low, float high) {
  BFloat16 a, b;
  narrow(low, &a);
  narrow(high, &b);
  return a.bits | static_cast<uint32_t>(b.bits) << 16;
}
template <class E>
static void pair_rows(const float* z, int64_t stride, int64_t columns, int64_t padded, E* out) {
  for (int64_t k = 0; k < columns; k += 2)
    for (int64_t r = 0; r < padded; ++r)
      out[k / 2 * stride + r] = pair_of(z[k * stride + r], k + 1 < columns ? z[(k + 1) * stride + r] : 0.0f);
}
template <class E>
static void pair_columns(const float* z, int64_t stride, int64_t columns, int64_t rows, int64_t padded, E* out) {
  for (int64_t k = 0; k < columns; ++k)
    for (int64_t r = 0; r < padded; r += 2)
      out[k * (stride / 2) + r / 2] = pair_of(z[k * stride + r], r + 1 < rows ? z[k * stride + r + 1] : 0.0f);
}

template <class T>
MTL_INLINE T sum_of_row(const T* row, int64_t padded) {
  Vec<T> sum{};
  for (int64_t r = 0; r < padded; r += VectorOf<T>::lanes) sum = sum + load<T>(row + r);
  T total = T(0);
  for (int i = 0; i < VectorOf<T>::lanes; ++i) total += sum[i];
  return total;
}

template <class K, class In>
static void loss_tile_as(const LossJob& job, const Matrix& x, int64_t row, int64_t next, const LossSums& sums,
                         void* dx_out, void* memory) {
  using E = typename K::Element;
  using T = typename K::Acc;
  constexpr int64_t L = VectorOf<T>::lanes;
  const LossScratch<K, In> s(job, static_cast<char*>(memory));
  const int64_t rows = x.rows, padded = ceil_div(rows, L) * L, d = job.d;

  // The rows of x as elements, and as the panels of the product over rows.
  const E* x_rows = s.x_rows;
  int64_t x_row = s.elements_d;
  if (kSameElement<K, In> && job.x_in_place) {
    x_rows = at<E>(x, 0, 0);
    x_row = x.row_stride;
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      const In* in = at<In>(x, r, 0);
      E* out = s.x_rows + r * x_row;
      if constexpr (K::depth == 1)
        widen_run(in, d, x.col_stride, out);
      else
        for (int64_t e = 0; e < x_row; ++e) out[e] = element_at<K>(in, e, x.col_stride, d);
    }
  }
  if (job.need_weight) pack_tile<K, In>(x, s.x_panels);

  Ahead ahead = kNothingAhead;
  if (x.col_stride == 1 && next)
    ahead = {reinterpret_cast<const char*>(at<In>(x, rows, 0)), x.row_stride * static_cast<int64_t>(sizeof(In)), next,
             0, d * static_cast<int64_t>(sizeof(In))};
  T* dx = kSameAccumulator<K, In> ? static_cast<T*>(dx_out) : s.dx;
  const bool gradient = job.need_x || job.need_weight || job.need_bias || job.need_gramian;
  for (int64_t g = 0; g < job.group_count; ++g) {
    const LossGroup& group = job.groups[g];
    const int64_t columns = group.end - group.begin;
    T* z = s.z + (job.need_gramian ? group.begin * s.stride : 0);
    group_logits<K>(job, group, x_rows, x_row, rows, padded, s.panel, z, s.stride, g == 0 ? ahead : kNothingAhead);
    group_losses<T>(job, group, row, rows, padded, z, s.stride, gradient, s.labels, sums.loss);
    if (job.need_bias) {
      T* db = static_cast<T*>(sums.bias) + group.begin;
      for (int64_t c = 0; c < columns; ++c) db[c] += sum_of_row<T>(z + c * s.stride, padded);
    }
    if constexpr (K::depth > 1) {
      if (job.need_x) pair_rows(z, s.stride, columns, padded, s.g_rows);
      if (job.need_weight) pair_columns(z, s.stride, columns, rows, padded, s.g_columns);
    }
    if (job.need_x) {
      const E* a = K::depth > 1 ? s.g_rows : reinterpret_cast<const E*>(z);
      multiply_panels<K>(rows, columns, a, 1, s.stride, static_cast<const E*>(group.weight_panels), d, g > 0, dx, d);
    }
    if (job.need_weight) {
      const E* a = K::depth > 1 ? s.g_columns : reinterpret_cast<const E*>(z);
      T* dw = static_cast<T*>(sums.weight) + group.begin * d;
      const int64_t elements = ceil_div(rows, K::depth);
      for (int64_t j = 0; j < d;) {
        const int vectors = panel_vectors<T>(d - j);
        multiply_vectors<K>(vectors, columns, elements, a, s.stride / K::depth, 1,
                            s.x_panels + panel_at<K>(elements, j), !sums.fresh, nullptr, dw + j, d,
                            static_cast<int>(min_of(vectors * L, d - j)));
        j += vectors * L;
      }
    }
  }
  if (job.need_x && !kSameAccumulator<K, In>)
    for (int64_t r = 0; r < rows; ++r) narrow_run(s.dx + r * d, d, static_cast<In*>(dx_out) + r * d);
  if (job.need_gramian) {
    // Sum of g g^T over the tile's rows, up to the diagonal and to the end of its panel.
    for (int64_t j = 0; j < job.k;) {
      const int vectors = panel_vectors<T>(job.k - j);
      const int64_t width = vectors * L, real = min_of(width, job.k - j);
      if (real < width)
        for (int64_t i = 0; i < rows * width; ++i) s.gram_panels[i] = T(0);
      for (int64_t c = 0; c < real; ++c)
        for (int64_t r = 0; r < rows; ++r) s.gram_panels[r * width + c] = s.z[(j + c) * s.stride + r];
      multiply_vectors<Fma<T>>(vectors, j + real, rows, s.z, s.stride, 1, s.gram_panels, !sums.fresh, nullptr,
                               static_cast<T*>(sums.gram) + j, job.k, static_cast<int>(real));
      j += width;
    }
  }
}
