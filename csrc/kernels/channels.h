#pragma once

#include <cuda_runtime_api.h>

#include "../common.h"

namespace pyprune {

// Sums over tokens for every channel of every sample: of a * b, or, where b.data is null, of a and of a^2.
struct ChannelCall {
  Matrix a, b;  // [batches, tokens, channels], of one dtype: float32, bfloat16 or float16
  int64_t batches, tokens, channels;
  Dtype dtype;
  float* sums;     // [batches, channels]: of a * b, or of a
  float* squares;  // [batches, channels]: of a^2; null beside b
};

// Device bytes of the partial sums.
int64_t channel_workspace(const ChannelCall& call);

// Deterministic: every sum has an order that depends on the sizes only. The host does not wait.
cudaError_t channel_sums_cuda(const ChannelCall& call, void* workspace, cudaStream_t stream);

}  // namespace pyprune
