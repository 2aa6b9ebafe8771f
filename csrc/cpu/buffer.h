// Uninitialised scratch memory, aligned to a cache line.
#pragma once

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

}  // namespace mtl
