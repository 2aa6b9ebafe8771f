// The gradient of the edges' weights: a number per edge, the product of the row it ends in with the row it reads.
#pragma once

#include "edges.cuh"

namespace mtl::cuda {

template <class In>
struct DotsTask {
  GatherJob job;
  const In* a;  // by rows of the result
  int64_t a_row;
  int lanes;
  In* out;  // [edges], by place
  int* wrong;
};

// A thread has an edge, finds its row and checks it; the edges of a group are worked on by all of its lanes, four at a
// time.
template <class Sum, bool kVector, class In>
__global__ void __launch_bounds__(kThreads, 2) edge_dots_kernel(DotsTask<In> t) {
  constexpr int kPer = kPart<In, kVector>;
  const Neighbours& graph = t.job.graph;
  const Group g = group_of(t.lanes);
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t r = e; r < graph.rows; r += threads) edges_of(graph, r, t.wrong);
  int64_t source = -1, row = 0, place = e, degree = 1;
  if (e < graph.edges) {
    for (int64_t above = graph.rows; above - row > 1;) {  // the last row that starts at e or before
      const int64_t middle = (row + above) / 2;
      (graph.ptr[middle] <= e ? row : above) = middle;
    }
    const EdgeRange edges = edges_of(graph, row, t.wrong);
    degree = edges.end - edges.begin;
    source = graph.index[e];
    if (graph.place) place = graph.place[e];
    if (static_cast<uint64_t>(source) >= static_cast<uint64_t>(graph.sources) ||
        static_cast<uint64_t>(place) >= static_cast<uint64_t>(graph.edges)) {
      report_index(t.wrong);
      source = -1;
    }
  }
  const In* const x = static_cast<const In*>(t.job.x);
  const int64_t first = e - g.lane, left = graph.edges - first;
  const int count = left < g.lanes ? static_cast<int>(left) : g.lanes, step = g.lanes * kPer;
  Sum dot = Sum(0);
  for (int j = 0; j < count; j += kAtOnce) {
    int64_t from[kAtOnce], to[kAtOnce];
    Sum sum[kAtOnce];
#pragma unroll
    for (int q = 0; q < kAtOnce; ++q) {
      from[q] = __shfl_sync(g.mask, source, j + q, g.lanes);
      to[q] = __shfl_sync(g.mask, row, j + q, g.lanes);
      sum[q] = Sum(0);
    }
    for (int64_t base = 0; base < t.job.columns; base += step) {
      const int columns = t.job.columns - base < step ? static_cast<int>(t.job.columns - base) : step;
      In a[kAtOnce][kPer], b[kAtOnce][kPer];
#pragma unroll
      for (int q = 0; q < kAtOnce; ++q) {
        if (from[q] < 0) continue;
        load_part<kVector>(t.a + to[q] * t.a_row + base, g, columns, a[q]);
        load_part<kVector>(x + from[q] * t.job.row_stride + base, g, columns, b[q]);
      }
#pragma unroll
      for (int q = 0; q < kAtOnce; ++q) {
        if (from[q] < 0) continue;
#pragma unroll
        for (int i = 0; i < kPer; ++i) sum[q] += converted<Sum>(a[q][i]) * converted<Sum>(b[q][i]);
      }
    }
#pragma unroll
    for (int q = 0; q < kAtOnce; ++q) {
      for (int bits = g.lanes / 2; bits > 0; bits /= 2) sum[q] += __shfl_xor_sync(g.mask, sum[q], bits, g.lanes);
      if (g.lane == j + q) dot = sum[q];
    }
  }
  if (source < 0) return;
  t.out[place] = converted<In>(t.job.reduce == Reduce::kMean ? dot / static_cast<Sum>(degree) : dot);
}

}  // namespace mtl::cuda
