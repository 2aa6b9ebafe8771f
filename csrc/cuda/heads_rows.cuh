// Which rows, and which part of a layer, a block of a kernel of heads works on.
//
// What a chunk of rows has on the way lies in scratch memory, row by row. Unrouted, a row of it has the units of all
// tasks; routed, those of its own task, and the rows of a piece lie at its place, so that a tile has rows of one task.
#pragma once

#include "routes.cuh"
#include "tiles.cuh"

namespace mtl::cuda {

// The rows of a layer's packed weights, and so its units: task t has width(t) of them from begin(t) on.
struct LayerPlace {
  const int64_t* begins;  // [tasks + 1], of the last layer; null: `units` for every task
  int64_t units;

  __device__ int64_t begin(int64_t t) const { return begins ? begins[t] : t * units; }
  __device__ int64_t width(int64_t t) const { return begins ? begins[t + 1] - begins[t] : units; }
};

// `rows` rows in scratch memory from row `scratch` on. They are the rows of x from `source` on, or, routed, those at
// order[source], order[source + 1], ...
struct BlockRows {
  int64_t task, scratch, source;
  int rows;
};

// A chunk.
struct ChunkRows {
  const Piece* pieces;   // of the chunk; null: every row belongs to every task
  const int64_t* order;  // of routed rows
  int64_t first, count;  // of x; or `count` pieces

  __device__ bool routed() const { return pieces; }
  // The tile with number `tile`, of M rows: M divides the rows of a piece.
  template <int M>
  __device__ BlockRows tile(int64_t tile, int64_t task) const {
    static_assert(kPieceRows % M == 0, "a tile has rows of one piece");
    const int64_t scratch = tile * M;
    if (!pieces) {
      const int64_t rest = count - scratch;
      return {task, scratch, first + scratch, rest < M ? static_cast<int>(rest > 0 ? rest : 0) : M};
    }
    constexpr int kTiles = kPieceRows / M;
    const Piece piece = pieces[tile / kTiles];
    const int inside = static_cast<int>(tile % kTiles) * M, rest = piece.rows - inside;
    return {piece.task, scratch, piece.first + inside, rest < M ? (rest > 0 ? rest : 0) : M};
  }
  // The rows whose sum is part `item`: a slice of the chunk, or a piece.
  __device__ BlockRows item(int64_t item, int64_t slices, int64_t task) const {
    if (pieces) {
      const Piece piece = pieces[item];
      return {piece.task, item * kPieceRows, piece.first, piece.rows};
    }
    const int64_t from = count * item / slices, to = count * (item + 1) / slices;
    return {task, from, first + from, static_cast<int>(to - from)};
  }
  __device__ int64_t source_row(const BlockRows& at, int64_t r) const {
    return pieces ? order[at.source + r] : at.source + r;
  }
};

// Some rows and columns of a matrix.
template <class T>
__device__ View<T> part_of(const View<T>& m, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  constexpr int64_t kPiece = 16 / static_cast<int64_t>(sizeof(T));
  const T* const data = m.data + row * m.row_stride + column * m.col_stride;
  const bool aligned = m.col_stride == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && columns % kPiece == 0 &&
                       m.row_stride % kPiece == 0;
  return {data, rows, columns, m.row_stride, m.col_stride, aligned};
}

// As load_tile, of the rows index[row], index[row + 1], ...
template <class Element, class T>
__device__ void load_indexed(Element* tile, int tile_row, const View<T>& m, const int64_t* index, int64_t row, int rows,
                             int64_t column, int columns) {
  if constexpr (sizeof(Element) == sizeof(T)) {
    if (m.aligned) {
      constexpr int kPiece = 16 / static_cast<int>(sizeof(T));
      const int pieces = columns / kPiece;
      for (int i = static_cast<int>(threadIdx.x); i < rows * pieces; i += kThreads) {
        const int r = i / pieces, c = i % pieces * kPiece;
        const bool there = row + r < m.rows && column + c < m.cols;
        const T* from = there ? m.data + index[row + r] * m.row_stride + column + c : m.data;
        cp_async_16(tile + r * tile_row + c, from, there);
      }
      return;
    }
  }
#pragma unroll 1  // registers are few where tiles are products
  for (int i = static_cast<int>(threadIdx.x); i < rows * columns; i += kThreads) {
    const int r = i / columns, c = i % columns;
    const bool there = row + r < m.rows && column + c < m.cols;
    tile[r * tile_row + c] =
        there ? converted<Element>(m.data[index[row + r] * m.row_stride + (column + c) * m.col_stride]) : Element{};
  }
}

// Rows of a block: of a matrix in scratch memory, or, where that can be, of x.
template <class T, bool kMayBeX>
struct RowsOf {
  View<T> m;
  const int64_t* index;

  __device__ RowsOf(const View<T>& all, bool of_x, const ChunkRows& chunk, const BlockRows& at, int64_t column,
                    int64_t columns)
      : m(part_of(all, of_x ? (chunk.routed() ? 0 : at.source) : at.scratch, at.rows, column, columns)),
        index(kMayBeX && of_x && chunk.routed() ? chunk.order + at.source : nullptr) {}
  template <class Element>
  __device__ void load(Element* tile, int tile_row, int64_t row, int rows, int64_t column, int columns) const {
    if (kMayBeX && index)
      load_indexed(tile, tile_row, m, index, row, rows, column, columns);
    else
      load_tile(tile, tile_row, m, row, rows, column, columns);
  }
};

}  // namespace mtl::cuda
