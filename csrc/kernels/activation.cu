// Salience from activations: sizes, partial sums, and the launches of both passes.

#include "activation.h"

#include "../planning/chunks.h"
#include "activation_tile.cuh"
#include "parts.h"

namespace pyprune {
namespace {

struct Tiles {
  int64_t rows, cols;
};

Tiles tiles_of(const ActivationCall& c) {
  const int cols = block_cols(reads_grad(c.formula), reads_curvature(c.formula), c.dtype == Dtype::float32);
  return {ceil_div(c.rows, kBlockRows), ceil_div(c.cols, cols)};
}

template <class T>
Factor<T> factor_of(const Matrix& m, int64_t batches, int64_t tokens, int64_t size) {
  const int64_t bytes = static_cast<int64_t>(sizeof(T));
  const bool aligned = reinterpret_cast<uintptr_t>(m.data) % 16 == 0 &&
                       (tokens <= 1 || m.row_stride * bytes % 16 == 0) &&
                       (batches <= 1 || m.batch_stride * bytes % 16 == 0);
  return {static_cast<const T*>(m.data), m.batch_stride, m.row_stride, size, aligned};
}

template <class T>
cudaError_t first_pass(const ActivationCall& c, const Tiles& tiles, float* row_parts, float* col_parts,
                       cudaStream_t stream) {
  ActivationJob<T> job{};
  job.batches = c.batches, job.tokens = c.tokens;
  const auto joined = [&](const Matrix& m) { return m.batch_stride == c.tokens * m.row_stride; };
  if (!reads_curvature(c.formula) && joined(c.rows_input) && joined(c.cols_input)) {
    // Only the sum over all samples is wanted: they are one long sample, whose steps are all full but the last.
    job.batches = 1, job.tokens = c.batches * c.tokens;
  }
  job.rows = factor_of<T>(c.rows_input, job.batches, job.tokens, c.rows);
  job.cols = factor_of<T>(c.cols_input, job.batches, job.tokens, c.cols);
  job.weight = static_cast<const T*>(c.weight.data);
  job.weight_stride = c.weight.row_stride;
  job.row_tiles = tiles.rows, job.col_tiles = tiles.cols;
  job.gradient_scale = c.gradient_scale, job.curvature_scale = c.curvature_scale;
  job.row_parts = row_parts, job.col_parts = col_parts;
  return launch_activation(c.formula, job, stream);
}

}  // namespace

int64_t activation_workspace(const ActivationCall& c) {
  const Tiles tiles = tiles_of(c);
  return (tiles.cols * c.rows + tiles.rows * c.cols) * static_cast<int64_t>(sizeof(float));
}

cudaError_t activation_salience_cuda(const ActivationCall& c, void* workspace, cudaStream_t stream) {
  if (c.batches * c.tokens * c.rows * c.cols == 0) {  // no gradient: all sums are zero
    cudaError_t status = cudaMemsetAsync(c.row_sums, 0, static_cast<size_t>(c.rows) * sizeof(float), stream);
    if (status != cudaSuccess) return status;
    return cudaMemsetAsync(c.col_sums, 0, static_cast<size_t>(c.cols) * sizeof(float), stream);
  }
  const Tiles tiles = tiles_of(c);
  if (tiles.rows * tiles.cols > INT32_MAX) return cudaErrorInvalidConfiguration;
  float* row_parts = static_cast<float*>(workspace);
  float* col_parts = row_parts + tiles.cols * c.rows;
  cudaError_t status = cudaErrorInvalidValue;
  if (c.dtype == Dtype::bfloat16) {
    status = first_pass<__nv_bfloat16>(c, tiles, row_parts, col_parts, stream);
  } else if (c.dtype == Dtype::float16) {
    status = first_pass<__half>(c, tiles, row_parts, col_parts, stream);
  } else if (c.dtype == Dtype::float32) {
    status = first_pass<float>(c, tiles, row_parts, col_parts, stream);
  }
  if (status != cudaSuccess) return status;
  const Reduction rows{row_parts, c.row_sums, tiles.cols, c.rows, ceil_div(c.rows, kReduceCols)};
  const Reduction cols{col_parts, c.col_sums, tiles.rows, c.cols, ceil_div(c.cols, kReduceCols)};
  return add_two(rows, 1, cols, 1, stream);
}

}  // namespace pyprune
