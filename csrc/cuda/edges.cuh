// What kernels over the edges of a graph share: edges read and checked, groups of lanes, the columns a lane has.
#pragma once

#include "../common/graph.h"
#include "tiles.cuh"

namespace mtl::cuda {

// No host waits for a launch, so that a graph that cannot be ends the kernel, as in PyTorch's own indexing; where the
// kernel is emulated, the host looks at `wrong`: pointers, indices. Nothing is read through either.
__device__ inline void report_ptr(int* wrong) {
#ifdef __CUDA_ARCH__
  static_cast<void>(wrong);
  printf("torch_mtl_pyg: ptr: expected numbers that rise from 0 to the size of index.\n");
  __trap();
  __builtin_unreachable();  // so that no register has to survive the call
#else
  atomicCAS(wrong, 0, 1);
#endif
}
__device__ inline void report_index(int* wrong) {
#ifdef __CUDA_ARCH__
  static_cast<void>(wrong);
  printf("torch_mtl_pyg: index: expected rows of x and, in place, edges; got a number out of range.\n");
  __trap();
  __builtin_unreachable();
#else
  atomicCAS(wrong + 1, 0, 1);
#endif
}

struct EdgeRange {
  int64_t begin, end;
};
// The edges of row r: none where its pointers are no part of numbers that rise from 0 to `edges`.
__device__ inline EdgeRange edges_of(const Neighbours& graph, int64_t r, int* wrong) {
  const int64_t begin = graph.ptr[r], end = graph.ptr[r + 1];
  if (begin >= 0 && begin <= end && end <= graph.edges && (r > 0 || begin == 0) &&
      (r + 1 < graph.rows || end == graph.edges))
    return {begin, end};
  report_ptr(wrong);
  return {0, 0};
}

template <class T>
__device__ T weight_at(const GatherJob& job, int64_t place) {
  switch (job.weight_type) {
    case DType::kFloat64:
      return static_cast<T>(static_cast<const double*>(job.weights)[place]);
    case DType::kBFloat16:
      return static_cast<T>(to_float(static_cast<const BFloat16*>(job.weights)[place]));
    case DType::kFloat16:
      return static_cast<T>(to_float(static_cast<const Float16*>(job.weights)[place]));
    default:
      return static_cast<T>(static_cast<const float*>(job.weights)[place]);
  }
}

// The row that an edge reads, or -1 where it names what is not there; and how much of it counts.
template <class Sum>
struct Edge {
  int64_t source;
  Sum coefficient;
};
template <class Sum>
__device__ Edge<Sum> read_edge(const GatherJob& job, int64_t e, Sum share, int* wrong) {
  const int64_t source = job.graph.index[e];
  bool there = static_cast<uint64_t>(source) < static_cast<uint64_t>(job.graph.sources);
  if (there && job.weights) {
    const int64_t place = job.graph.place ? job.graph.place[e] : e;
    there = static_cast<uint64_t>(place) < static_cast<uint64_t>(job.graph.edges);
    if (there) share *= weight_at<Sum>(job, place);
  }
  if (!there) {
    report_index(wrong);
    return {-1, share};
  }
  if (job.factors) share *= static_cast<const Sum*>(job.factors)[source];
  return {source, share};
}

constexpr int kAtOnce = 4;  // rows on their way to a group

// Lanes that work on a row together: 4, 8, 16 or 32 neighbours of a warp.
struct Group {
  int lanes, lane;
  uint32_t mask;
};
__device__ inline Group group_of(int lanes) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % lanes;
  return {lanes, lane, lanes == 32 ? 0xffffffffu : ((1u << lanes) - 1) << (thread % 32 - lane)};
}

// How many numbers a lane has: 16 bytes, or, one by one, as many as there are sums in 16 bytes.
template <class T, bool kVector>
constexpr int kPart = kVector || sizeof(T) > 4 ? 16 / static_cast<int>(sizeof(T)) : 4;

// The columns of a lane: kPer side by side where rows are aligned (kVector), else spread over the group, so that
// neighbouring lanes read neighbouring numbers.
template <bool kVector, int kPer>
__device__ int column_of(const Group& g, int i) {
  return kVector ? g.lane * kPer + i : i * g.lanes + g.lane;
}
template <class T, int kPer>
struct alignas(kPer * sizeof(T) < 16 ? kPer * sizeof(T) : 16) Pieces {
  T v[kPer];
};
template <bool kVector, class T, int kPer>
__device__ void load_part(const T* row, const Group& g, int columns, T (&to)[kPer]) {
  if constexpr (kVector) {
    if (g.lane * kPer < columns) {
      const auto all = *reinterpret_cast<const Pieces<T, kPer>*>(row + g.lane * kPer);
#pragma unroll
      for (int i = 0; i < kPer; ++i) to[i] = all.v[i];
    } else {
#pragma unroll
      for (int i = 0; i < kPer; ++i) to[i] = T{};
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int c = column_of<false, kPer>(g, i);
      to[i] = c < columns ? row[c] : T{};
    }
  }
}
template <bool kVector, class T, int kPer>
__device__ void store_part(const T (&from)[kPer], const Group& g, int columns, T* row) {
  if constexpr (kVector) {
    Pieces<T, kPer> all;
#pragma unroll
    for (int i = 0; i < kPer; ++i) all.v[i] = from[i];
    if (g.lane * kPer < columns) *reinterpret_cast<Pieces<T, kPer>*>(row + g.lane * kPer) = all;
  } else {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int c = column_of<kVector, kPer>(g, i);
      if (c < columns) row[c] = from[i];
    }
  }
}

}  // namespace mtl::cuda
