// scale_gradients: gradients that are ready, times a number that lies on the device. Nobody waits for that number, and
// where it is one nothing is read or written: the gradient of a total loss mostly is.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "engines.h"
#include "host.h"

namespace mtl::cuda {
namespace {

constexpr int kMost = 3;
template <class T>
struct Array {
  T* data;
  int64_t size;
};

// blockIdx.y: the array.
template <class T, class Sum>
__global__ void __launch_bounds__(kThreads) scale_kernel(Array<T> a, Array<T> b, Array<T> c, const Sum* factor) {
  const Sum by = *factor;
  if (by == Sum(1)) return;
  const Array<T> own = blockIdx.y == 0 ? a : blockIdx.y == 1 ? b : c;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < own.size; i += step)
    own.data[i] = converted<T>(converted<Sum>(own.data[i]) * by);
}

void scale_gradients(const std::vector<Tensor>& grads, const Tensor& factor) {
  const char* const name = "scale_gradients";
  STD_TORCH_CHECK(!grads.empty() && grads.size() <= kMost, "grads: expected 1 to ", kMost, " tensors, got ",
                  grads.size());
  const DType type = dtype_of(grads[0], "grads");
  for (const Tensor& grad : grads) {
    check_device(grad, "grads", grads[0]);
    STD_TORCH_CHECK(dtype_of(grad, "grads") == type && grad.is_contiguous(),
                    "grads: expected contiguous tensors of one dtype");
  }
  check_device(factor, "factor", grads[0]);
  STD_TORCH_CHECK(
      factor.numel() == 1 && dtype_of(factor, "factor") == (type == DType::kFloat64 ? type : DType::kFloat32),
      "factor: expected one number of the dtype of sums");
  const DeviceGuard guard(factor);
  check_launch(with_engine(type, false,
                           [&](auto engine) {
                             using T = typename decltype(engine)::Element;
                             using Sum = typename decltype(engine)::Sum;
                             Array<T> arrays[kMost]{};
                             int64_t largest = 0;
                             for (size_t i = 0; i < grads.size(); ++i) {
                               arrays[i] = {static_cast<T*>(grads[i].mutable_data_ptr()), grads[i].numel()};
                               largest = std::max(largest, grads[i].numel());
                             }
                             if (largest == 0) return cudaSuccess;
                             const int64_t wished = (largest + 8 * kThreads - 1) / (8 * kThreads);
                             const int64_t blocks = std::min<int64_t>(wished, 8 * multiprocessors(factor));
                             return launch(scale_kernel<T, Sum>,
                                           dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(grads.size())),
                                           dim3(kThreads), 0, stream_of(factor), arrays[0], arrays[1], arrays[2],
                                           static_cast<const Sum*>(factor.const_data_ptr()));
                           }),
               name);
}

}  // namespace
}  // namespace mtl::cuda

STABLE_TORCH_LIBRARY_IMPL(torch_mtl_pyg, MTL_CUDA_KEY, m) {
  m.impl("scale_gradients", TORCH_BOX(&mtl::cuda::scale_gradients));
}
