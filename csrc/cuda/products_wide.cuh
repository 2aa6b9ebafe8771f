// Products of float32 with bfloat16 on tensor cores, without rounding the former: a float32 is the sum of three
// bfloat16 of 8 bits each, exactly, so that three products of bfloat16, summed in float32, are one of float32.
#pragma once

#include <type_traits>

#include "products.cuh"

namespace mtl::cuda {

// A: float32; B: bfloat16.
struct TensorWide {
  using Element = float;
  using Sum = float;
};

// What multiplies numbers of type Sum with stored ones of type T.
template <class T, class Sum>
using WideEngine =
    std::conditional_t<sizeof(Sum) == 8, Exact64, std::conditional_t<std::is_same_v<T, BFloat16>, TensorWide, Exact32>>;

// Two numbers as three words of two bfloat16. Cut, not rounded: what is left has 8 bits less, and nothing overflows.
__device__ inline void split(float first, float second, uint32_t& high, uint32_t& middle, uint32_t& low) {
  const auto rest = [](float v, float cut) {
    // An infinity has no rest; a NaN keeps one, should its high half look like an infinity.
    return (__float_as_uint(v) & 0x7fffffffu) == 0x7f800000u ? 0.0f : v - cut;
  };
  const auto upper = [](float v) { return __uint_as_float(__float_as_uint(v) & 0xffff0000u); };
  const auto pair = [](float a, float b) { return __float_as_uint(a) >> 16 | (__float_as_uint(b) & 0xffff0000u); };
  high = pair(first, second);
  const float first_rest = rest(first, upper(first)), second_rest = rest(second, upper(second));
  middle = pair(first_rest, second_rest);
  low = pair(first_rest - upper(first_rest), second_rest - upper(second_rest));
}

template <int M, int N, bool kTransposedA, bool kTransposedB>
struct Product<TensorWide, M, N, kTransposedA, kTransposedB> : Fragments<M, N> {
  using Base = Fragments<M, N>;
  using Element = float;
  using Sum = float;
  using Base::kColumns;
  using Base::kRows;
  using Base::sum;

  __device__ void add(const float* a, int a_row, const BFloat16* b, int b_row, int depth) {
    const int lane = Base::lane(), quarter = lane / 8, in_quarter = lane % 8;
    const int row = Base::first_row() + lane / 4, column = Base::first_column(), pair = lane % 4 * 2;
    for (int k = 0; k < depth; k += 16) {
      uint32_t left[3][kRows][4];
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const int m = row + i * 16 + q % 2 * 8, p = k + pair + q / 2 * 8;
          const Two two = two_of(a, a_row, m, p);
          split(two.v[0], two.v[1], left[0][i][q], left[1][i][q], left[2][i][q]);
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
        for (int part = 2; part >= 0; --part)
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
            mma(sum[i][j], left[part][i], first, BFloat16{});
            mma(sum[i][j + 1], left[part][i], second, BFloat16{});
          }
      }
    }
  }

 private:
  struct alignas(8) Two {
    float v[2];
  };
  // Two neighbours along the depth in row m of A.
  static __device__ Two two_of(const float* a, int a_row, int m, int p) {
    if constexpr (kTransposedA)
      return {{a[p * a_row + m], a[(p + 1) * a_row + m]}};
    else
      return *reinterpret_cast<const Two*>(a + m * a_row + p);
  }
};

// ---- Tiles in shared memory, where A and B may be of different types.
template <class Engine>
struct RightOf {
  using Element = typename Engine::Element;
};
template <>
struct RightOf<TensorWide> {
  using Element = BFloat16;
};

template <class Engine, int M, int N, bool kTransposedA, bool kTransposedB, int kDepth>
struct WideShape {
  using Left = typename Engine::Element;
  using Right = typename RightOf<Engine>::Element;
  using Sum = typename Engine::Sum;
  static constexpr int kARows = kTransposedA ? kDepth : M, kAColumns = kTransposedA ? M : kDepth;
  static constexpr int kBRows = kTransposedB ? kDepth : N, kBColumns = kTransposedB ? N : kDepth;
  // Pairs of float32 in four rows lie in different banks where rows are 8 numbers more than whole lines.
  static constexpr bool kPairs = std::is_same_v<Engine, TensorWide> && !kTransposedA;
  static constexpr int kARow = kPairs ? kAColumns + 8 : row_of<Left>(kAColumns), kBRow = row_of<Right>(kBColumns);
  static constexpr int kOutRow = row_of<Sum>(N);
  static constexpr size_t kA = kARows * kARow * sizeof(Left), kStage = kA + kBRows * kBRow * sizeof(Right);
  static constexpr size_t kResult = M * kOutRow * sizeof(Sum);
  static constexpr size_t kShared = 2 * kStage > kResult ? 2 * kStage : kResult;
  static_assert(kA % 16 == 0 && kStage % 16 == 0, "tiles begin at 16 bytes");

  static __device__ Left* left(unsigned char* memory, int64_t stage) {
    return reinterpret_cast<Left*>(memory + stage % 2 * kStage);
  }
  static __device__ Right* right(unsigned char* memory, int64_t stage) {
    return reinterpret_cast<Right*>(memory + stage % 2 * kStage + kA);
  }
};

}  // namespace mtl::cuda
