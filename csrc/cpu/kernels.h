// The kernels' interface: one table of functions per instruction set, raw pointers only, no torch.
//
// Every product of an op is `C = A * B`: A is read by rows, B comes as packed panels, C is row-major.
// All functions are thread-safe, keep no state, and do work that does not depend on who calls them, so results are
// bitwise equal however the calls are shared out between threads.
#pragma once

#include <stdint.h>

#include "../common/dtype.h"
#include "../common/graph.h"
#include "../common/heads.h"
#include "../common/losses.h"

namespace mtl {

// A strided matrix: element (i, j) lies at data + (i * row_stride + j * col_stride) elements.
struct Matrix {
  const void* data;
  int64_t rows, cols;
  int64_t row_stride, col_stride;

  Matrix part(DType type, int64_t row0, int64_t row1, int64_t col0, int64_t col1) const {
    const int64_t offset = (row0 * row_stride + col0 * col_stride) * element_bytes(type);
    return {static_cast<const char*>(data) + offset, row1 - row0, col1 - col0, row_stride, col_stride};
  }
};

// ---- Heads and losses by tiles of rows. The columns of the logits are worked on in groups of whole tasks.
struct LossGroup {
  int64_t first_task, last_task;  // [first, last)
  int64_t begin, end;             // columns
  const void* logit_panels;       // panels of W^T [D, columns]
  const void* weight_panels;      // panels of W [columns, D], for dX
  const void* bias;               // accumulators, padded to whole panels
};
struct LossJob {
  int64_t k, d, tile_rows, widest_group;
  const TaskSpec* tasks;
  const double* scale;  // factor of each task's gradient: its weight over its norm
  const LossGroup* groups;
  int64_t group_count;
  Labels label_matrix;  // [N, T]; its col_stride is 0 where every task has labels of its own
  bool x_in_place;      // columns of x are contiguous
  bool need_x, need_weight, need_bias, need_gramian;
};
// Sums over the rows of one slice, accumulators but for the losses.
struct LossSums {
  double* loss;  // [T]
  void* weight;  // [K, D]
  void* bias;    // [K]
  void* gram;    // [K, K]: on and above the diagonal
  bool fresh;    // weight and gram hold nothing yet
};

// ---- Heads with hidden layers, and routed rows, by tiles of rows.
// Tasks worked on together. Panels hold accumulators, see pack_wide.
struct HeadsGroup {
  int64_t first_task, last_task;  // [first, last)
  int64_t begin, end;             // columns of the logits
  const void* panels;             // of W^T of the first layer, all tasks
  const void* back_panels;        // of W of the first layer, for dX
  // Of W^T and W of each task's other layers, [task * (layers - 1) + layer - 1].
  const void* const* task_panels;
  const void* const* task_back;
  const void* const* bias;  // [layers]: accumulators of the group's first row, the last layer's padded; or null
};
struct HeadsJob {
  LossJob loss;  // tasks, labels, what is needed (need_weight: weights and biases); groups and x_in_place are not read
  HeadsSpec heads;
  int64_t tile_rows;
  int64_t widest_units;   // of one task's hidden layer
  int64_t widest_hidden;  // of a group's hidden layer
  bool routed;            // each group is one task, each tile has an index
  bool x_in_place;        // rows that follow each other are read where they lie
  bool dx_in_place;       // and dx of these is written where it lies
  bool needs_dx;          // also for the Gramian of routed rows
  bool gradient;          // any
  void* out;              // outputs alone, with out_columns; or null
  int64_t out_columns;
};
struct HeadsTile {
  Matrix x;
  const int64_t* index;  // the rows of x, labels and dx; or null: from `row` on
  int64_t row, rows;
  void* dx;
};
// Sums over rows, accumulators but for the losses; all are added to.
struct HeadsSums {
  double* loss;         // of the group's tasks: [T], or of routed rows one
  void* const* weight;  // [layers]: of the rows of first_task and the following ones
  void* const* bias;    // [layers]: the same, or null
  int64_t first_task;
  double* gram;  // [T, T] on and above the diagonal; of routed rows one
};

struct Kernels {
  const char* isa;

  // ---- panels: B [P, N] as float32/float64 (or bfloat16 pairs), [P blocks][column panels][P block][panel width].
  // The bytes of all panels, and the number of panels: the units that can be packed independently.
  int64_t (*panels_bytes)(DType type, int64_t p, int64_t n);
  int64_t (*panel_count)(DType type, int64_t n);
  // Packs the panels [first, last) of B; columns past n are filled with zeros.
  void (*pack_panels)(DType type, const Matrix& b, int64_t first, int64_t last, void* panels);

  // ---- rows: out[i, :] (+)= A[i, :] * B + bias for every row of A; accumulate: float32 and float64 only.
  // Each element is one chain of fused multiply-adds in the order of p, whatever the rows of the call.
  // bias: n accumulators, or null. out: elements of `type` with out_row_stride, columns contiguous.
  int64_t (*rows_scratch_bytes)(DType type);
  void (*rows)(DType type, const Matrix& a, const void* panels, int64_t n, const void* bias, bool accumulate, void* out,
               int64_t out_row_stride, void* scratch);

  // ---- outer: sum[k, d] += sum over the rows r of G[r, k] * X[r, d]; at most outer_rows rows.
  // sum: accumulators, row-major with sum_row_stride. column_sum[k] += sum over r of G[r, k] when it is not null.
  int64_t outer_rows;
  int64_t (*outer_scratch_bytes)(DType type, int64_t k, int64_t d);
  void (*outer)(DType type, const Matrix& g, const Matrix& x, void* sum, int64_t sum_row_stride, void* column_sum,
                void* scratch);

  // ---- out[i] = parts[0][i] + parts[1][i] + ... in this order, for i in [begin, end); out has elements of `type`.
  void (*sum_parts)(DType type, const void* parts, int64_t part_count, int64_t part_stride, int64_t begin, int64_t end,
                    void* out);
  // ---- Counts the labels of all tasks in the rows [first, last), and the class weights of these (for cross-entropy
  // with class weights). Returns a task that has a label it cannot have, or -1.
  int64_t (*count_labels)(const LossJob& job, int64_t task_count, int64_t first, int64_t last, int64_t* count,
                          double* norm);
  // ---- One tile of rows of the heads with losses. row: of the labels; next: rows of x that follow for the next tile;
  // dx: the tile's part of the output.
  int64_t (*loss_scratch_bytes)(DType type, const LossJob& job);
  void (*loss_tile)(DType type, const LossJob& job, const Matrix& x, int64_t row, int64_t next, const LossSums& sums,
                    void* dx, void* scratch);
  // ---- One tile of rows through some groups of heads. pack_wide: all panels of accumulators.
  int64_t (*heads_scratch_bytes)(DType type, const HeadsJob& job);
  void (*heads_tile)(DType type, const HeadsJob& job, const HeadsGroup* groups, int64_t group_count,
                     const HeadsTile& tile, const HeadsSums& sums, void* scratch);
  int64_t (*wide_panels_bytes)(DType type, int64_t p, int64_t n);
  void (*pack_wide)(DType type, const Matrix& b, void* panels);
  // ---- Neighbours. All of these return false where an edge names what is not there, which is then not read.
  // The rows [first, last) of the result, as accumulators; accumulate: added to what is there (sum and mean only).
  bool (*gather)(DType type, const GatherJob& job, int64_t first, int64_t last, bool accumulate, void* out,
                 int64_t out_stride);
  // The edges [e0, e1) of a row of row_edges, and two such results put together, for rows shared out between threads.
  bool (*gather_edges)(DType type, const GatherJob& job, int64_t e0, int64_t e1, int64_t row_edges, void* out);
  void (*combine)(DType type, Reduce reduce, const void* part, int64_t columns, void* out);
  // out[place] = <a[row], x[index]>, over the number of the row's edges for mean, for the edges [e0, e1).
  bool (*edge_dots)(DType type, const GatherJob& job, const Matrix& a, int64_t e0, int64_t e1, void* out);
  // The gradient of max and min: grad over the number of ties, by rows of the result; and its sums, by rows of x, with
  // the graph turned around and the result as the job's x.
  bool (*tie_shares)(DType type, const GatherJob& job, const Matrix& best, const Matrix& grad, int64_t first,
                     int64_t last, void* out, int64_t out_stride);
  bool (*tie_sums)(DType type, const GatherJob& job, const Matrix& x, const void* shares, int64_t first, int64_t last,
                   void* out);
  // out[i] = elements of `type` from accumulators, for i in [0, n).
  void (*narrow)(DType type, const void* in, int64_t n, void* out);
  // ---- The register tile over and over on data in the first-level cache, `repeats` times; returns its multiply-adds.
  // scratch: 64 KiB of zeros.
  int64_t (*multiply_adds)(DType type, int64_t repeats, void* scratch);
  // ---- out[i] = accumulator of in[i * stride], for i in [0, n).
  void (*widen)(DType type, const void* in, int64_t n, int64_t stride, void* out);
};

// Defined one per kernels_<isa>.cpp.
const Kernels* kernels_baseline();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_bf16();

}  // namespace mtl
