#pragma once

#include <cuda_runtime_api.h>

#include "../common.h"

namespace pyprune {

// Device bytes that gather_cuda needs: its table and the positions of kept rows and words.
int64_t gather_workspace(const GatherTensor* tensors, int64_t count);

// Copies the kept slices of each of the tensors, all on one device. Runs are host memory.
cudaError_t gather_cuda(const GatherTensor* tensors, int64_t count, void* workspace, cudaStream_t stream);

}  // namespace pyprune
