#pragma once

#include <cuda_runtime_api.h>

#include "../common.h"

namespace pyprune {

// Device bytes that accumulate_square_cuda needs for its table.
int64_t accumulate_workspace(const AccumulateTensor* tensors, int64_t count);

// curvature[i] += scale * grad[i]^2 for each of the tensors, all on one device; gradients float32, bfloat16 or float16.
cudaError_t accumulate_square_cuda(const AccumulateTensor* tensors, int64_t count, double scale, void* workspace,
                                   cudaStream_t stream);

}  // namespace pyprune
