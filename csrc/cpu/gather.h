// Gathers neighbours: rows of x named by the edges of a row, reduced. Four edges at a time, so that the row of the
// result, which stays in the first-level cache, is read and written once for four rows of x. The rows of x come from
// anywhere: those of the edges ahead are asked for early, beyond the end of the row too, since the edges of all rows
// lie in one run. Included inside an unnamed namespace by kernels_impl.h.
#pragma once

// Bytes of x asked for ahead: enough to keep a core's outstanding lines busy, few enough to stay in the first-level
// cache.
constexpr int64_t kGatherAhead = 8192;

// ---- Whole vectors of accumulators from stored elements.
MTL_INLINE Vec<float> load_wide(const float* p) { return load<float>(p); }
MTL_INLINE Vec<double> load_wide(const double* p) { return load<double>(p); }
MTL_INLINE Vec<float> load_wide(const BFloat16* p) {
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(*reinterpret_cast<const HalfBits::unaligned*>(p), Bits)
                                      << 16);
}
MTL_INLINE Vec<float> load_wide(const Float16* p) {
  Vec<float> v;
  float lanes[kLanes];
  const int64_t done = widen_vectors(p, kLanes, lanes);
  for (int64_t i = done; i < kLanes; ++i) lanes[i] = widen(p[i]);
  __builtin_memcpy(&v, lanes, sizeof v);
  return v;
}

// ---- One group of G edges: sums with coefficients, or the largest or smallest value of each column. NaN stays.
struct TakeSum {
  template <class T, int G>
  static MTL_INLINE Vec<T> reduce(const Vec<T>* v, const T* c, bool first, Vec<T> sum) {
    sum = first ? c[0] * v[0] : sum + c[0] * v[0];
    MTL_UNROLL
    for (int g = 1; g < G; ++g) sum = sum + c[g] * v[g];
    return sum;
  }
};
template <bool kMax>
struct TakeExtreme {
  template <class T, int G>
  static MTL_INLINE Vec<T> reduce(const Vec<T>* v, const T*, bool first, Vec<T> best) {
    if (first) best = v[0];
    MTL_UNROLL
    for (int g = 0; g < G; ++g) {
      const VecInt<T> take = (kMax ? v[g] > best : v[g] < best) | (v[g] != v[g]);
      best = take ? v[g] : best;
    }
    return best;
  }
};

// out[c] (+)= the group's rows. The columns are whole vectors but for the last, which overlaps the one before where the
// result does not depend on what it was; else it is done alone.
template <class In, class T, class Take, int G>
static MTL_NOINLINE void gather_group(const In* const* rows, const T* coefficients, int64_t columns, bool first,
                                      T* out) {
  constexpr int64_t L = VectorOf<T>::lanes;
  const In* row[G];
  T c[G];
  MTL_UNROLL
  for (int g = 0; g < G; ++g) row[g] = rows[g], c[g] = coefficients[g];
  int64_t i = 0;
  for (; i + L <= columns; i += L) {
    Vec<T> v[G];
    MTL_UNROLL
    for (int g = 0; g < G; ++g) v[g] = load_wide(row[g] + i);
    store<T>(out + i, Take::template reduce<T, G>(v, c, first, first ? Vec<T>{} : load<T>(out + i)));
  }
  if (i == columns) return;
  Vec<T> v[G]{}, last{};
  for (int64_t j = i; j < columns; ++j) {
    for (int g = 0; g < G; ++g) v[g][j - i] = widen(row[g][j]);
    if (!first) last[j - i] = out[j];
  }
  last = Take::template reduce<T, G>(v, c, first, last);
  for (int64_t j = i; j < columns; ++j) out[j] = last[j - i];
}
template <class In, class T, class Take>
MTL_INLINE void gather_some(int count, const In* const* rows, const T* coefficients, int64_t columns, bool first,
                            T* out) {
  if (count == 4) return gather_group<In, T, Take, 4>(rows, coefficients, columns, first, out);
  // Sums are what most graphs ask for, in float32: each size more is one more function to compile.
  if constexpr (__is_same(Take, TakeSum) && sizeof(T) == 4) {
    if (count == 3) return gather_group<In, T, Take, 3>(rows, coefficients, columns, first, out);
    if (count == 2) return gather_group<In, T, Take, 2>(rows, coefficients, columns, first, out);
  }
  for (int g = 0; g < count; ++g, first = false)
    gather_group<In, T, Take, 1>(rows + g, coefficients + g, columns, first, out);
}

template <class T>
MTL_INLINE T weight_at(const GatherJob& job, int64_t e) {
  switch (job.weight_type) {
    case DType::kFloat64:
      return static_cast<T>(static_cast<const double*>(job.weights)[e]);
    case DType::kBFloat16:
      return static_cast<T>(widen(static_cast<const BFloat16*>(job.weights)[e]));
    case DType::kFloat16:
      return static_cast<T>(widen(static_cast<const Float16*>(job.weights)[e]));
    default:
      return static_cast<T>(static_cast<const float*>(job.weights)[e]);
  }
}

// What an edge reads, and how much of it counts.
template <class In, class T>
struct Edges {
  const GatherJob& job;
  const In* x;
  int64_t distance, lines;

  MTL_INLINE explicit Edges(const GatherJob& of) : job(of), x(static_cast<const In*>(of.x)) {
    const int64_t row_bytes = of.columns * static_cast<int64_t>(sizeof(In));
    distance = kGatherAhead / (row_bytes + 64) + 4;
    lines = min_of(row_bytes, kGatherAhead);
  }
  // False where the edge names a row or a weight that is not there. Asks for a row further on.
  MTL_INLINE bool read(int64_t e, T share, const In** row, T* coefficient) const {
    const Neighbours& graph = job.graph;
    const int64_t source = graph.index[e];
    if (static_cast<uint64_t>(source) >= static_cast<uint64_t>(graph.sources)) return false;
    ask(e + distance);
    if (job.weights) {
      const int64_t place = graph.place ? graph.place[e] : e;
      if (static_cast<uint64_t>(place) >= static_cast<uint64_t>(graph.edges)) return false;
      share = share * weight_at<T>(job, place);
    }
    if (job.factors) share = share * static_cast<const T*>(job.factors)[source];
    *coefficient = share;
    *row = x + source * job.row_stride;
    return true;
  }
  // Unchecked, so the address is computed as a number: asking for what is not there does nothing.
  MTL_INLINE void ask(int64_t e) const {
    const uint64_t source = static_cast<uint64_t>(job.graph.index[min_of(e, job.graph.edges - 1)]);
    const uint64_t row = reinterpret_cast<uint64_t>(x) + source * static_cast<uint64_t>(job.row_stride) * sizeof(In);
    __builtin_prefetch(reinterpret_cast<const void*>(row), 0, 3);
    for (int64_t b = 64; b < lines; b += 64) __builtin_prefetch(reinterpret_cast<const void*>(row + b), 0, 3);
  }
};

// The edges [e0, e1) of one row. Returns false where an edge names what is not there; nothing is read through it.
template <class In, class T, class Take>
static bool gather_edges_as(const GatherJob& job, int64_t e0, int64_t e1, T share, bool first, T* out) {
  const Edges<In, T> edges(job);
  for (int64_t e = e0; e < e1;) {
    const int count = static_cast<int>(min_of(4, e1 - e));
    const In* rows[4];
    T coefficients[4];
    for (int g = 0; g < count; ++g, ++e)
      if (!edges.read(e, share, rows + g, coefficients + g)) return false;
    gather_some<In, T, Take>(count, rows, coefficients, job.columns, first, out);
    first = false;
  }
  return true;
}
// The same sums for NV / 2 to NV vectors of columns, which stay in registers over the whole row. The last vectors
// overlap, so that no column is left over.
template <class In, class T, int NV>
static MTL_NOINLINE bool gather_narrow(const GatherJob& job, int64_t e0, int64_t e1, T share, bool first, T* out) {
  constexpr int64_t L = VectorOf<T>::lanes;
  const Edges<In, T> edges(job);
  int64_t at[NV];
  Vec<T> sum[NV];
  MTL_UNROLL
  for (int v = 0; v < NV; ++v) {
    at[v] = min_of(v * L, job.columns - L);
    sum[v] = first ? Vec<T>{} : load<T>(out + at[v]);
  }
  for (int64_t e = e0; e < e1; ++e) {
    T c;
    const In* row;
    if (!edges.read(e, share, &row, &c)) return false;
    MTL_UNROLL
    for (int v = 0; v < NV; ++v) sum[v] = sum[v] + c * load_wide(row + at[v]);
  }
  MTL_UNROLL
  for (int v = 0; v < NV; ++v) store<T>(out + at[v], sum[v]);
  return true;
}
template <class In, class T, class Take>
MTL_INLINE bool gather_row(const GatherJob& job, int64_t e0, int64_t e1, T share, bool first, T* out) {
  if constexpr (__is_same(Take, TakeSum) && sizeof(T) == 4) {
    constexpr int64_t L = VectorOf<T>::lanes;
    const int64_t columns = job.columns;
    if (columns >= L && columns <= 8 * L) {
      if (columns == L) return gather_narrow<In, T, 1>(job, e0, e1, share, first, out);
      if (columns <= 2 * L) return gather_narrow<In, T, 2>(job, e0, e1, share, first, out);
      if (columns <= 4 * L) return gather_narrow<In, T, 4>(job, e0, e1, share, first, out);
      return gather_narrow<In, T, 8>(job, e0, e1, share, first, out);
    }
  }
  return gather_edges_as<In, T, Take>(job, e0, e1, share, first, out);
}

template <class In, class T, class Take>
static bool gather_rows_as(const GatherJob& job, int64_t first, int64_t last, bool accumulate, T* out,
                           int64_t out_stride) {
  const int64_t* ptr = job.graph.ptr;
  int64_t hub = 0;  // the first one that is not before these rows
  for (int64_t above = job.hub_count; hub < above;) {
    const int64_t middle = (hub + above) / 2;
    if (job.hubs[middle] < first)
      hub = middle + 1;
    else
      above = middle;
  }
  for (int64_t r = first; r < last; ++r, out += out_stride) {
    const int64_t e0 = ptr[r], e1 = ptr[r + 1];
    if (hub < job.hub_count && job.hubs[hub] == r) {
      const T* result = static_cast<const T*>(job.hub_results) + hub++ * job.columns;
      for (int64_t i = 0; i < job.columns; ++i) out[i] = accumulate ? out[i] + result[i] : result[i];
      continue;
    }
    if (e0 == e1) {
      if (!accumulate)
        for (int64_t i = 0; i < job.columns; ++i) out[i] = T(0);
      continue;
    }
    const T share = job.reduce == Reduce::kMean ? T(1) / static_cast<T>(e1 - e0) : T(1);
    if (!gather_row<In, T, Take>(job, e0, e1, share, !accumulate, out)) return false;
  }
  return true;
}

// Calls f with the way to take the values of one more group of rows.
template <class F>
MTL_INLINE bool with_take(Reduce reduce, F f) {
  if (reduce == Reduce::kMax) return f(TakeExtreme<true>{});
  if (reduce == Reduce::kMin) return f(TakeExtreme<false>{});
  return f(TakeSum{});
}

// The rows [first, last) of the result, as accumulators. accumulate: added to what is there (sum and mean).
template <class In, class T>
static bool gather_as(const GatherJob& job, int64_t first, int64_t last, bool accumulate, T* out, int64_t out_stride) {
  return with_take(job.reduce, [&](auto take) {
    return gather_rows_as<In, T, decltype(take)>(job, first, last, accumulate, out, out_stride);
  });
}
// The edges [e0, e1) of a row that has `row_edges`.
template <class In, class T>
static bool gather_edges_of(const GatherJob& job, int64_t e0, int64_t e1, int64_t row_edges, T* out) {
  const T share = job.reduce == Reduce::kMean ? T(1) / static_cast<T>(row_edges) : T(1);
  return with_take(job.reduce,
                   [&](auto take) { return gather_row<In, T, decltype(take)>(job, e0, e1, share, true, out); });
}
// out (+)= part, or the larger or smaller of both.
template <class T>
static void combine_as(Reduce reduce, const T* part, int64_t columns, T* out) {
  const T one[1] = {T(1)};
  const T* rows[1] = {part};
  with_take(reduce, [&](auto take) {
    gather_group<T, T, decltype(take), 1>(rows, one, columns, false, out);
    return true;
  });
}

// ---- The gradient of the weights: out[place] = share * <a[row], x[index]> for the edges [e0, e1).
template <class In, class T>
static bool edge_dots_as(const GatherJob& job, const Matrix& a, int64_t e0, int64_t e1, In* out) {
  constexpr int64_t L = VectorOf<T>::lanes;
  const Neighbours& graph = job.graph;
  const In* const x = static_cast<const In*>(job.x);
  const Edges<In, T> edges(job);
  int64_t r = 0;  // the last row that starts at e0 or before
  for (int64_t above = graph.rows; above - r > 1;) {
    const int64_t middle = (r + above) / 2;
    (graph.ptr[middle] <= e0 ? r : above) = middle;
  }
  for (int64_t e = e0; e < e1; ++e) {
    while (graph.ptr[r + 1] <= e) ++r;
    const int64_t source = graph.index[e], place = graph.place ? graph.place[e] : e;
    if (static_cast<uint64_t>(source) >= static_cast<uint64_t>(graph.sources) ||
        static_cast<uint64_t>(place) >= static_cast<uint64_t>(graph.edges))
      return false;
    edges.ask(e + edges.distance);
    const In *own = at<In>(a, r, 0), *other = x + source * job.row_stride;
    Vec<T> sums[2]{};
    int64_t i = 0;
    for (; i + 2 * L <= job.columns; i += 2 * L) {
      sums[0] = sums[0] + load_wide(own + i) * load_wide(other + i);
      sums[1] = sums[1] + load_wide(own + i + L) * load_wide(other + i + L);
    }
    sums[0] = sums[0] + sums[1];
    T sum = T(0);
    for (int l = 0; l < VectorOf<T>::lanes; ++l) sum += sums[0][l];
    for (; i < job.columns; ++i) sum += static_cast<T>(widen(own[i])) * static_cast<T>(widen(other[i]));
    if (job.reduce == Reduce::kMean) sum = sum / static_cast<T>(graph.ptr[r + 1] - graph.ptr[r]);
    narrow(sum, out + place);
  }
  return true;
}

// ---- The gradient of max and min, shared equally by the edges that hold the extreme value. NaN goes to all of them.
template <class In, class T>
MTL_INLINE VecInt<T> holds(const In* best, const In* value) {
  const Vec<T> b = load_wide(best), v = load_wide(value);
  return (v == b) | (b != b);
}
template <class In, class T>
MTL_INLINE bool holds_one(const In* best, const In* value) {
  const T b = static_cast<T>(widen(*best)), v = static_cast<T>(widen(*value));
  return v == b || b != b;
}

// By rows of the result: grad / number of ties, as accumulators.
template <class In, class T>
static bool tie_shares_as(const GatherJob& job, const Matrix& best, const Matrix& grad, int64_t first, int64_t last,
                          T* out, int64_t out_stride) {
  constexpr int64_t L = VectorOf<T>::lanes;
  const Neighbours& graph = job.graph;
  const int64_t columns = job.columns;
  for (int64_t r = first; r < last; ++r, out += out_stride) {
    for (int64_t i = 0; i < columns; ++i) out[i] = T(0);
    const In* own = at<In>(best, r, 0);
    for (int64_t e = graph.ptr[r]; e < graph.ptr[r + 1]; ++e) {
      const int64_t source = graph.index[e];
      if (static_cast<uint64_t>(source) >= static_cast<uint64_t>(graph.sources)) return false;
      const In* other = static_cast<const In*>(job.x) + source * job.row_stride;
      int64_t i = 0;
      for (; i + L <= columns; i += L)
        store<T>(out + i, load<T>(out + i) + keep<T>(holds<In, T>(own + i, other + i), broadcast(T(1))));
      for (; i < columns; ++i) out[i] += holds_one<In, T>(own + i, other + i) ? T(1) : T(0);
    }
    const In* g = at<In>(grad, r, 0);
    for (int64_t i = 0; i < columns; ++i) {
      const T b = static_cast<T>(widen(own[i]));
      out[i] = b != b ? b : out[i] > T(0) ? static_cast<T>(widen(g[i * grad.col_stride])) / out[i] : T(0);
    }
  }
  return true;
}
// By rows of x (the graph turned around: job.x is `best`): the shares of the edges that hold the extreme value.
template <class In, class T>
static bool tie_sums_as(const GatherJob& job, const Matrix& x, const T* shares, int64_t first, int64_t last, In* out) {
  constexpr int64_t L = VectorOf<T>::lanes, kBlock = 256;
  const Neighbours& graph = job.graph;
  for (int64_t r = first; r < last; ++r)
    for (int64_t i0 = 0; i0 < job.columns; i0 += kBlock) {
      const int64_t width = min_of(kBlock, job.columns - i0);
      T sum[kBlock], part[kBlock];
      for (int64_t i = 0; i < width; ++i) sum[i] = T(0);
      const In* own = at<In>(x, r, i0);
      // Chains of kHubEdges, whose sums are added: the error of one long chain would grow with its length.
      for (int64_t e0 = graph.ptr[r], end = graph.ptr[r + 1]; e0 < end; e0 += kHubEdges) {
        for (int64_t i = 0; i < width; ++i) part[i] = T(0);
        for (int64_t e = e0; e < min_of(e0 + kHubEdges, end); ++e) {
          const int64_t target = graph.index[e];
          if (static_cast<uint64_t>(target) >= static_cast<uint64_t>(graph.sources)) return false;
          const In* best = static_cast<const In*>(job.x) + target * job.row_stride + i0;
          const T* share = shares + target * job.columns + i0;
          int64_t i = 0;
          for (; i + L <= width; i += L)
            store<T>(part + i, load<T>(part + i) + keep<T>(holds<In, T>(best + i, own + i), load<T>(share + i)));
          for (; i < width; ++i) part[i] += holds_one<In, T>(best + i, own + i) ? share[i] : T(0);
        }
        add_run(part, width, sum);
      }
      narrow_run(sum, width, out + r * job.columns + i0);
    }
  return true;
}
