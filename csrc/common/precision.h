// How exact products of float32 have to be: a setting of the process, as in PyTorch.
#pragma once

#include <atomic>

namespace mtl {

// Whether tensor cores may round their operands to tf32, which keeps 10 bits after the leading one.
inline std::atomic<bool> tf32_allowed{false};

}  // namespace mtl
