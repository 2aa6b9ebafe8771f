// AVX-512 F, BW, VL, DQ.
#define MTL_VECTOR_BYTES 64
#define MTL_ISA_NAME "avx512"
#include "kernels_impl.h"

namespace mtl {
const Kernels* kernels_avx512() { return &kTable; }
}  // namespace mtl
