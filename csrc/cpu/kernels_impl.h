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
static void rows(DType type, const Matrix& a, const void* panels, int64_t n, const void* bias, void* out,
                 int64_t out_row_stride, void* scratch) {
  with_type(type, [&](auto in) {
    using In = decltype(in);
    rows_as<typename ArithmeticOf<In>::type, In>(a, panels, n, bias, out, out_row_stride, scratch);
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

constexpr Kernels kTable{
    MTL_ISA_NAME, panels_bytes,        panel_count, pack_panels, rows_scratch_bytes, rows,
    kOuterRows,   outer_scratch_bytes, outer,       sum_parts,   count_labels_of,    loss_scratch_bytes,
    loss_tile,    multiply_adds,       widen_all};

}  // namespace
}  // namespace mtl
