// For any CPU of the architecture: SSE2 on x86-64, NEON on 64-bit Arm.
#define MTL_VECTOR_BYTES 16
#define MTL_ISA_NAME "baseline"
#include "kernels_impl.h"

namespace mtl {
const Kernels* kernels_baseline() { return &kTable; }
}  // namespace mtl
