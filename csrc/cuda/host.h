// What host code of the .cu files shares: the dispatch key, the stream, checks, new tensors, launches that are looked
// at. Compiled by nvcc for tensors on a GPU, and with the emulator by the C++ compiler for CPU tensors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "../common/checks.h"
#include "tiles.cuh"

#ifdef MTL_EMULATE_CUDA
#define MTL_CUDA_KEY CPU
#else
#define MTL_CUDA_KEY CUDA
// In libtorch_cuda alone. Weak, so that one library loads with a torch for the CPU too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace mtl::cuda {

#ifdef MTL_EMULATE_CUDA
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#endif

// Whether kernels can read t.
inline bool on_device(const Tensor& t) { return kEmulated ? t.is_cpu() : t.is_cuda(); }

// `like`: the tensor whose device is that of the op; an op's first tensor is its own.
inline void check_device(const Tensor& t, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(on_device(t), name, kEmulated ? ": expected a CPU tensor" : ": expected a CUDA tensor");
  STD_TORCH_CHECK(t.get_device_index() == like.get_device_index(), name, ": expected a tensor on device ",
                  like.get_device_index(), ", got one on device ", t.get_device_index());
}

inline void check_device_matrix(const Tensor& t, const char* name, DType type, const Tensor& like) {
  check_device(t, name, like);
  STD_TORCH_CHECK(t.dim() == 2, name, ": expected a matrix, got ", t.dim(), " dimensions");
  STD_TORCH_CHECK(dtype_of(t, name) == type, name, ": expected the dtype of x, got another");
}

inline void check_device_vector(const Tensor& t, const char* name, DType type, const Tensor& like, int64_t size) {
  check_device(t, name, like);
  STD_TORCH_CHECK(t.dim() == 1, name, ": expected a vector, got ", t.dim(), " dimensions");
  STD_TORCH_CHECK(dtype_of(t, name) == type, name, ": expected the dtype of x, got another");
  STD_TORCH_CHECK(t.size(0) == size, name, ": expected ", size, " entries, got ", t.size(0));
}

inline void check_launch(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": CUDA error: ", cudaGetErrorString(error));
}

// The stream that is current for the device of t.
inline cudaStream_t stream_of(const Tensor& t) {
#ifdef MTL_EMULATE_CUDA
  static_cast<void>(t);
  return nullptr;
#else
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "The torch in this process has no CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
#endif
}

// Makes the device of t current while it lives.
class DeviceGuard {
 public:
#ifdef MTL_EMULATE_CUDA
  explicit DeviceGuard(const Tensor&) {}
  ~DeviceGuard() {}  // not trivial: a guard that is only declared is no unused variable
#else
  explicit DeviceGuard(const Tensor& t) : guard_(t.get_device_index()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// A contiguous tensor on the device of `like`. Through the C function itself, as in cpu/host.h.
inline Tensor empty_on(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(1, sizes[i])) strides[i] = stride;
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
                               like.get_device_index(), &handle));
  return Tensor(handle);
}

// Sets bytes of device memory to zero, in the order of the stream.
inline void clear(void* data, size_t bytes, cudaStream_t stream, const char* what) {
  if (bytes == 0) return;
#ifdef MTL_EMULATE_CUDA
  static_cast<void>(stream), static_cast<void>(what);
  std::memset(data, 0, bytes);
#else
  check_launch(cudaMemsetAsync(data, 0, bytes, stream), what);
#endif
}

// As empty_on, filled with zeros in the order of the stream that is current.
inline Tensor zeros_on(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  Tensor t = empty_on(like, sizes, dtype);
  clear(t.mutable_data_ptr(), static_cast<size_t>(t.numel()) * static_cast<size_t>(t.element_size()), stream_of(like),
        "zeros_on");
  return t;
}

// Waits for all that the stream has to do.
inline void synchronize(cudaStream_t stream, const char* what) {
#ifdef MTL_EMULATE_CUDA
  static_cast<void>(stream), static_cast<void>(what);  // launches return when they are done
#else
  check_launch(cudaStreamSynchronize(stream), what);
#endif
}

#ifdef MTL_EMULATE_CUDA
inline int multiprocessors(const Tensor&) { return 4; }
inline int64_t max_shared(const Tensor&) { return 227 << 10; }
#else
// Not kept: the runtime itself answers from memory, in less time than a lock would take.
inline int device_attribute(const Tensor& t, cudaDeviceAttr attribute) {
  int value = 0;
  check_launch(cudaDeviceGetAttribute(&value, attribute, t.get_device_index()), "cudaDeviceGetAttribute");
  return value;
}
inline int multiprocessors(const Tensor& t) { return device_attribute(t, cudaDevAttrMultiProcessorCount); }
// Bytes of shared memory a block may have once `allow_shared` has been called.
inline int64_t max_shared(const Tensor& t) { return device_attribute(t, cudaDevAttrMaxSharedMemoryPerBlockOptin); }
#endif

// A matrix as the kernels read it.
template <class T>
View<T> view(const Tensor& t) {
  return view_of<T>(t.const_data_ptr(), t.size(0), t.size(1), t.stride(0), t.stride(1));
}

}  // namespace mtl::cuda
