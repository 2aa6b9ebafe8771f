// Launches: the blocks of a grid, shared out between threads of the system.
#pragma once

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <tuple>

#include "fibers.h"

namespace mtl::cuda {
namespace emulated {

constexpr size_t kSharedByDefault = 48 << 10, kMostShared = 227 << 10;

// How much dynamic shared memory each kernel was allowed.
inline std::map<void*, size_t>& allowed() {
  static std::map<void*, size_t> bytes;
  return bytes;
}
inline std::mutex& allowed_mutex() {
  static std::mutex mutex;
  return mutex;
}

// Blocks of former launches, kept for their stacks: threads end with each launch, and to map memory takes long.
class SpareBlocks {
 public:
  std::unique_ptr<Block> take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (blocks_.empty()) return std::make_unique<Block>();
    std::unique_ptr<Block> last = std::move(blocks_.back());
    blocks_.pop_back();
    return last;
  }
  void give(std::unique_ptr<Block> b) {
    const std::lock_guard<std::mutex> lock(mutex_);
    blocks_.push_back(std::move(b));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Block>> blocks_;
};
inline SpareBlocks& spare_blocks() {
  static SpareBlocks blocks;
  return blocks;
}

inline void run_blocks(dim3 grid, dim3 size, size_t shared, const std::function<void()>& body, int how,
                       std::atomic<int64_t>& next) {
  std::unique_ptr<Block> own = spare_blocks().take();
  Block& b = *own;
  b.grid = grid;
  b.size = size;
  b.body = body;
  const int threads = static_cast<int>(size.x * size.y * size.z);
  b.fibers.resize(threads);
  b.warps.resize((threads + kWarp - 1) / kWarp);
  while (static_cast<int>(b.stacks.size()) < threads) {
    void* const stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) stop("no memory for stacks");
    b.stacks.push_back(static_cast<char*>(stack));
  }
  for (int i = 0; i < threads; ++i) {
    Fiber& f = b.fibers[i];
    f.stack = b.stacks[i];
    f.index = i;
    f.thread = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
  }
  block = &b;
  const int64_t count = static_cast<int64_t>(grid.x) * grid.y * grid.z;
  for (int64_t i; (i = next.fetch_add(1)) < count;) {
    const int64_t at = how == 1 ? count - 1 - i : i;
    b.index = {static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
               static_cast<unsigned>(at / grid.x / grid.y)};
    // What a block finds in its shared memory is nothing to rely on: NaN in every type.
    b.shared.assign(shared + 16, static_cast<char>(0xff));
    run_block(b, how);
  }
  block = nullptr;
  fiber = nullptr;
  spare_blocks().give(std::move(own));
}

}  // namespace emulated

template <class Kernel>
cudaError_t allow_shared(Kernel* kernel, size_t bytes) {
  if (bytes > emulated::kMostShared) return cudaErrorInvalidValue;
  const std::lock_guard<std::mutex> lock(emulated::allowed_mutex());
  emulated::allowed()[reinterpret_cast<void*>(kernel)] = bytes;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 size, size_t shared, cudaStream_t,
                   Arguments... arguments) {
  using namespace emulated;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  size_t most = kSharedByDefault;
  {
    const std::lock_guard<std::mutex> lock(allowed_mutex());
    const auto found = allowed().find(reinterpret_cast<void*>(kernel));
    if (found != allowed().end()) most = std::max(most, found->second);
  }
  const int64_t threads = static_cast<int64_t>(size.x) * size.y * size.z;
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "parameters of a launch");
  if (threads < 1 || threads > kMostThreads || shared > most || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  const std::tuple<Parameters...> parameters(static_cast<Parameters>(arguments)...);
  const std::function<void()> body = [kernel, &parameters] { std::apply(kernel, parameters); };
  std::atomic<int64_t> next{0};
  const int how = order();
  const int64_t blocks = static_cast<int64_t>(grid.x) * grid.y * grid.z;
  const int64_t workers = std::min<int64_t>(blocks, std::max(1u, std::thread::hardware_concurrency()));
  std::vector<std::thread> others;
  for (int64_t w = 1; w < workers; ++w) others.emplace_back([&] { run_blocks(grid, size, shared, body, how, next); });
  run_blocks(grid, size, shared, body, how, next);
  for (std::thread& other : others) other.join();
  return cudaSuccess;
}

}  // namespace mtl::cuda

#define threadIdx (mtl::cuda::emulated::fiber->thread)
#define blockIdx (mtl::cuda::emulated::block->index)
#define blockDim (mtl::cuda::emulated::block->size)
#define gridDim (mtl::cuda::emulated::block->grid)

#define MTL_GRID_CONSTANT
#define MTL_DYNAMIC_SHARED(T, name) T* const name = reinterpret_cast<T*>(mtl::cuda::emulated::block->dynamic())
