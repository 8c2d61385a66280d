#pragma once

#include <cuda_runtime_api.h>

#include "../common.h"

namespace pyprune {

// Device bytes that salience_cuda needs: its table and the partial sums of tensors with several tiles.
int64_t salience_workspace(Formula formula, const SalienceTensor* tensors, int64_t count);

// Row and column sums of the formula for each of the tensors, all on one device, float32, bfloat16 or float16 (not
// float64). `tensors` is host memory; `workspace` has salience_workspace(...) bytes, aligned to 256, and is free to be
// reused once the stream has passed. Deterministic: every sum has a fixed order, no atomics.
cudaError_t salience_cuda(Formula formula, const SalienceTensor* tensors, int64_t count, void* workspace,
                          cudaStream_t stream);

}  // namespace pyprune
