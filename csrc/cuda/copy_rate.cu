// copy_rate: GB/s read and written by a copy in the GPU's memory. The limit that benchmarks compare with, measured in
// the same run. Unlike the other ops it waits for the GPU.
#include <torch/csrc/stable/library.h>

#include <chrono>
#include <cmath>

#include "host.h"

namespace mtl::cuda {
namespace {

// Several times the second-level cache.
constexpr int64_t kWords = (kEmulated ? int64_t{1} << 16 : int64_t{256} << 20) / sizeof(int4);

__global__ void __launch_bounds__(kThreads) copy_kernel(const int4* in, int4* out, int64_t words) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < words; i += step) out[i] = in[i];
}

double copy_rate(const Tensor& like, double seconds) {
  using Clock = std::chrono::steady_clock;
  const char* const name = "copy_rate";
  check_device(like, "like", like);
  STD_TORCH_CHECK(std::isfinite(seconds) && seconds >= 0, "seconds: expected a number from 0 on, got ", seconds);
  const DeviceGuard guard(like);
  const cudaStream_t stream = stream_of(like);
  const int64_t bytes = kWords * static_cast<int64_t>(sizeof(int4));
  const Tensor in = zeros_on(like, {bytes}, ScalarType::Byte);
  Tensor out = empty_on(like, {bytes}, ScalarType::Byte);
  const dim3 grid(static_cast<unsigned>(multiprocessors(like) * 8));
  const auto copy = [&](int times) {
    for (int i = 0; i < times; ++i)
      check_launch(launch(copy_kernel, grid, dim3(kThreads), 0, stream, static_cast<const int4*>(in.const_data_ptr()),
                          static_cast<int4*>(out.mutable_data_ptr()), kWords),
                   name);
    synchronize(stream, name);
  };
  copy(1);
  constexpr int kTimes = kEmulated ? 1 : 16;  // launches that hide the wait
  int64_t done = 0;
  double elapsed = 0;
  const auto start = Clock::now();
  do {
    copy(kTimes);
    done += kTimes;
    elapsed = std::chrono::duration<double>(Clock::now() - start).count();
  } while (elapsed < seconds);
  return 2e-9 * static_cast<double>(bytes) * static_cast<double>(done) / elapsed;
}

}  // namespace
}  // namespace mtl::cuda

STABLE_TORCH_LIBRARY_IMPL(torch_mtl_pyg, MTL_CUDA_KEY, m) { m.impl("copy_rate", TORCH_BOX(&mtl::cuda::copy_rate)); }
