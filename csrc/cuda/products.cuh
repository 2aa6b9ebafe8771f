// Products of two tiles in shared memory, their sums in registers, by a block of 256 threads: on tensor cores, or by
// plain multiply-adds where those would not be exact.
//
// Product<Engine, M, N, kTransposedA, kTransposedB> adds A [M, depth] * B [depth, N]. A lies in rows of depth, or, if
// transposed, of M; B in rows of N if "transposed" is true, or, as a weight matrix does, of depth. Both begin at 16
// bytes, and so do their rows; the depth is a multiple of 16, and what lies beyond a matrix is zero.
#pragma once

#include "device.cuh"

namespace mtl::cuda {

constexpr int kThreads = 256, kWarps = kThreads / 32;
// Depths and widths of tiles in shared memory are multiples of this.
constexpr int kStep = 16;

// Element: what lies in shared memory. Rows are padded by 16 bytes, an odd number of 16-byte units then, so that eight
// rows of one column lie in different banks.
struct Exact32 {
  using Element = float;
  using Sum = float;
};
struct Exact64 {
  using Element = double;
  using Sum = double;
};
struct TensorTf32 {
  using Element = float;
  using Sum = float;
};
struct TensorBFloat16 {
  using Element = BFloat16;
  using Sum = float;
};
struct TensorFloat16 {
  using Element = Float16;
  using Sum = float;
};

__host__ __device__ constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }
template <class Element>
__host__ __device__ constexpr int row_of(int columns) {
  return round_up(columns, kStep) + 16 / static_cast<int>(sizeof(Element));
}

template <class T>
struct alignas(16) Four {
  T v[4];
};

// ---- Plain multiply-adds: thread (y, x) of kHigh x kWide has every kHigh-th row and every kWide-th column. Long tiles
// have as many threads along them as make a thread's own tile square, which reads least for its multiply-adds. A warp
// has 4 x 8 threads, since its reads are as long as the different numbers in them, and neighbours in a column are
// neighbours in the warp.
template <class Engine, int M, int N, bool kTransposedA, bool kTransposedB>
struct Product {
  using Element = typename Engine::Element;
  using Sum = typename Engine::Sum;
  static constexpr int kWide = M >= 4 * N ? 8 : N >= 4 * M ? 32 : 16, kHigh = kThreads / kWide;
  static constexpr int kRows = M / kHigh, kColumns = N / kWide;
  static_assert(M % kHigh == 0 && N % kWide == 0, "every thread has as much");
  // Four neighbours are read at once where the tile's rows run along them.
  static constexpr bool kFourRows = kTransposedA && kRows % 4 == 0, kFourColumns = kTransposedB && kColumns % 4 == 0;

  Sum sum[kRows][kColumns];

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sum[i][j] = Sum(0);
  }
  static __device__ int row(int i) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    const int y = thread / (4 * kWide) * 4 + lane / 16 * 2 + lane % 2;
    return kFourRows ? i / 4 * 4 * kHigh + y * 4 + i % 4 : i * kHigh + y;
  }
  static __device__ int column(int j) {
    const int thread = static_cast<int>(threadIdx.x);
    const int x = thread / 32 % (kWide / 8) * 8 + thread % 16 / 2;
    return kFourColumns ? j / 4 * 4 * kWide + x * 4 + j % 4 : j * kWide + x;
  }
  __device__ void add(const Element* a, int a_row, const Element* b, int b_row, int depth) {
    for (int k = 0; k < depth; k += 4) {
      Element left[4][kRows], right[4][kColumns];
      if constexpr (kTransposedA) {
#pragma unroll
        for (int p = 0; p < 4; ++p) run<kRows, kFourRows>(a + (k + p) * a_row, [](int i) { return row(i); }, left[p]);
      } else {
        turn<kRows>(a + k, a_row, [](int i) { return row(i); }, left);
      }
      if constexpr (kTransposedB) {
#pragma unroll
        for (int p = 0; p < 4; ++p)
          run<kColumns, kFourColumns>(b + (k + p) * b_row, [](int j) { return column(j); }, right[p]);
      } else {
        turn<kColumns>(b + k, b_row, [](int j) { return column(j); }, right);
      }
#pragma unroll
      for (int p = 0; p < 4; ++p)
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
          for (int j = 0; j < kColumns; ++j) sum[i][j] += left[p][i] * right[p][j];
    }
  }
  // f(row, column, sum) of all that this thread has.
  template <class F>
  __device__ void each(F f) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) f(row(i), column(j), sum[i][j]);
  }
  // Straight to global memory, the first `rows` rows and `columns` columns: four neighbours at once where all rows
  // begin at 16 bytes, and eight threads write 128 bytes of a row then.
  __device__ void store(Element* out, int64_t out_row, int rows, int columns) const {
    static_assert(kFourColumns && sizeof(Element) == sizeof(Sum));
    const bool aligned = reinterpret_cast<uintptr_t>(out) % 16 == 0 && out_row % 4 == 0 && columns % 4 == 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; j += 4) {
        Element* const to = out + row(i) * out_row + column(j);
        if (row(i) >= rows || column(j) >= columns) continue;
        if (aligned) {
          *reinterpret_cast<Four<Element>*>(to) = {sum[i][j], sum[i][j + 1], sum[i][j + 2], sum[i][j + 3]};
          continue;
        }
#pragma unroll
        for (int q = 0; q < 4; ++q)
          if (column(j) + q < columns) to[q] = sum[i][j + q];
      }
  }

 private:
  template <int kCount, bool kFour, class At>
  static __device__ void run(const Element* from, At at, Element (&to)[kCount]) {
    if constexpr (kFour) {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        const Four<Element> four = *reinterpret_cast<const Four<Element>*>(from + at(i));
#pragma unroll
        for (int q = 0; q < 4; ++q) to[i + q] = four.v[q];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) to[i] = from[at(i)];
    }
  }
  template <int kCount, class At>
  static __device__ void turn(const Element* from, int from_row, At at, Element (&to)[4][kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Four<Element> four = *reinterpret_cast<const Four<Element>*>(from + at(i) * from_row);
#pragma unroll
      for (int p = 0; p < 4; ++p) to[p][i] = four.v[p];
    }
  }
};

// ---- Tensor cores: kCount warps of 16 rows or more, and fragments of 16 x 8.
template <int M, int N, int kCount = kWarps>
struct Fragments {
  static constexpr int kWarpRows = M / 16 < 4 ? M / 16 : 4, kWarpColumns = kCount / kWarpRows;
  static constexpr int kHigh = M / kWarpRows, kWide = N / kWarpColumns;  // of a warp
  static constexpr int kRows = kHigh / 16, kColumns = kWide / 8;
  static_assert(kHigh % 16 == 0 && kWide % 16 == 0, "a warp has whole fragments, two side by side");

  float sum[kRows][kColumns][4];

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
#pragma unroll
        for (int q = 0; q < 4; ++q) sum[i][j][q] = 0.0f;
  }
  static __device__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  static __device__ int first_row() { return static_cast<int>(threadIdx.x) / 32 / kWarpColumns * kHigh; }
  static __device__ int first_column() { return static_cast<int>(threadIdx.x) / 32 % kWarpColumns * kWide; }
  template <class F>
  __device__ void each(F f) {
    const int row = first_row() + lane() / 4, column = first_column() + lane() % 4 * 2;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
#pragma unroll
        for (int q = 0; q < 4; ++q) f(row + i * 16 + q / 2 * 8, column + j * 8 + q % 2, sum[i][j][q]);
  }
};

// 16-bit numbers: 16 deep, the fragments by ldmatrix.
template <class Bits, int M, int N, bool kTransposedA, bool kTransposedB, int kCount = kWarps>
struct Product16 : Fragments<M, N, kCount> {
  using Base = Fragments<M, N, kCount>;
  using Element = Bits;
  using Sum = float;
  using Base::kColumns;
  using Base::kRows;
  using Base::sum;

  __device__ void add(const Element* a, int a_row, const Element* b, int b_row, int depth) {
    const int lane = Base::lane(), quarter = lane / 8, in_quarter = lane % 8;
    const int row = Base::first_row(), column = Base::first_column();
#pragma unroll 1  // two steps at once cost registers, and gain nothing with eight products in flight
    for (int k = 0; k < depth; k += 16) {
      uint32_t left[kRows][4];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int m = row + i * 16;
        if constexpr (kTransposedA)
          ldmatrix_x4_trans(left[i], a + (k + in_quarter + quarter / 2 * 8) * a_row + m + quarter % 2 * 8);
        else
          ldmatrix_x4(left[i], a + (m + lane % 16) * a_row + k + lane / 16 * 8);
      }
#pragma unroll
      for (int j = 0; j < kColumns; j += 2) {
        const int n = column + j * 8;
        uint32_t right[4];
        if constexpr (kTransposedB)
          ldmatrix_x4_trans(right, b + (k + in_quarter + quarter % 2 * 8) * b_row + n + quarter / 2 * 8);
        else
          ldmatrix_x4(right, b + (n + in_quarter + quarter / 2 * 8) * b_row + k + quarter % 2 * 8);
        const uint32_t first[2] = {right[0], right[1]}, second[2] = {right[2], right[3]};
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          mma(sum[i][j], left[i], first, Bits{});
          mma(sum[i][j + 1], left[i], second, Bits{});
        }
      }
    }
  }
};
template <int M, int N, bool kTransposedA, bool kTransposedB>
struct Product<TensorBFloat16, M, N, kTransposedA, kTransposedB>
    : Product16<BFloat16, M, N, kTransposedA, kTransposedB> {};
template <int M, int N, bool kTransposedA, bool kTransposedB>
struct Product<TensorFloat16, M, N, kTransposedA, kTransposedB> : Product16<Float16, M, N, kTransposedA, kTransposedB> {
};

// float32 rounded to tf32, 8 deep. ldmatrix moves 16-bit numbers, so that a transposed tile has to be read one by one.
template <int M, int N, bool kTransposedA, bool kTransposedB>
struct Product<TensorTf32, M, N, kTransposedA, kTransposedB> : Fragments<M, N> {
  using Base = Fragments<M, N>;
  using Element = float;
  using Sum = float;
  using Base::kColumns;
  using Base::kRows;
  using Base::sum;

  __device__ void add(const float* a, int a_row, const float* b, int b_row, int depth) {
    const int group = Base::lane() / 4, in_group = Base::lane() % 4;
    const int row = Base::first_row() + group, column = Base::first_column() + group;
    for (int k = in_group; k < depth; k += 8) {
      uint32_t left[kRows][4];
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const int m = row + i * 16 + q % 2 * 8, p = k + q / 2 * 4;
          left[i][q] = to_tf32(kTransposedA ? a[p * a_row + m] : a[m * a_row + p]);
        }
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int n = column + j * 8;
        uint32_t right[2];
#pragma unroll
        for (int q = 0; q < 2; ++q)
          right[q] = to_tf32(kTransposedB ? b[(k + q * 4) * b_row + n] : b[n * b_row + k + q * 4]);
#pragma unroll
        for (int i = 0; i < kRows; ++i) mma(sum[i][j], left[i], right, Tf32{});
      }
    }
  }
};

}  // namespace mtl::cuda
