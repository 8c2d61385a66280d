// Which of the compiled instruction sets this processor runs.
#pragma once

#include <cstdlib>
#include <cstring>

namespace pyprune {

enum class Isa { baseline = 0, avx2 = 1, avx512 = 2 };

constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512"};

inline Isa widest_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // Every processor with these two has F16C, which older compilers do not know by name.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::baseline;
#else
  return Isa::baseline;
#endif
}

// PYPRUNE_CPU_ISA may name a narrower set than the processor has, to compare them; a wider one is not taken.
inline Isa chosen_isa() {
  const Isa widest = widest_isa();
  const char* wanted = std::getenv("PYPRUNE_CPU_ISA");
  for (int i = 0; wanted != nullptr && i <= static_cast<int>(widest); ++i) {
    if (std::strcmp(wanted, kIsaNames[i]) == 0) return static_cast<Isa>(i);
  }
  return widest;
}

}  // namespace pyprune
