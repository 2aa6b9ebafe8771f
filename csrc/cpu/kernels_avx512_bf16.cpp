// AVX-512 with products of bfloat16 pairs.
#define MTL_VECTOR_BYTES 64
#define MTL_ISA_NAME "avx512_bf16"
#define MTL_BFLOAT16_PAIRS
#include "kernels_impl.h"

namespace mtl {
const Kernels* kernels_avx512_bf16() { return &kTable; }
}  // namespace mtl
