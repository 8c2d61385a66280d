// Partial sums into sums.
//
// Block    32 sums of one batch. Thread (s, i) adds parts k = s, s + 8, ... of sum i in float64, k ascending; the eight
//          slices are then added in order.
// Bytes    each partial sum once, 128 bytes a warp; about 1% of what the first pass reads.

#include "parts.h"

#include "device.cuh"

namespace pyprune {
namespace {

constexpr int kThreads = 256;
constexpr int kSlices = kThreads / kReduceCols;  // threads that share one sum

__device__ inline void add_piece(const Reduction& job, int64_t piece) {
  __shared__ double shared[kSlices][kReduceCols];
  const int64_t batch = piece / job.pieces;
  const int i = threadIdx.x % kReduceCols, slice = threadIdx.x / kReduceCols;
  const int64_t col = piece % job.pieces * kReduceCols + i;
  double sum = 0.0;
  if (col < job.length) {
    const float* parts = job.parts + batch * job.count * job.length + col;
#pragma unroll 4
    for (int64_t k = slice; k < job.count; k += kSlices) sum += static_cast<double>(parts[k * job.length]);
  }
  shared[slice][i] = sum;
  __syncthreads();
  if (slice == 0 && col < job.length) {
#pragma unroll
    for (int s = 1; s < kSlices; ++s) sum += shared[s][i];
    job.out[batch * job.length + col] = static_cast<float>(sum);
  }
}

__global__ void __launch_bounds__(kThreads) add_table(const Reduction* jobs, const int64_t* first, int count) {
  const int index = tensor_of(first, count, blockIdx.x);
  add_piece(jobs[index], static_cast<int64_t>(blockIdx.x) - first[index]);
}

__global__ void __launch_bounds__(kThreads) add_pair(Reduction a, Reduction b, int64_t a_blocks) {
  const int64_t block = blockIdx.x;
  if (block < a_blocks) {
    add_piece(a, block);
  } else {
    add_piece(b, block - a_blocks);
  }
}

}  // namespace

cudaError_t add_parts(const Reduction* jobs, const int64_t* first, int count, int64_t blocks, cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  add_table<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(jobs, first, count);
  return cudaGetLastError();
}

cudaError_t add_two(const Reduction& a, int64_t a_batches, const Reduction& b, int64_t b_batches, cudaStream_t stream) {
  const int64_t a_blocks = a_batches * a.pieces, blocks = a_blocks + b_batches * b.pieces;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  add_pair<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(a, b, a_blocks);
  return cudaGetLastError();
}

}  // namespace pyprune
