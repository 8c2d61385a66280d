// The kernel of activation_wgmma.cuh, seen from the host.
#pragma once

#include "activation_job.cuh"
#include "tensor_map.h"

namespace pyprune {

constexpr int kGroupRows = kBlockRows / 2;  // of the weight: what four warps own

struct WgmmaJob {
  TensorMap rows_map, cols_map, weight_map;
  int64_t rows, cols;
  int batches, tokens, pairs, col_tiles;  // pairs of row tiles
  float gradient_scale, curvature_scale;
  float* row_parts;  // [col_tiles, rows]
  float* col_parts;  // [ceil(rows / kGroupRows), cols]
};

// Salience from 16-bit activations; both types are compiled in files of their own, side by side.
cudaError_t launch_wgmma_bfloat16(Formula formula, const WgmmaJob& job, cudaStream_t stream);
cudaError_t launch_wgmma_float16(Formula formula, const WgmmaJob& job, cudaStream_t stream);

inline cudaError_t launch_wgmma(Formula formula, Dtype dtype, const WgmmaJob& job, cudaStream_t stream) {
  return dtype == Dtype::bfloat16 ? launch_wgmma_bfloat16(formula, job, stream)
                                  : launch_wgmma_float16(formula, job, stream);
}

}  // namespace pyprune
