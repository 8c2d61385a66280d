#pragma once

#include <cuda_runtime_api.h>

#include "../common.h"

namespace pyprune {

struct SalienceEntry;
struct Reduction;

// The tensors of one pair of dtypes; a table and the tiles before each of its entries, on the device.
struct SalienceLaunch {
  Dtype dtype, grad_dtype;
  const SalienceEntry* entries;
  const int64_t* first;
  int64_t count, blocks;
};

// Both passes over a table that is on the device: what a call needs, however many tensors there are.
struct SaliencePasses {
  static constexpr int kPairs = 9;
  Formula formula;
  int32_t launches;
  SalienceLaunch first_pass[kPairs];
  const Reduction* reductions;
  const int64_t* first_reduction;
  int64_t reduction_count, reduction_blocks;
};

// Device bytes that salience needs: its table and the partial sums of tensors with several tiles.
int64_t salience_workspace(const SalienceTensor* tensors, int64_t count);

// Row and column sums of the formula for each of the tensors, all on one device, float32, bfloat16 or float16 (not
// float64). Fills the table in `workspace`, which has salience_workspace(...) bytes, aligned to 256, and says what to
// launch over it; `tensors` is host memory and may go.
cudaError_t prepare_salience_cuda(Formula formula, const SalienceTensor* tensors, int64_t count, void* workspace,
                                  cudaStream_t stream, SaliencePasses& passes);

// Reads what the tensors hold and writes their sums, as often as it is called while they and the workspace are there.
// Deterministic: every sum has a fixed order, no atomics.
cudaError_t launch_salience(const SaliencePasses& passes, cudaStream_t stream);

}  // namespace pyprune
