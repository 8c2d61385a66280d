// Salience from float32 activations.

#include "activation_tile.cuh"

namespace pyprune {

cudaError_t launch_activation(Formula formula, const ActivationJob<float>& job, cudaStream_t stream) {
  return launch_formula(formula, job, stream);
}

}  // namespace pyprune
