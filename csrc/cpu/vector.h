// Vectors of the instruction set this file is compiled for, through the compiler's vector types (GCC, Clang): the same
// source serves SSE2, NEON, AVX2 and AVX-512, and wide vectors still run, slowly, where the CPU has only narrow ones.
//
// Included inside an unnamed namespace by kernels_impl.h. Nothing here may instantiate a function that another file
// could share (no standard library templates): the linker would keep one copy, possibly with instructions the CPU
// lacks.
#pragma once

#ifndef MTL_VECTOR_BYTES
#error "MTL_VECTOR_BYTES must be defined by the kernels_<isa>.cpp file"
#endif

#define MTL_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define MTL_NOINLINE __attribute__((noinline))
#define MTL_UNROLL _Pragma("clang loop unroll(full)")
#else
#define MTL_NOINLINE __attribute__((noinline, noclone))
#define MTL_UNROLL _Pragma("GCC unroll 16")
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(MTL_VECTOR_BYTES)));
  typedef T unaligned __attribute__((vector_size(MTL_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
  static constexpr int lanes = MTL_VECTOR_BYTES / sizeof(T);
};

template <class T>
using Vec = typename VectorOf<T>::type;

template <class T>
MTL_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}
template <class T>
MTL_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = v;
}

MTL_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
MTL_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// L lanes of another element type.
template <class T, int L>
struct Lanes {
  typedef T type __attribute__((vector_size(L * sizeof(T))));
  typedef T unaligned __attribute__((vector_size(L * sizeof(T)), aligned(sizeof(T)), may_alias));
};
