// Products of float32 with bfloat16 on tensor cores, without rounding the former: a float32 is the sum of three
// bfloat16 of 8 bits each, exactly, so that three products of bfloat16, summed in float32, are one of float32.
#pragma once

#include <type_traits>

#include "products.cuh"

namespace mtl::cuda {

// A: any numbers; B: what bfloat16 can hold. Both lie as float32 in shared memory.
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

  // The depth may be taken in any order that A and B share: four neighbours in one load where both lie in rows of it,
  // else pairs that lie in different banks.
  static __device__ int depth_of(int in_group, int i) {
    return !kTransposedA && !kTransposedB ? in_group * 4 + i : in_group * 2 + i % 2 + i / 2 * 8;
  }
  __device__ void add(const float* a, int a_row, const float* b, int b_row, int depth) {
    const int group = Base::lane() / 4, in_group = Base::lane() % 4;
    const int row = Base::first_row() + group, column = Base::first_column() + group;
    for (int k = 0; k < depth; k += 16) {
      uint32_t left[3][kRows][4];
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int low = 0; low < 2; ++low) {
          float v[4];
          read<kTransposedA>(a, a_row, row + i * 16 + low * 8, k, in_group, v);
#pragma unroll
          for (int p = 0; p < 2; ++p)
            split(v[p * 2], v[p * 2 + 1], left[0][i][p * 2 + low], left[1][i][p * 2 + low], left[2][i][p * 2 + low]);
        }
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        float v[4];
        read<kTransposedB>(b, b_row, column + j * 8, k, in_group, v);
        uint32_t right[2];
#pragma unroll
        for (int p = 0; p < 2; ++p)
          right[p] = __float_as_uint(v[p * 2]) >> 16 | (__float_as_uint(v[p * 2 + 1]) & 0xffff0000u);
#pragma unroll
        for (int part = 2; part >= 0; --part)
#pragma unroll
          for (int i = 0; i < kRows; ++i) mma(sum[i][j], left[part][i], right, BFloat16{});
      }
    }
  }

 private:
  // Four numbers along the depth of one row of A or column of B.
  template <bool kTransposed>
  static __device__ void read(const float* tile, int tile_row, int at, int k, int in_group, float (&v)[4]) {
    if constexpr (kTransposed) {
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = tile[(k + depth_of(in_group, i)) * tile_row + at];
    } else if constexpr (!kTransposedA && !kTransposedB) {
      const Four<float> four = *reinterpret_cast<const Four<float>*>(tile + at * tile_row + k + in_group * 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = four.v[i];
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = tile[at * tile_row + k + depth_of(in_group, i)];
    }
  }
};

}  // namespace mtl::cuda
