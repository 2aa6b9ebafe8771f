// The kernels of kernels.h, compiled once per instruction set: kernels_<isa>.cpp sets MTL_VECTOR_BYTES and
// MTL_ISA_NAME and includes this file. All of it has internal linkage, see vector.h.
#pragma once

#include <stdint.h>
#ifdef __F16C__
#include <immintrin.h>
#endif

#include "kernels.h"

namespace mtl {
namespace {

#include "vector.h"
// (order matters: convert.h and microkernel.h build on vector.h)
#include "convert.h"
#include "microkernel.h"
#include "products.h"
#include "vector_math.h"
#include "labels.h"
#include "losses.h"
#include "loss_tile.h"
#include "label_counts.h"
#include "activations.h"
#include "heads_tile.h"
#include "gather.h"

// ---- The table: every function takes the stored type at run time.
template <class F>
static auto with_type(DType type, F f) {
  switch (type) {
    case DType::kFloat64:
      return f(double{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Float16{});
    default:
      return f(float{});
  }
}

template <class In>
using AccOf = typename ArithmeticOf<In>::type::Acc;

static int64_t panels_bytes(DType type, int64_t p, int64_t n) {
  return with_type(type, [&](auto in) {
    using K = typename ArithmeticOf<decltype(in)>::type;
    return ceil_div(p, K::depth) * padded_columns<K>(n) * static_cast<int64_t>(sizeof(typename K::Element));
  });
}
static int64_t panel_count(DType type, int64_t n) {
  return with_type(type, [&](auto in) {
    using T = typename ArithmeticOf<decltype(in)>::type::Acc;
    int64_t count = 0;
    for (int64_t j = 0; j < n; ++count) j += panel_vectors<T>(n - j) * VectorOf<T>::lanes;
    return count;
  });
}
static void pack_panels(DType type, const Matrix& b, int64_t first, int64_t last, void* panels) {
  with_type(type, [&](auto in) {
    using In = decltype(in);
    pack_panels_as<typename ArithmeticOf<In>::type, In>(b, first, last, panels);
  });
}
static int64_t rows_scratch_bytes(DType type) {
  return with_type(type, [&](auto in) {
    using In = decltype(in);
    return rows_scratch_bytes_as<typename ArithmeticOf<In>::type, In>();
  });
}
static void rows(DType type, const Matrix& a, const void* panels, int64_t n, const void* bias, bool accumulate,
                 void* out, int64_t out_row_stride, void* scratch) {
  with_type(type, [&](auto in) {
    using In = decltype(in);
    rows_as<typename ArithmeticOf<In>::type, In>(a, panels, n, bias, accumulate, out, out_row_stride, scratch);
  });
}
static int64_t outer_scratch_bytes(DType type, int64_t k, int64_t d) {
  return with_type(type, [&](auto in) {
    using In = decltype(in);
    return outer_scratch_bytes_as<typename ArithmeticOf<In>::type, In>(k, d);
  });
}
static void outer(DType type, const Matrix& g, const Matrix& x, void* sum, int64_t sum_row_stride, void* column_sum,
                  void* scratch) {
  with_type(type, [&](auto in) {
    using In = decltype(in);
    outer_as<typename ArithmeticOf<In>::type, In>(g, x, sum, sum_row_stride, column_sum, scratch);
  });
}
static void sum_parts(DType type, const void* parts, int64_t part_count, int64_t part_stride, int64_t begin,
                      int64_t end, void* out) {
  with_type(type, [&](auto in) {
    using In = decltype(in);
    sum_parts_as<typename ArithmeticOf<In>::type, In>(parts, part_count, part_stride, begin, end, out);
  });
}
static void widen_all(DType type, const void* in, int64_t n, int64_t stride, void* out) {
  with_type(type, [&](auto kind) {
    using In = decltype(kind);
    widen_run(static_cast<const In*>(in), n, stride, static_cast<typename ArithmeticOf<In>::type::Acc*>(out));
  });
}

static int64_t loss_scratch_bytes(DType type, const LossJob& job) {
  return with_type(type, [&](auto in) {
    using In = decltype(in);
    return LossScratch<typename ArithmeticOf<In>::type, In>(job, nullptr).bytes;
  });
}
static void loss_tile(DType type, const LossJob& job, const Matrix& x, int64_t row, int64_t next, const LossSums& sums,
                      void* dx, void* scratch) {
  with_type(type, [&](auto in) {
    using In = decltype(in);
    loss_tile_as<typename ArithmeticOf<In>::type, In>(job, x, row, next, sums, dx, scratch);
  });
}
static int64_t heads_scratch_bytes(DType type, const HeadsJob& job) {
  return with_type(type, [&](auto in) { return HeadsScratch<AccOf<decltype(in)>>(job, nullptr).bytes; });
}
static void heads_tile(DType type, const HeadsJob& job, const HeadsGroup* groups, int64_t group_count,
                       const HeadsTile& tile, const HeadsSums& sums, void* scratch) {
  with_type(type, [&](auto in) {
    using In = decltype(in);
    heads_tile_as<AccOf<In>, In>(job, groups, group_count, tile, sums, scratch);
  });
}
static int64_t wide_panels_bytes(DType type, int64_t p, int64_t n) {
  return with_type(type, [&](auto in) {
    using T = AccOf<decltype(in)>;
    return p * padded_columns<Fma<T>>(n) * static_cast<int64_t>(sizeof(T));
  });
}
static void pack_wide(DType type, const Matrix& b, void* panels) {
  with_type(type, [&](auto in) {
    using In = decltype(in);
    pack_panels_as<Fma<AccOf<In>>, In>(b, 0, b.cols, panels);
  });
}
static bool gather(DType type, const GatherJob& job, int64_t first, int64_t last, bool accumulate, void* out,
                   int64_t out_stride) {
  return with_type(type, [&](auto in) {
    using In = decltype(in);
    return gather_as<In>(job, first, last, accumulate, static_cast<AccOf<In>*>(out), out_stride);
  });
}
static bool gather_edges(DType type, const GatherJob& job, int64_t e0, int64_t e1, int64_t row_edges, void* out) {
  return with_type(type, [&](auto in) {
    using In = decltype(in);
    return gather_edges_of<In>(job, e0, e1, row_edges, static_cast<AccOf<In>*>(out));
  });
}
static void combine(DType type, Reduce reduce, const void* part, int64_t columns, void* out) {
  with_type(type, [&](auto in) {
    using T = AccOf<decltype(in)>;
    combine_as(reduce, static_cast<const T*>(part), columns, static_cast<T*>(out));
  });
}
static bool edge_dots(DType type, const GatherJob& job, const Matrix& a, int64_t e0, int64_t e1, void* out) {
  return with_type(type, [&](auto in) {
    using In = decltype(in);
    return edge_dots_as<In, AccOf<In>>(job, a, e0, e1, static_cast<In*>(out));
  });
}
static bool tie_shares(DType type, const GatherJob& job, const Matrix& best, const Matrix& grad, int64_t first,
                       int64_t last, void* out, int64_t out_stride) {
  return with_type(type, [&](auto in) {
    using In = decltype(in);
    return tie_shares_as<In>(job, best, grad, first, last, static_cast<AccOf<In>*>(out), out_stride);
  });
}
static bool tie_sums(DType type, const GatherJob& job, const Matrix& x, const void* shares, int64_t first, int64_t last,
                     void* out) {
  return with_type(type, [&](auto in) {
    using In = decltype(in);
    return tie_sums_as<In>(job, x, static_cast<const AccOf<In>*>(shares), first, last, static_cast<In*>(out));
  });
}
static void narrow_all(DType type, const void* in, int64_t n, void* out) {
  with_type(type, [&](auto kind) {
    using In = decltype(kind);
    narrow_run(static_cast<const AccOf<In>*>(in), n, static_cast<In*>(out));
  });
}
static int64_t multiply_adds(DType type, int64_t repeats, void* scratch) {
  return with_type(type, [&](auto in) {
    using K = typename ArithmeticOf<decltype(in)>::type;
    constexpr int64_t kSteps = 192, kWidth = 2 * VectorOf<typename K::Acc>::lanes;
    constexpr int kRows = kMaxRows<K, 2>;
    auto* a = static_cast<typename K::Element*>(scratch);
    auto* c = reinterpret_cast<typename K::Acc*>(a + kSteps * (kRows + kWidth));
    for (int64_t i = 0; i < repeats; ++i)
      micro_kernel<K, kRows, 2>(kSteps, a, kSteps, 1, a + kSteps * kRows, false, nullptr, c, kWidth,
                                static_cast<int>(kWidth));
    return repeats * kSteps * K::depth * kRows * kWidth;
  });
}

constexpr Kernels kTable{MTL_ISA_NAME,
                         panels_bytes,
                         panel_count,
                         pack_panels,
                         rows_scratch_bytes,
                         rows,
                         kOuterRows,
                         outer_scratch_bytes,
                         outer,
                         sum_parts,
                         count_labels_of,
                         loss_scratch_bytes,
                         loss_tile,
                         heads_scratch_bytes,
                         heads_tile,
                         wide_panels_bytes,
                         pack_wide,
                         gather,
                         gather_edges,
                         combine,
                         edge_dots,
                         tie_shares,
                         tie_sums,
                         narrow_all,
                         multiply_adds,
                         widen_all};

}  // namespace
}  // namespace mtl
