#include "kernels.h"

#include "isa.h"

namespace pyprune {

extern const CpuKernels cpu_kernels_baseline;
#if defined(__x86_64__)
extern const CpuKernels cpu_kernels_avx2;
extern const CpuKernels cpu_kernels_avx512;
#endif

const CpuKernels& cpu_kernels() {
  static const CpuKernels& chosen = []() -> const CpuKernels& {
    switch (chosen_isa()) {
#if defined(__x86_64__)
      case Isa::avx512:
        return cpu_kernels_avx512;
      case Isa::avx2:
        return cpu_kernels_avx2;
#endif
      default:
        return cpu_kernels_baseline;
    }
  }();
  return chosen;
}

}  // namespace pyprune
