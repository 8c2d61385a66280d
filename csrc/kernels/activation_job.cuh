// What both kernels that form gradients from activations share: the job, the criteria, and the sizes of tiles.
#pragma once

#include <cuda_runtime_api.h>

#include "../common.h"

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

// What is held of G_b: the running sum over samples (in the accumulators themselves), the sum of squares, or both.
struct TaylorSignedTile {
  static constexpr bool sum = true, squares = false;
  static __device__ float at(float w, float g, float) { return w * g; }
};
struct TaylorAbsTile {
  static constexpr bool sum = true, squares = false;
  static __device__ float at(float w, float g, float) { return fabsf(w * g); }
};
struct FisherTile {
  static constexpr bool sum = false, squares = true;
  static __device__ float at(float w, float, float h) { return w * w * h; }
};
struct MixedTile {
  static constexpr bool sum = true, squares = true;
  static __device__ float at(float w, float g, float h) { return fabsf(w * g - (w * w * h) * 0.5f); }
};

// Sizes of a block's tile; activation.cu lays out the partial sums by them.
constexpr int kBlockRows = 128;
constexpr int block_cols(bool sum, bool squares, bool wide) {
  return wide || (sum && squares) ? 128 : squares ? 192 : 256;
}

}  // namespace pyprune
