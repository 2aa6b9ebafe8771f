// Memory of a call on the device, and small data from the host.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "host.h"
#include "labels.cuh"

namespace mtl::cuda {

// What a chunk of rows may take. An emulated kernel can be given less, so that few rows make many chunks.
inline int64_t chunk_bytes() {
#ifdef MTL_EMULATE_CUDA
  if (const char* text = std::getenv("TORCH_MTL_PYG_EMULATE_CHUNK")) return std::max(1ll, std::atoll(text));
#endif
  return int64_t(64) << 20;
}

// Pieces of one tensor, each at a multiple of 256 bytes.
class Scratch {
 public:
  template <class T>
  void add(T** place, int64_t count) {
    wanted_.push_back({reinterpret_cast<void**>(place), bytes_});
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
  }
  void make(const Tensor& like) {
    memory_.emplace(empty_on(like, {bytes_}, ScalarType::Byte));
    char* const data = static_cast<char*>(memory_->mutable_data_ptr());
    for (const auto& [place, at] : wanted_) *place = data + at;
  }

 private:
  std::vector<std::pair<void**, int64_t>> wanted_;
  int64_t bytes_ = 0;
  std::optional<Tensor> memory_;
};

// Through the parameters of launches, which no host has to wait for, and which a graph can capture.
inline void send(const void* from, int64_t bytes, void* to, cudaStream_t stream, const char* what) {
  for (int64_t at = 0; at < bytes; at += kUploadBytes) {
    Upload part{};
    const int64_t size = std::min<int64_t>(kUploadBytes, bytes - at);
    std::memcpy(part.words, static_cast<const char*>(from) + at, size);
    check_launch(launch(upload_kernel, dim3(1), dim3(kThreads), 0, stream, part, static_cast<int>((size + 7) / 8),
                        reinterpret_cast<uint64_t*>(static_cast<char*>(to) + at)),
                 what);
  }
}

}  // namespace mtl::cuda
