// The products of heads with hidden layers, for a chunk of rows, all tasks in one launch.
//
//   rows_kernel    forward A = H W^T + b, with activation and dropout; backward H' = A' W, times the slope of H
//   outer_kernel   parts of A'^T H, the gradients of the weights
//   bias_kernel    parts of the sums of the rows of A'
//
// What is stored as 16 bits is widened where it meets what is not: hidden units and their gradients are not rounded.
// Beside bfloat16 they are split into three of these, so that tensor cores can multiply them.
#pragma once

#include <type_traits>

#include "activations.cuh"
#include "gemm.cuh"
#include "heads_rows.cuh"
#include "products_wide.cuh"

namespace mtl::cuda {

template <class Sum>
using Exact = std::conditional_t<sizeof(Sum) == 8, Exact64, Exact32>;

// Blocks of a multiprocessor whose registers are enough for tiles of this size.
template <class Sum>
constexpr int blocks_of(int m, int n) {
  return m * n * static_cast<int>(sizeof(Sum)) > 64 * 64 * 4 ? 1 : 2;
}

// What becomes of a product.
enum class Finish : int {
  kKeep,      // to = product
  kNarrow,    // out = product, in the rows of x
  kActivate,  // to = units, slope = their slopes
  kMultiply,  // to *= product
};

template <class A, class W, class Sum>
struct RowsJob {
  ChunkRows chunk;
  View<A> a;
  bool of_x;  // a is x, not in scratch memory
  View<W> weight;
  const W* bias;
  int64_t bias_stride;
  LayerPlace layer;
  int64_t inputs;                   // of the layer
  int64_t input_step;               // columns from the inputs of one task to those of the next
  int64_t first_task;               // of blockIdx.y
  int64_t column_tiles, row_tiles;  // blockIdx.x
  Finish finish;
  Sum *to, *slope;  // slope: or null
  int64_t to_row;
  W* out;
  int64_t out_row;
  Units units;
};

template <class Engine, int M, int N, bool kBack>
using RowsShape = WideShape<Engine, M, N, false, kBack, kChunk>;
template <class B, class Sum, int M, int N>
using OuterShape = WideShape<WideEngine<B, Sum>, M, N, true, true, kChunk>;

// Where the tile of a block goes.
template <class A, class W, class Sum>
__device__ void finish_rows(const RowsJob<A, W, Sum>& job, const BlockRows& at, const Sum* result, int result_row,
                            int tile_columns, int64_t columns, int64_t column, int64_t to_column) {
  for (int i = static_cast<int>(threadIdx.x); i < at.rows * tile_columns; i += kThreads) {
    const int r = i / tile_columns, c = i % tile_columns;
    if (column + c >= columns) continue;
    const Sum v = result[r * result_row + c];
    const int64_t unit = column + c;
    if (job.finish == Finish::kNarrow) {
      job.out[job.chunk.source_row(at, r) * job.out_row + to_column + unit] = converted<W>(v);
      continue;
    }
    const int64_t place = (at.scratch + r) * job.to_row + to_column + unit;
    if (job.finish == Finish::kKeep) {
      job.to[place] = v;
    } else if (job.finish == Finish::kMultiply) {
      job.to[place] *= v;
    } else {
      Sum h, slope;
      activate<Sum>(job.units.act, v, h, slope);
      if (job.units.drops) {
        // A unit that is dropped is 0 whatever it was; a slope of it too.
        const bool stay =
            stays(job.units, job.chunk.source_row(at, r), at.task + unit / job.units.of_task, unit % job.units.of_task);
        const Sum scale = static_cast<Sum>(job.units.scale);
        h = stay && scale != Sum(0) ? h * scale : Sum(0);
        slope = stay && scale != Sum(0) ? slope * scale : Sum(0);
      }
      job.to[place] = h;
      if (job.slope) job.slope[place] = slope;
    }
  }
}

template <class Engine, class A, class W, class Sum, int M, int N, bool kBack>
__global__ void __launch_bounds__(kThreads, M* N > 8192 ? 1 : 2) rows_kernel(RowsJob<A, W, Sum> job) {
  using Shape = RowsShape<Engine, M, N, kBack>;
  MTL_DYNAMIC_SHARED(unsigned char, memory);
  const BlockRows at =
      job.chunk.template tile<M>(blockIdx.x / job.column_tiles, job.first_task + static_cast<int64_t>(blockIdx.y));
  if (at.rows == 0) return;
  const int64_t begin = job.layer.begin(at.task), width = job.layer.width(at.task);
  const int64_t column = blockIdx.x % job.column_tiles * N, columns = kBack ? job.inputs : width;
  const int64_t depth = kBack ? width : job.inputs;
  if (column >= columns) return;
  const bool routed = job.chunk.routed();
  const int64_t unit = routed ? 0 : begin, input = routed ? 0 : at.task * job.input_step;
  const RowsOf<A, !kBack> rows(job.a, job.of_x, job.chunk, at, kBack ? unit : input, depth);
  const View<W> weight = part_of(job.weight, begin, width, 0, job.inputs);
  const int64_t chunks = (depth + kChunk - 1) / kChunk;
  const auto load = [&](int64_t chunk) {
    const int64_t k = chunk * kChunk;
    rows.load(Shape::left(memory, chunk), Shape::kARow, 0, M, k, kChunk);
    load_tile(Shape::right(memory, chunk), Shape::kBRow, weight, kBack ? k : column, Shape::kBRows, kBack ? column : k,
              Shape::kBColumns);
  };
  Product<Engine, M, N, false, kBack> product;
  product.clear();
  each_chunk(int64_t(0), chunks, load, [&](int64_t chunk) {
    // Narrow heads are a short depth on the way back.
    const int64_t rest = depth - chunk * kChunk;
    product.add(Shape::left(memory, chunk), Shape::kARow, Shape::right(memory, chunk), Shape::kBRow,
                rest < kChunk ? round_up(static_cast<int>(rest), kStep) : kChunk);
  });
  Sum* const result = reinterpret_cast<Sum*>(memory);
  product.each([&](int r, int c, Sum v) {
    if (!kBack && job.bias && column + c < columns)
      v += converted<Sum>(job.bias[(begin + column + c) * job.bias_stride]);
    result[r * Shape::kOutRow + c] = v;
  });
  __syncthreads();
  finish_rows(job, at, result, Shape::kOutRow, N, columns, column, kBack ? input : unit);
}

template <class Engine, int M, int N, bool kBack, class A, class W, class Sum>
cudaError_t launch_rows(RowsJob<A, W, Sum> job, int64_t tasks, int64_t widest, cudaStream_t stream) {
  using Shape = RowsShape<Engine, M, N, kBack>;
  const auto kernel = rows_kernel<Engine, A, W, Sum, M, N, kBack>;
  const cudaError_t allowed = allow_shared(kernel, Shape::kShared);
  if (allowed != cudaSuccess) return allowed;
  job.column_tiles = (widest + N - 1) / N;
  job.row_tiles = job.chunk.pieces ? job.chunk.count * (kPieceRows / M) : (job.chunk.count + M - 1) / M;
  if (job.row_tiles > INT32_MAX / (job.column_tiles > 0 ? job.column_tiles : 1)) return cudaErrorInvalidConfiguration;
  constexpr int64_t kMost = 65535;
  for (int64_t t = 0; t < tasks; t += kMost) {
    job.first_task = t;
    const dim3 grid(static_cast<unsigned>(job.row_tiles * job.column_tiles),
                    static_cast<unsigned>(tasks - t < kMost ? tasks - t : kMost));
    const cudaError_t error = launch(kernel, grid, dim3(kThreads), Shape::kShared, stream, job);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// `tasks` of them, or 1 for routed rows; `widest`: the most columns of a task's result.
template <class Engine, bool kBack, bool kLarge, class A, class W, class Sum>
cudaError_t multiply_rows(const RowsJob<A, W, Sum>& job, int64_t tasks, int64_t widest, cudaStream_t stream) {
  // An element is one chain over the depth whatever tile it is in, so that no value depends on this.
  if constexpr (kLarge && sizeof(Sum) == 4)
    if (widest > 64 && (job.chunk.pieces || job.chunk.count > 64))
      return launch_rows<Engine, 128, 128, kBack>(job, tasks, widest, stream);
  if (widest <= 32) return launch_rows<Engine, 64, 32, kBack>(job, tasks, widest, stream);
  return launch_rows<Engine, 64, 64, kBack>(job, tasks, widest, stream);
}

// ---- Sums over rows: parts [items, part_size], a slice of the chunk's rows or a piece each. Unrouted, a part has the
// layer as it is packed; routed, the rows of one task.
template <class B, class Sum>
struct OuterJob {
  ChunkRows chunk;
  View<Sum> g;
  View<B> b;
  bool of_x;
  LayerPlace layer;
  int64_t inputs, input_step;
  int64_t first_task;               // of blockIdx.y
  int64_t row_tiles, column_tiles;  // blockIdx.x, with the items
  int64_t items;
  Sum* parts;
  int64_t part_size;
};

template <class Sum, class B, int M, int N>
__global__ void __launch_bounds__(kThreads, M* N > 8192 ? 1 : 2) outer_kernel(OuterJob<B, Sum> job) {
  using Shape = OuterShape<B, Sum, M, N>;
  MTL_DYNAMIC_SHARED(unsigned char, memory);
  const int64_t tiles = job.row_tiles * job.column_tiles, item = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const BlockRows at = job.chunk.item(item, job.items, job.first_task + static_cast<int64_t>(blockIdx.y));
  const bool routed = job.chunk.routed();
  if (routed && at.rows == 0) return;
  const int64_t begin = job.layer.begin(at.task), width = job.layer.width(at.task);
  const int64_t row = tile / job.column_tiles * M, column = tile % job.column_tiles * N;
  if (row >= width) return;
  const View<Sum> g = part_of(job.g, at.scratch, at.rows, routed ? 0 : begin, width);
  const RowsOf<B, true> b(job.b, job.of_x, job.chunk, at, routed ? 0 : at.task * job.input_step, job.inputs);
  const int chunks = (at.rows + kChunk - 1) / kChunk;
  const auto load = [&](int chunk) {
    load_tile(Shape::left(memory, chunk), Shape::kARow, g, chunk * kChunk, kChunk, row, M);
    b.load(Shape::right(memory, chunk), Shape::kBRow, chunk * kChunk, kChunk, column, N);
  };
  Product<WideEngine<B, Sum>, M, N, true, true> product;
  product.clear();
  each_chunk(int(0), chunks, load, [&](int chunk) {
    product.add(Shape::left(memory, chunk), Shape::kARow, Shape::right(memory, chunk), Shape::kBRow, kChunk);
  });
  Sum* const result = reinterpret_cast<Sum*>(memory);
  product.each([&](int r, int c, Sum v) { result[r * Shape::kOutRow + c] = v; });
  __syncthreads();
  const int rows = width - row < M ? static_cast<int>(width - row) : M;
  const int columns = job.inputs - column < N ? static_cast<int>(job.inputs - column) : N;
  store_tile(result, Shape::kOutRow, job.parts + item * job.part_size + (routed ? 0 : begin * job.inputs), job.inputs,
             row, rows, column, columns);
}

template <int M, int N, class B, class Sum>
cudaError_t launch_outer(OuterJob<B, Sum> job, int64_t tasks, int64_t widest, cudaStream_t stream) {
  using Shape = OuterShape<B, Sum, M, N>;
  const auto kernel = outer_kernel<Sum, B, M, N>;
  const cudaError_t allowed = allow_shared(kernel, Shape::kShared);
  if (allowed != cudaSuccess) return allowed;
  job.row_tiles = (widest + M - 1) / M;
  job.column_tiles = (job.inputs + N - 1) / N;
  const int64_t tiles = job.row_tiles * job.column_tiles;
  if (tiles == 0) return cudaSuccess;
  if (tiles > INT32_MAX / job.items) return cudaErrorInvalidConfiguration;
  constexpr int64_t kMost = 65535;
  for (int64_t t = 0; t < tasks; t += kMost) {
    job.first_task = t;
    const dim3 grid(static_cast<unsigned>(tiles * job.items),
                    static_cast<unsigned>(tasks - t < kMost ? tasks - t : kMost));
    const cudaError_t error = launch(kernel, grid, dim3(kThreads), Shape::kShared, stream, job);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// `widest`: the most units of a task.
template <bool kLarge, class B, class Sum>
cudaError_t outer_products(const OuterJob<B, Sum>& job, int64_t tasks, int64_t widest, cudaStream_t stream) {
  if constexpr (kLarge && sizeof(Sum) == 4)
    if (widest > 64 && job.inputs > 64) return launch_outer<128, 128>(job, tasks, widest, stream);
  if (widest <= 32) return launch_outer<32, 64>(job, tasks, widest, stream);
  return launch_outer<64, 64>(job, tasks, widest, stream);
}

// The same of a column of ones: 32 units a block, 8 rows at a time.
template <class Sum>
__global__ void __launch_bounds__(kThreads) bias_kernel(OuterJob<Sum, Sum> job) {
  __shared__ Sum sums[kWarps][33];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t item = blockIdx.x / job.column_tiles;
  const BlockRows at = job.chunk.item(item, job.items, job.first_task + static_cast<int64_t>(blockIdx.y));
  const bool routed = job.chunk.routed();
  if (routed && at.rows == 0) return;
  const int64_t begin = job.layer.begin(at.task), width = job.layer.width(at.task);
  const int64_t unit = blockIdx.x % job.column_tiles * 32 + lane;
  Sum sum = Sum(0);
  if (unit < width)
    for (int r = warp; r < at.rows; r += kWarps)
      sum += job.g.data[(at.scratch + r) * job.g.row_stride + (routed ? 0 : begin) + unit];
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || unit >= width) return;
  for (int w = 1; w < kWarps; ++w) sum += sums[w][lane];
  job.parts[item * job.part_size + (routed ? 0 : begin) + unit] = sum;
}
template <class Sum>
cudaError_t bias_sums(OuterJob<Sum, Sum> job, int64_t tasks, int64_t widest, cudaStream_t stream) {
  job.column_tiles = (widest + 31) / 32;
  if (job.column_tiles > INT32_MAX / job.items) return cudaErrorInvalidConfiguration;
  constexpr int64_t kMost = 65535;
  for (int64_t t = 0; t < tasks; t += kMost) {
    job.first_task = t;
    const dim3 grid(static_cast<unsigned>(job.column_tiles * job.items),
                    static_cast<unsigned>(tasks - t < kMost ? tasks - t : kMost));
    const cudaError_t error = launch(bias_kernel<Sum>, grid, dim3(kThreads), 0, stream, job);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// ---- Parts added in order to what is there.
template <class Sum>
__global__ void __launch_bounds__(kThreads) add_parts_kernel(const Sum* parts, int64_t count, int64_t size, Sum* sums) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= size) return;
  Sum sum = sums[i];
  for (int64_t p = 0; p < count; ++p) sum += parts[p * size + i];
  sums[i] = sum;
}
template <class Sum>
__global__ void __launch_bounds__(kThreads)
    add_wide_kernel(const Sum* parts, int64_t count, int64_t size, double* sums) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= size) return;
  double sum = sums[i];
  for (int64_t p = 0; p < count; ++p) sum += static_cast<double>(parts[p * size + i]);
  sums[i] = sum;
}
// Of the pieces [first, last), each to the rows of its task.
template <class Sum>
__global__ void __launch_bounds__(kThreads)
    add_pieces_kernel(const Sum* parts, int64_t part_size, const int64_t* piece_begin, int64_t tasks, int64_t first,
                      int64_t last, LayerPlace layer, int64_t inputs, Sum* sums) {
  for (int64_t t = blockIdx.y; t < tasks; t += gridDim.y) {
    const int64_t from = piece_begin[t] > first ? piece_begin[t] : first;
    const int64_t to = piece_begin[t + 1] < last ? piece_begin[t + 1] : last;
    if (from >= to) continue;
    const int64_t size = layer.width(t) * inputs, step = static_cast<int64_t>(gridDim.x) * kThreads;
    Sum* const own = sums + layer.begin(t) * inputs;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < size; i += step) {
      Sum sum = own[i];
      for (int64_t p = from; p < to; ++p) sum += parts[(p - first) * part_size + i];
      own[i] = sum;
    }
  }
}

}  // namespace mtl::cuda
