// Neighbours gathered and reduced: rows of x named by the edges of a row. A group of lanes, as many as 16-byte pieces
// of a row but at least four, has a row of the result: each lane reads one edge with its coefficient, the group hands
// them round, and reads four rows of x at once. Sums stay in registers, and go over the edges in their order.
//
// Hubs: a row with more than kPieceEdges edges is cut into pieces of that many, which groups take like rows and whose
// parts are added in order. How many there are is known to the device alone, which lists them: the list may come in any
// order, but which edges make a piece, and in which order parts are added, depends on the graph and the columns alone.
#pragma once

#include "edges.cuh"
#include "tiles.cuh"

namespace mtl::cuda {

constexpr int64_t kPieceEdges = kThreads;
constexpr int kHubShift = 40;

struct Hub {
  int64_t row, piece;  // the number of its first piece
};
struct Hubs {
  unsigned long long* counts;  // the number of hubs << kHubShift, plus that of their pieces; null: there are none
  Hub* list;                   // in the order of their pieces
  int64_t most;                // pieces that `edges` edges can have
};

template <class T>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};

template <class In, class Out>
struct GatherTask {
  using Sum = typename SumOf<In>::type;
  GatherJob job;
  int lanes;
  int64_t first, last;  // rows of the result
  int64_t pieces;       // that come before the rows: all there can be, or none
  Hubs hubs;
  Sum* parts;  // [pieces, columns]
  // Of the gradient of max and min: the row an edge's is compared with, gradients, and shares by source.
  const In* own;
  int64_t own_row;
  const In* grad;
  int64_t grad_row, grad_col;
  const Sum* shares;
  // The result begins with row `first` in all of these: it is added to `add`, and stored where there is a place.
  const Sum* add;
  int64_t add_row;
  Out* out;
  Sum* wide;
  int* wrong;
};

// ---- What becomes of the values of an edge. add: one more edge; merge: one more part.
struct Summed {
  template <class Sum>
  static __device__ Sum start(bool) {
    return Sum(0);
  }
  template <class Sum>
  static __device__ void merge(Sum& sum, Sum v, bool) {
    sum += v;
  }
};

struct TakeSum : Summed {
  static constexpr bool kOwn = false, kShares = false;
  template <class Sum>
  static __device__ void add(Sum& sum, Sum c, Sum v, Sum, Sum, bool) {
    sum += c * v;
  }
  template <class Task, class Sum>
  static __device__ Sum finish(const Task& t, int64_t r, int64_t column, Sum sum, bool) {
    return t.add ? sum + t.add[(r - t.first) * t.add_row + column] : sum;
  }
};

// NaN stays.
struct TakeExtreme {
  static constexpr bool kOwn = false, kShares = false;
  template <class Sum>
  static __device__ Sum start(bool largest) {
    return largest ? -static_cast<Sum>(INFINITY) : static_cast<Sum>(INFINITY);
  }
  template <class Sum>
  static __device__ void merge(Sum& best, Sum v, bool largest) {
    if ((largest ? v > best : v < best) || v != v) best = v;
  }
  template <class Sum>
  static __device__ void add(Sum& best, Sum, Sum v, Sum, Sum, bool largest) {
    merge(best, v, largest);
  }
  template <class Task, class Sum>
  static __device__ Sum finish(const Task&, int64_t, int64_t, Sum best, bool empty) {
    return empty ? Sum(0) : best;
  }
};

// By rows of the result, their own: the gradient over the number of edges that hold the extreme value. NaN has no share
// that would be a number.
struct CountTies : Summed {
  static constexpr bool kOwn = true, kShares = false;
  template <class Sum>
  static __device__ void add(Sum& sum, Sum, Sum v, Sum own, Sum, bool) {
    if (v == own || own != own) sum += Sum(1);
  }
  template <class Task, class Sum>
  static __device__ Sum finish(const Task& t, int64_t r, int64_t column, Sum sum, bool) {
    const Sum best = converted<Sum>(t.own[r * t.own_row + column]);
    if (best != best) return best;
    return sum > Sum(0) ? converted<Sum>(t.grad[r * t.grad_row + column * t.grad_col]) / sum : Sum(0);
  }
};

// By rows of x, their own: the shares of the results they hold. The graph is turned around, and what is gathered are
// the results.
struct SumTies : Summed {
  static constexpr bool kOwn = true, kShares = true;
  template <class Sum>
  static __device__ void add(Sum& sum, Sum, Sum best, Sum own, Sum share, bool) {
    if (best == own || best != best) sum += share;
  }
  template <class Task, class Sum>
  static __device__ Sum finish(const Task&, int64_t, int64_t, Sum sum, bool) {
    return sum;
  }
};

// ---- Hubs.
// Lists the rows with more edges than a piece has, and checks all pointers. A thread a row.
__global__ void __launch_bounds__(kThreads) find_hubs_kernel(Neighbours graph, Hubs hubs, int* wrong) {
  const int64_t r = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (r >= graph.rows) return;
  const EdgeRange edges = edges_of(graph, r, wrong);
  const int64_t count = edges.end - edges.begin;
  if (count <= kPieceEdges) return;
  const int64_t pieces = (count + kPieceEdges - 1) / kPieceEdges;
  // One addition for both numbers, so that the pieces of a hub lie behind those of the one listed before it.
  const unsigned long long before =
      atomicAdd(hubs.counts, (1ull << kHubShift) + static_cast<unsigned long long>(pieces));
  const int64_t piece = static_cast<int64_t>(before & ((1ull << kHubShift) - 1));
  if (piece + pieces > hubs.most)
    report_ptr(wrong);  // rows that share edges
  else
    hubs.list[before >> kHubShift] = {r, piece};
}

// The number of the hub that a piece belongs to, or -1 where there are fewer pieces.
__device__ inline int64_t hub_of(const Hubs& hubs, int64_t piece) {
  const unsigned long long counts = *hubs.counts;
  if (piece >= static_cast<int64_t>(counts & ((1ull << kHubShift) - 1))) return -1;
  int64_t hub = 0;
  for (int64_t above = static_cast<int64_t>(counts >> kHubShift); above - hub > 1;) {
    const int64_t middle = (hub + above) / 2;
    (hubs.list[middle].piece <= piece ? hub : above) = middle;
  }
  return hub;
}

// ---- Rows.
// Adds the edges [e0, e1) of row r to the columns that this lane has of `columns` from `base` on.
template <class Take, bool kVector, class In, class Out, class Sum, int kPer>
__device__ void gather_edges(const GatherTask<In, Out>& t, const Group& g, int64_t r, int64_t e0, int64_t e1, Sum share,
                             int64_t base, int columns, Sum (&sum)[kPer]) {
  const bool largest = t.job.reduce == Reduce::kMax, alike = !t.job.weights && !t.job.factors;
  const In* const x = static_cast<const In*>(t.job.x) + base;
  In own[kPer];
  if constexpr (Take::kOwn) load_part<kVector>(t.own + r * t.own_row + base, g, columns, own);
  for (int64_t e = e0; e < e1; e += g.lanes) {
    Edge<Sum> mine{-1, share};
    if (e + g.lane < e1) mine = read_edge(t.job, e + g.lane, share, t.wrong);
    const int count = e1 - e < g.lanes ? static_cast<int>(e1 - e) : g.lanes;
    for (int j = 0; j < count; j += kAtOnce) {
      int64_t source[kAtOnce];
      Sum c[kAtOnce];
      In v[kAtOnce][kPer];
      Sum shares[kAtOnce][Take::kShares ? kPer : 1];
#pragma unroll
      for (int q = 0; q < kAtOnce; ++q) {
        source[q] = __shfl_sync(g.mask, mine.source, j + q, g.lanes);
        c[q] = alike ? share : __shfl_sync(g.mask, mine.coefficient, j + q, g.lanes);
      }
#pragma unroll
      for (int q = 0; q < kAtOnce; ++q) {
        if (source[q] < 0) continue;
        load_part<kVector>(x + source[q] * t.job.row_stride, g, columns, v[q]);
        if constexpr (Take::kShares)
          load_part<kVector>(t.shares + source[q] * t.job.columns + base, g, columns, shares[q]);
      }
#pragma unroll
      for (int q = 0; q < kAtOnce; ++q) {
        if (source[q] < 0) continue;
#pragma unroll
        for (int i = 0; i < kPer; ++i)
          Take::add(sum[i], c[q], converted<Sum>(v[q][i]), Take::kOwn ? converted<Sum>(own[i]) : Sum(0),
                    Take::kShares ? shares[q][Take::kShares ? i : 0] : Sum(0), largest);
      }
    }
  }
}

// Stores the columns that this lane has of row r.
template <class Take, bool kVector, class In, class Out, class Sum, int kPer>
__device__ void finish_row(const GatherTask<In, Out>& t, const Group& g, int64_t r, bool empty, int64_t base,
                           int columns, Sum (&sum)[kPer]) {
  Out narrow[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int c = column_of<kVector, kPer>(g, i);
    if (c < columns) sum[i] = Take::finish(t, r, base + c, sum[i], empty);
    narrow[i] = converted<Out>(sum[i]);
  }
  const int64_t at = (r - t.first) * t.job.columns + base;
  if (t.out) store_part<kVector>(narrow, g, columns, t.out + at);
  if (t.wide) store_part<kVector>(sum, g, columns, t.wide + at);
}

// A group a piece or a row; blockIdx.y: columns.
template <class Take, bool kVector, class In, class Out>
__global__ void __launch_bounds__(kThreads, 2) gather_kernel(GatherTask<In, Out> t) {
  using Sum = typename SumOf<In>::type;
  constexpr int kPer = kPart<In, kVector>;
  const Group g = group_of(t.lanes);
  const int64_t base = static_cast<int64_t>(blockIdx.y) * g.lanes * kPer, left = t.job.columns - base;
  const int columns = left < g.lanes * kPer ? static_cast<int>(left) : g.lanes * kPer;
  const int64_t item = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / g.lanes;
  const bool is_piece = item < t.pieces;
  int64_t r = t.first + item - t.pieces, before = 0;
  if (is_piece) {
    const int64_t hub = hub_of(t.hubs, item);
    if (hub < 0) return;
    r = t.hubs.list[hub].row;
    before = (item - t.hubs.list[hub].piece) * kPieceEdges;
  } else if (r >= t.last) {
    return;
  }
  const EdgeRange edges = edges_of(t.job.graph, r, t.wrong);
  const int64_t count = edges.end - edges.begin;
  if (!is_piece && t.hubs.counts && count > kPieceEdges) return;  // add_parts_kernel does it
  const int64_t e0 = edges.begin + before, e1 = edges.end - e0 < kPieceEdges ? edges.end : e0 + kPieceEdges;
  const Sum share = t.job.reduce == Reduce::kMean ? Sum(1) / static_cast<Sum>(count) : Sum(1);
  Sum sum[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) sum[i] = Take::template start<Sum>(t.job.reduce == Reduce::kMax);
  gather_edges<Take, kVector>(t, g, r, e0, e1, share, base, columns, sum);
  if (is_piece)
    store_part<kVector>(sum, g, columns, t.parts + item * t.job.columns + base);
  else
    finish_row<Take, kVector>(t, g, r, count == 0, base, columns, sum);
}

// The hubs among the rows, from their parts. A block a hub, in steps; blockIdx.y: columns. The groups of a block take
// parts in turns, and their sums are added in order.
template <class Take, class In, class Out>
__global__ void __launch_bounds__(kThreads) add_parts_kernel(GatherTask<In, Out> t) {
  using Sum = typename SumOf<In>::type;
  constexpr int kPer = kPart<Sum, false>;
  __shared__ Sum places[kPer][kThreads];
  const Group g = group_of(t.lanes);
  const bool largest = t.job.reduce == Reduce::kMax;
  const int64_t base = static_cast<int64_t>(blockIdx.y) * g.lanes * kPer, left = t.job.columns - base;
  const int columns = left < g.lanes * kPer ? static_cast<int>(left) : g.lanes * kPer;
  const int thread = static_cast<int>(threadIdx.x), own = thread / g.lanes, groups = kThreads / g.lanes;
  const int64_t hubs = static_cast<int64_t>(*t.hubs.counts >> kHubShift);
  for (int64_t h = blockIdx.x; h < hubs; h += gridDim.x) {
    const Hub hub = t.hubs.list[h];
    if (hub.row < t.first || hub.row >= t.last) continue;
    const int64_t edges = t.job.graph.ptr[hub.row + 1] - t.job.graph.ptr[hub.row];
    const int64_t pieces = (edges + kPieceEdges - 1) / kPieceEdges;
    Sum sum[kPer];
#pragma unroll
    for (int i = 0; i < kPer; ++i) sum[i] = Take::template start<Sum>(largest);
#pragma unroll 4
    for (int64_t p = own; p < pieces; p += groups) {
      Sum part[kPer];
      load_part<false>(t.parts + (hub.piece + p) * t.job.columns + base, g, columns, part);
#pragma unroll
      for (int i = 0; i < kPer; ++i) Take::merge(sum[i], part[i], largest);
    }
#pragma unroll
    for (int i = 0; i < kPer; ++i) places[i][thread] = sum[i];
    __syncthreads();
    if (own == 0) {
      for (int q = 1; q < groups; ++q)
#pragma unroll
        for (int i = 0; i < kPer; ++i) Take::merge(sum[i], places[i][q * g.lanes + g.lane], largest);
      finish_row<Take, false>(t, g, hub.row, false, base, columns, sum);
    }
    __syncthreads();  // the places are those of the next hub
  }
}

}  // namespace mtl::cuda
