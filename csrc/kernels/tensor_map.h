// Descriptions of tensors in device memory by which blocks of them are copied in hardware, swizzled on the way.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "../common.h"

namespace pyprune {

using TensorMap = CUtensorMap;

// What one copy brings: 128 bytes of channels of 32 tokens.
constexpr int kBoxBytes = 128, kBoxTokens = 32;

// A tensor [batches, tokens, channels] of 16-bit elements whose channels are neighbours in memory.
struct MappedTensor {
  Matrix at;
  int64_t batches, tokens, channels;
  Dtype dtype;  // bfloat16 or float16
};

// Describes the tensor, whose data is not read. False where the hardware cannot walk it: tokens or batches that do not
// start at multiples of 16 bytes, or lie in no ascending order. What lies outside of it is copied as zeros.
bool map_tensor(const MappedTensor& tensor, TensorMap& map);

// Whether the current device and driver can copy so and multiply by fours of warps (compute capability 9.0), and this
// library was compiled for it. PYPRUNE_WGMMA=0 in the environment says no.
bool wgmma_available();

// Multiprocessors of the current device.
int multiprocessors();

}  // namespace pyprune
