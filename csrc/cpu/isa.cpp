#include "isa.h"

#include <atomic>
#include <stdexcept>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace mtl {
namespace {

#if defined(__x86_64__)
bool cpu_has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1u);
}
// __builtin_cpu_supports also asks whether the operating system saves the registers.
bool cpu_has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cpu_has_f16c(); }
#ifdef MTL_EMULATE_AVX512
bool cpu_has_avx512() { return cpu_has_avx2(); }
bool cpu_has_avx512_bf16() { return cpu_has_avx2(); }
#else
bool cpu_has_avx512() {
  return cpu_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool cpu_has_avx512_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return cpu_has_avx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1u);
}
#endif
#endif

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found{kernels_baseline()};
#if defined(__x86_64__)
#ifndef MTL_WITHOUT_AVX2
  if (cpu_has_avx2()) found.push_back(kernels_avx2());
#endif
#ifndef MTL_WITHOUT_AVX512
  if (cpu_has_avx512()) found.push_back(kernels_avx512());
#endif
#ifndef MTL_WITHOUT_AVX512_BF16
  if (cpu_has_avx512_bf16()) found.push_back(kernels_avx512_bf16());
#endif
#endif
  return found;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> chosen{available().back()};
  return chosen;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

std::string isa() { return kernels().isa; }

std::string isas_available() {
  std::string names;
  for (const Kernels* k : available()) names += (names.empty() ? "" : ",") + std::string(k->isa);
  return names;
}

void set_isa(std::string name) {
  for (const Kernels* k : available())
    if (name == k->isa) {
      current().store(k, std::memory_order_relaxed);
      return;
    }
  throw std::runtime_error("instruction set: expected one of " + isas_available() + " on this CPU, got '" + name + "'");
}

}  // namespace mtl
