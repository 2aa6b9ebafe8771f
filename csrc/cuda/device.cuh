// What kernels are written in: CUDA's own names, and the instructions it has no name for. nvcc compiles them for a GPU;
// any other compiler, with MTL_EMULATE_CUDA, for the CPU, where emulation/ runs them (no CUDA toolkit is needed then).
//
//   launch, allow_shared            a kernel on a stream; its dynamic shared memory
//   BFloat16, Float16               16 bits, converted by to_float and from_float (to nearest, ties to even); pack
//   mma                             16 x 8 products on tensor cores, sums in float32
//   ldmatrix_x4, ldmatrix_x4_trans  four 8 x 8 matrices of 16-bit numbers from shared memory
//   cp_async_16, _commit, _wait     copies from global to shared memory that run beside the computation
//   sync_threads                    a barrier of some warps of a block
//
// Layouts of the fragments: PTX ISA, "Matrix multiply-accumulate operation using mma instruction".
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#else
#ifndef MTL_EMULATE_CUDA
#error "Kernels are compiled by nvcc, or with MTL_EMULATE_CUDA."
#endif
#include "emulation/launch.h"
#endif

namespace mtl::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct Tf32 {};

}  // namespace mtl::cuda

#ifdef __CUDACC__

// Of a parameter: its address can be taken, without a copy in every thread.
#define MTL_GRID_CONSTANT __grid_constant__
// Dynamic shared memory of the kernel as an array of T.
#define MTL_DYNAMIC_SHARED(T, name)                              \
  extern __shared__ __align__(16) unsigned char name##_memory[]; \
  T* const name = reinterpret_cast<T*>(name##_memory)

namespace mtl::cuda {

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                   Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  kernel<<<grid, block, shared, stream>>>(static_cast<Parameters>(arguments)...);
  return cudaGetLastError();
}
template <class Kernel>
cudaError_t allow_shared(Kernel* kernel, size_t bytes) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(bytes));
}

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(BFloat16 v) { return __uint_as_float(static_cast<uint32_t>(v.bits) << 16); }
__device__ inline float to_float(Float16 v) { return __half2float(__ushort_as_half(v.bits)); }
template <class T>
__device__ T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) {
  return v;
}
template <>
__device__ inline BFloat16 from_float<BFloat16>(float v) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(v))};
}
template <>
__device__ inline Float16 from_float<Float16>(float v) {
  return {__half_as_ushort(__float2half_rn(v))};
}
// Two numbers in 32 bits, the first one in the low half.
template <class T>
__device__ uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<BFloat16>(float low, float high) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&two);
}
template <>
__device__ inline uint32_t pack<Float16>(float low, float high) {
  const __half2 two = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&two);
}
// Within few units in the last place (the exponential within 2 + 1.2 |v|), where 16-bit logits are less exact anyway;
// an exponential below 2^-126 is 0.
__device__ inline float fast_exp(float v) {
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(v * 1.44269504f));
  return e;
}
__device__ inline float fast_log(float v) { return __logf(v); }
__device__ inline float fast_divide(float a, float b) { return __fdividef(a, b); }
__device__ inline uint32_t to_tf32(float v) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return bits;
}

#define MTL_MMA(shape, types)                                   \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." types  \
               ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "   \
               "{%0,%1,%2,%3};"                                 \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BFloat16) {
  MTL_MMA("m16n8k16", "bf16.bf16");
}
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Float16) {
  MTL_MMA("m16n8k16", "f16.f16");
}
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Tf32) {
  MTL_MMA("m16n8k8", "tf32.tf32");
}
#undef MTL_MMA

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
// Lanes 0 to 7 give the rows of the first matrix, 8 to 15 those of the second, ...: 16 bytes each, at 16 bytes.
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// 16 bytes, both addresses at multiples of it; zeros where there is nothing to copy. Visible to the thread after the
// wait that covers its group, to the others after a barrier behind that.
__device__ inline void cp_async_16(void* shared, const void* global, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(there ? 16 : 0)
               : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most kPending groups are on their way.
template <int kPending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Whole warps, `threads` of them in all, meet at one of the barriers 1 to 15.
__device__ inline void sync_threads(int barrier, int threads) {
  __syncwarp();  // a warp that came in parts would be counted as several
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace mtl::cuda

#else
#include "emulation/instructions.h"
#endif
