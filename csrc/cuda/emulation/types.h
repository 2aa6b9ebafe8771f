// CUDA's types and words for a compiler that does not know them.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>

#include <cstddef>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// Blocks run one after the other in a thread of the system.
#define __shared__ static thread_local

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) int4 {
  int x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess             ? "no error"
         : error == cudaErrorInvalidValue ? "invalid argument"
                                          : "invalid configuration argument";
}

namespace mtl::cuda::emulated {

template <class To, class From>
To bits_as(From v) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  std::memcpy(&to, &v, sizeof(To));
  return to;
}

}  // namespace mtl::cuda::emulated

inline float __uint_as_float(unsigned v) { return mtl::cuda::emulated::bits_as<float>(v); }
inline unsigned __float_as_uint(float v) { return mtl::cuda::emulated::bits_as<unsigned>(v); }
inline double __longlong_as_double(long long v) { return mtl::cuda::emulated::bits_as<double>(v); }
