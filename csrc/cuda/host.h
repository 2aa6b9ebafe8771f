// What the host code of the ops on CUDA shares: checks, memory, streams. Emulated, tensors are those of the CPU.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "../common/checks.h"
#include "tiles.cuh"

#ifdef MTL_EMULATE_CUDA
#define MTL_CUDA_KEY CPU
#else
#define MTL_CUDA_KEY CUDA
// Weak: a torch without CUDA does not have it, and loads the same library.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                  void** ret_stream);
#endif

namespace mtl::cuda {

#ifdef MTL_EMULATE_CUDA
constexpr bool kEmulated = true;
inline cudaStream_t stream_of(const Tensor&) { return nullptr; }
struct DeviceGuard {
  explicit DeviceGuard(const Tensor&) {}
};
inline bool on_device(const Tensor& t) { return t.is_cpu(); }
inline int64_t multiprocessors(const Tensor&) { return 3; }
inline int64_t max_shared(const Tensor&) { return emulated::kMostShared; }
#else
constexpr bool kEmulated = false;
inline cudaStream_t stream_of(const Tensor& t) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "torch: expected a build with CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}
struct DeviceGuard : torch::stable::accelerator::DeviceGuard {
  explicit DeviceGuard(const Tensor& t) : torch::stable::accelerator::DeviceGuard(t.get_device_index()) {}
};
inline bool on_device(const Tensor& t) { return t.is_cuda(); }
inline int64_t attribute(const Tensor& t, cudaDeviceAttr which) {
  int value = 0;
  STD_TORCH_CHECK(cudaDeviceGetAttribute(&value, which, t.get_device_index()) == cudaSuccess,
                  "CUDA: the device's attributes cannot be read");
  return value;
}
inline int64_t multiprocessors(const Tensor& t) { return attribute(t, cudaDevAttrMultiProcessorCount); }
inline int64_t max_shared(const Tensor& t) { return attribute(t, cudaDevAttrMaxSharedMemoryPerBlockOptin); }
#endif

inline void check_launch(cudaError_t error, const char* op) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": a kernel could not be launched: ", cudaGetErrorString(error));
}

inline void check_device_matrix(const Tensor& t, const char* name, DType type, const Tensor& x) {
  STD_TORCH_CHECK(on_device(t) && beside(t, x), name, ": expected a tensor on the device of x");
  STD_TORCH_CHECK(t.dim() == 2, name, ": expected a matrix, got ", t.dim(), " dimensions");
  STD_TORCH_CHECK(dtype_of(t, name) == type, name, ": expected the dtype of x, got another");
}
inline void check_device_vector(const Tensor& t, const char* name, DType type, const Tensor& x, int64_t size) {
  STD_TORCH_CHECK(on_device(t) && beside(t, x) && t.dim() == 1 && dtype_of(t, name) == type, name,
                  ": expected a vector of the dtype of x, on its device");
  STD_TORCH_CHECK(t.size(0) == size, name, ": size of dimension 0: expected ", size, ", got ", t.size(0));
}

// A new contiguous tensor of at most two dimensions on the device of another.
inline Tensor empty_on(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  int64_t strides[2] = {1, 1};
  if (sizes.size() == 2) strides[0] = sizes[1] > 1 ? sizes[1] : 1;
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  const int32_t kind = kEmulated ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda();
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides,
                                                         type, kind, kEmulated ? 0 : like.get_device_index(),
                                                         &handle));
  return Tensor(handle);
}

// A matrix as the kernels read it.
template <class T>
View<T> view(const Tensor& t) {
  return view_of<T>(t.const_data_ptr(), t.size(0), t.size(1), t.stride(0), t.stride(1));
}

}  // namespace mtl::cuda
