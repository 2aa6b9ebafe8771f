// AVX2 + FMA + F16C.
#define MTL_VECTOR_BYTES 32
#define MTL_ISA_NAME "avx2"
#include "kernels_impl.h"

namespace mtl {
const Kernels* kernels_avx2() { return &kTable; }
}  // namespace mtl
