// What a kernel needs to know of a graph: the neighbours of each row of the result, grouped. No torch.
#pragma once

#include <stdint.h>

#include "dtype.h"

namespace mtl {

// In the order of torch_mtl_pyg/ops/aggregate.py.
enum class Reduce : int { kSum = 0, kMean = 1, kMax = 2, kMin = 3 };

// Edge e of row r, ptr[r] <= e < ptr[r + 1], reads row index[e] of x; its weight lies at place[e], or at e where place
// is null.
struct Neighbours {
  const int64_t *ptr, *index, *place;
  int64_t rows, sources, edges;
};

// Rows of x are gathered and reduced. A coefficient of an edge is the product of those given: its weight, the factor of
// the row it reads, one over the number of edges of its row (mean).
struct GatherJob {
  Neighbours graph;
  Reduce reduce;
  const void* x;
  int64_t columns, row_stride;  // columns are contiguous
  const void* weights;          // [edges], contiguous, or null
  DType weight_type;
  const void* factors;      // [sources] accumulators, or null
  const int64_t* hubs;      // rows with more than kHubEdges edges, ascending
  const void* hub_results;  // [hubs, columns] accumulators
  int64_t hub_count;
};

// A row with more edges is shared out between threads in pieces of this many, added in order.
constexpr int64_t kHubEdges = 512;

}  // namespace mtl
