// Salience from bfloat16 activations on compute capability 9.0.

#include "activation_wgmma.cuh"

namespace pyprune {

cudaError_t launch_wgmma_bfloat16(Formula formula, const WgmmaJob& job, cudaStream_t stream) {
  return launch_pairs<__nv_bfloat16>(formula, job, stream);
}

}  // namespace pyprune
