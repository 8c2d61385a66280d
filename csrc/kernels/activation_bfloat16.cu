// Salience from bfloat16 activations.

#include "activation_tile.cuh"

namespace pyprune {

cudaError_t launch_activation(Formula formula, const ActivationJob<__nv_bfloat16>& job, cudaStream_t stream) {
  return launch_formula(formula, job, stream);
}

}  // namespace pyprune
