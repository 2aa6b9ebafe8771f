// multiply_add_rate: GFLOP/s of the register tile on data in the first-level cache, on all threads together. The limit
// that benchmarks compare with, measured in the same run.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <chrono>
#include <cstring>

#include "../common/checks.h"
#include "buffer.h"
#include "isa.h"

namespace mtl {
namespace {

double multiply_add_rate(const Tensor& like, double seconds) {
  using Clock = std::chrono::steady_clock;
  const DType type = dtype_of(like, "like");
  const Kernels& k = kernels();
  constexpr int64_t kScratch = 64 << 10;
  const int64_t threads = torch::stable::get_num_threads();
  std::atomic<int64_t> done{0};
  const auto start = Clock::now();
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const Buffer scratch = make_buffer(kScratch);
    std::memset(scratch.get(), 0, kScratch);
    for (int64_t i = begin; i < end; ++i)
      while (std::chrono::duration<double>(Clock::now() - start).count() < seconds)
        done += k.multiply_adds(type, 200, scratch.get());
  });
  return 2e-9 * static_cast<double>(done.load()) / std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace
}  // namespace mtl

STABLE_TORCH_LIBRARY_IMPL(torch_mtl_pyg, CPU, m) { m.impl("multiply_add_rate", TORCH_BOX(&mtl::multiply_add_rate)); }
