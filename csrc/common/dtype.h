// The element types the kernels read and write. Kernels know nothing of torch; host code maps torch's ScalarType to
// this.
#pragma once

namespace mtl {

enum class DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// Sums are kept in float32, or in float64 for float64 inputs.
inline int accumulator_bytes(DType t) { return t == DType::kFloat64 ? 8 : 4; }
inline int element_bytes(DType t) { return t == DType::kFloat64 ? 8 : t == DType::kFloat32 ? 4 : 2; }

}  // namespace mtl
