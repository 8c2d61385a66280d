// The second pass of every reduction: partial sums, added in a fixed order.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace pyprune {

constexpr int kReduceCols = 32;  // sums that a block of the second pass forms

// out[b, i] = sum over k of parts[b, k, i]
struct Reduction {
  const float* parts;
  float* out;
  int64_t count, length, pieces;  // pieces = ceil(length / kReduceCols)
};

// All of the jobs in one launch: `jobs` and `first` are device memory, first[i] = batches * pieces of the jobs before
// i, and `blocks` is their number.
cudaError_t add_parts(const Reduction* jobs, const int64_t* first, int count, int64_t blocks, cudaStream_t stream);

// Two jobs in one launch without a table in device memory: nothing is copied, and the host does not wait. A job with no
// batches, or of length zero, is passed over.
cudaError_t add_two(const Reduction& a, int64_t a_batches, const Reduction& b, int64_t b_batches, cudaStream_t stream);

}  // namespace pyprune
