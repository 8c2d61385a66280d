#pragma once

#include <cuda_runtime_api.h>

#include "../common.h"

namespace pyprune {

// Device bytes of the partial sums, O(rows * cols / 128).
int64_t activation_workspace(const ActivationCall& call);

// Row and column sums of the formula. Deterministic: every sum has a fixed order, no atomics. The host does not wait.
cudaError_t activation_salience_cuda(const ActivationCall& call, void* workspace, cudaStream_t stream);

}  // namespace pyprune
