// Which products the element types take.
#pragma once

#include "../common/dtype.h"
#include "../common/precision.h"
#include "products.cuh"

namespace mtl::cuda {

// f(Engine{}). tf32: whether float32 may be rounded to it, where products are all that is computed.
template <class F>
auto with_engine(DType type, bool tf32, F f) {
  switch (type) {
    case DType::kFloat64:
      return f(Exact64{});
    case DType::kBFloat16:
      return f(TensorBFloat16{});
    case DType::kFloat16:
      return f(TensorFloat16{});
    default:
      return tf32 ? f(TensorTf32{}) : f(Exact32{});
  }
}

// The same for products that are never rounded to tf32.
template <class F>
auto with_own_engine(DType type, F f) {
  switch (type) {
    case DType::kFloat64:
      return f(Exact64{});
    case DType::kBFloat16:
      return f(TensorBFloat16{});
    case DType::kFloat16:
      return f(TensorFloat16{});
    default:
      return f(Exact32{});
  }
}

}  // namespace mtl::cuda
