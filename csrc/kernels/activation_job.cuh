// What both kernels that form gradients from activations share: the job, the formulas, and the sizes of tiles.
#pragma once

#include <cuda_runtime_api.h>

#include "../common.h"
#include "formulas.cuh"

namespace pyprune {

// One of the two factors of the gradient, as the kernel sees it: [batches, tokens, size].
template <class T>
struct Factor {
  const T* data;
  int64_t batch_stride, token_stride, size;
  bool aligned;  // every token starts at a multiple of 16 bytes
};

template <class T>
struct ActivationJob {
  Factor<T> rows, cols;
  const T* weight;
  int64_t weight_stride;
  int64_t batches, tokens, row_tiles, col_tiles;
  float gradient_scale, curvature_scale;
  float* row_parts;  // [col_tiles, rows]
  float* col_parts;  // [row_tiles, cols]
};

// Sizes of a block's tile; activation.cu lays out the partial sums by them. What is held of G_b: the running sum over
// samples for a formula that reads the gradient (in the accumulators themselves, where it is alone), the sum of squares
// for one that reads the curvature.
constexpr int kBlockRows = 128;
constexpr int block_cols(bool grad, bool curvature, bool wide) {
  return wide || (grad && curvature) ? 128 : curvature ? 192 : 256;
}

}  // namespace pyprune
