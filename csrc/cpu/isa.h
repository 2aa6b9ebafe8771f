// Which instruction set's kernels run: the best the CPU has, unless set_isa() asks for another.
#pragma once

#include <string>

#include "kernels.h"

namespace mtl {

const Kernels& kernels();
std::string isa();
// Comma-separated, from the least to the best.
std::string isas_available();
// Throws std::runtime_error that names the instruction sets available.
void set_isa(std::string name);

}  // namespace mtl
