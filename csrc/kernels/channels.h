#pragma once

#include <cuda_runtime_api.h>

#include "../common.h"

namespace pyprune {

// Sums channel by channel: of a * b over the tokens of each sample, or, where b.data is null, of a and of a^2 over the
// tokens of all samples.
struct ChannelSums {
  Matrix a, b;  // [batches, tokens, channels], of one dtype: float32, bfloat16 or float16
  int64_t batches, tokens, channels;
  Dtype dtype;
  float* sums;     // of a * b: [batches, channels]; of a: [channels]
  float* squares;  // of a^2: [channels]; null beside b
};

// Device bytes of the partial sums.
int64_t channel_workspace(const ChannelSums& call);

// Deterministic: every sum has an order that depends on the sizes only. The host does not wait.
cudaError_t channel_sums_cuda(const ChannelSums& call, void* workspace, cudaStream_t stream);

}  // namespace pyprune
