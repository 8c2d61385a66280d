#pragma once

#include <cuda_runtime_api.h>

#include "../common.h"

namespace pyprune {

// Device bytes of the partial sums.
int64_t channel_workspace(const ChannelCall& call);

// For float32, bfloat16 and float16. Deterministic: every sum has an order that depends on the sizes only. The host
// does not wait.
cudaError_t channel_sums_cuda(const ChannelCall& call, void* workspace, cudaStream_t stream);

}  // namespace pyprune
