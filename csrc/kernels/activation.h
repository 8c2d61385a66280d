#pragma once

#include <cuda_runtime_api.h>

#include "../common.h"

namespace pyprune {

// The salience of one weight, its gradient never written: G_b[r, c] = sum over t of rows_input[b, t, r] * cols_input[b,
// t, c], G = gradient_scale * sum_b G_b, H = curvature_scale * sum_b G_b^2.
struct ActivationCall {
  Formula formula;    // taylor_signed, taylor_abs, fisher or mixed
  Dtype dtype;        // of all three; float32, bfloat16 or float16
  Matrix rows_input;  // [batches, tokens, rows]
  Matrix cols_input;  // [batches, tokens, cols]
  Matrix weight;      // [rows, cols]; batch_stride is not read
  int64_t batches, tokens, rows, cols;
  float gradient_scale, curvature_scale;
  float* row_sums;  // [rows]
  float* col_sums;  // [cols]
};

// Device bytes of the partial sums, O(rows * cols / 128).
int64_t activation_workspace(const ActivationCall& call);

// Row and column sums of the formula. Deterministic: every sum has a fixed order, no atomics. The host does not wait.
cudaError_t activation_salience_cuda(const ActivationCall& call, void* workspace, cudaStream_t stream);

}  // namespace pyprune
