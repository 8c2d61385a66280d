// Salience from float16 activations on compute capability 9.0.

#include "activation_wgmma.cuh"

namespace pyprune {

cudaError_t launch_wgmma_float16(Formula formula, const WgmmaJob& job, cudaStream_t stream) {
  return launch_pairs<__half>(formula, job, stream);
}

}  // namespace pyprune
