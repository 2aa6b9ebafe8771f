// Products of large matrices by PyTorch's own library, straight from its C functions: no dispatcher that autocast could
// listen to. They are in libtorch_cuda alone, and therefore weak, as in host.h. Where they are missing, as in
// emulation, callers take gemm.cuh.
#pragma once

#include "../common/dtype.h"
#include "host.h"

#ifndef MTL_EMULATE_CUDA
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_cuda_mm_out(AtenTensorHandle out, AtenTensorHandle a,
                                                            AtenTensorHandle b);
__attribute__((weak)) AOTITorchError aoti_torch_cuda_mm_dtype_out(AtenTensorHandle out, AtenTensorHandle a,
                                                                  AtenTensorHandle b, int32_t dtype);
__attribute__((weak)) AOTITorchError aoti_torch_cuda_addmm_out(AtenTensorHandle out, AtenTensorHandle bias,
                                                               AtenTensorHandle a, AtenTensorHandle b, double beta,
                                                               double alpha);
}
#endif

namespace mtl::cuda {

inline bool has_library() {
#ifdef MTL_EMULATE_CUDA
  return false;
#else
  return aoti_torch_cuda_mm_out != nullptr && aoti_torch_cuda_addmm_out != nullptr;
#endif
}

// A tensor over memory that belongs to another one of the same device.
inline Tensor tensor_over(const void* data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride,
                          ScalarType dtype, const Tensor& like) {
  const int64_t sizes[2] = {rows, cols}, strides[2] = {row_stride, col_stride};
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_create_tensor_from_blob(const_cast<void*>(data), 2, sizes, strides, 0,
                                         torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                                         device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

// out = a b, of the dtype of a, or float32. False: there is no such function.
inline bool library_product(const Tensor& a, const Tensor& b, Tensor& out) {
#ifdef MTL_EMULATE_CUDA
  static_cast<void>(a), static_cast<void>(b), static_cast<void>(out);
  return false;
#else
  if (out.scalar_type() == a.scalar_type()) {
    if (!aoti_torch_cuda_mm_out) return false;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_out(out.get(), a.get(), b.get()));
  } else {
    if (!aoti_torch_cuda_mm_dtype_out) return false;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_dtype_out(
        out.get(), a.get(), b.get(),
        torch::stable::detail::to<int32_t>(torch::stable::detail::from(out.scalar_type()))));
  }
  return true;
#endif
}

// out = a b + bias. False: there is no such function.
inline bool library_product(const Tensor& a, const Tensor& b, const Tensor& bias, Tensor& out) {
#ifdef MTL_EMULATE_CUDA
  static_cast<void>(a), static_cast<void>(b), static_cast<void>(bias), static_cast<void>(out);
  return false;
#else
  if (!aoti_torch_cuda_addmm_out) return false;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(out.get(), bias.get(), a.get(), b.get(), 1.0, 1.0));
  return true;
#endif
}

inline Tensor turned(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

}  // namespace mtl::cuda
