// Uninitialised scratch memory, aligned to a cache line; and large outputs.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace mtl {

struct FreeBuffer {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<void, FreeBuffer>;

inline Buffer make_buffer(int64_t bytes) {
  const int64_t rounded = (bytes + 64) / 64 * 64;
  void* p = std::aligned_alloc(64, static_cast<size_t>(rounded));
  if (p == nullptr) throw std::bad_alloc();
  return Buffer(p);
}

// Asks for large pages where the system leaves the choice to programs. The first write to a fresh page costs about as
// much as the products of the values on it; allocators give memory above 32 MiB back at each free, so every large
// output is fresh. Only a hint: what it cannot do, it does not.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE) && !defined(MTL_WITHOUT_HUGE_PAGES)
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  if (bytes < (int64_t(16) << 20)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace mtl
