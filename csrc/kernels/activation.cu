// Salience from activations: sizes, partial sums, and the launches of both passes.

#include "activation.h"

#include "../planning/chunks.h"
#include "activation_tile.cuh"
#include "activation_wgmma.h"
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

struct Parts {
  float* rows;        // [tiles.cols, rows]
  float* cols;        // [col_count, cols]
  int64_t col_count;  // one a tile, or one a group of four warps
};

int64_t most_col_parts(const ActivationCall& c) {
  return ceil_div(c.rows, kGroupRows);
}

// Samples, and tokens of each. Where only the sum over all of them is wanted they are one long sample, whose steps are
// all full but the last.
struct Samples {
  int64_t batches, tokens;
};

Samples samples_of(const ActivationCall& c) {
  const auto joined = [&](const Matrix& m) { return m.batch_stride == c.tokens * m.row_stride; };
  if (!reads_curvature(c.formula) && joined(c.rows_input) && joined(c.cols_input)) return {1, c.batches * c.tokens};
  return {c.batches, c.tokens};
}

template <class T>
Factor<T> factor_of(const Matrix& m, Dtype dtype, const Samples& s, int64_t size) {
  return {static_cast<const T*>(m.data), m.batch_stride, m.row_stride, size,
          rows_aligned(m, dtype, s.batches, s.tokens)};
}

// The kernel for compute capability 9.0. False where it cannot serve the call; nothing is launched then.
template <class T>
bool try_wgmma(const ActivationCall& c, const Tiles& tiles, Parts& parts, cudaStream_t stream, cudaError_t& status) {
  if (sizeof(T) != 2 || !wgmma_available()) return false;
  const Samples samples = samples_of(c);
  const auto mapped = [&](const Matrix& m, const Samples& s, int64_t channels, TensorMap& map) {
    return map_tensor({m, s.batches, s.tokens, channels, c.dtype}, map);
  };
  WgmmaJob job{};
  if (!mapped(c.rows_input, samples, c.rows, job.rows_map) || !mapped(c.cols_input, samples, c.cols, job.cols_map) ||
      !mapped(c.weight, {1, c.rows}, c.cols, job.weight_map)) {
    return false;
  }
  job.rows = c.rows, job.cols = c.cols;
  job.batches = static_cast<int>(samples.batches), job.tokens = static_cast<int>(samples.tokens);
  job.pairs = static_cast<int>(ceil_div(tiles.rows, 2)), job.col_tiles = static_cast<int>(tiles.cols);
  job.gradient_scale = c.gradient_scale, job.curvature_scale = c.curvature_scale;
  job.row_parts = parts.rows, job.col_parts = parts.cols;
  parts.col_count = most_col_parts(c);
  status = launch_wgmma(c.formula, c.dtype, job, stream);
  return true;
}

template <class T>
cudaError_t first_pass(const ActivationCall& c, const Tiles& tiles, Parts& parts, cudaStream_t stream) {
  cudaError_t status = cudaSuccess;
  if (try_wgmma<T>(c, tiles, parts, stream, status)) return status;
  ActivationJob<T> job{};
  const Samples samples = samples_of(c);
  job.batches = samples.batches, job.tokens = samples.tokens;
  job.rows = factor_of<T>(c.rows_input, c.dtype, samples, c.rows);
  job.cols = factor_of<T>(c.cols_input, c.dtype, samples, c.cols);
  job.weight = static_cast<const T*>(c.weight.data);
  job.weight_stride = c.weight.row_stride;
  job.row_tiles = tiles.rows, job.col_tiles = tiles.cols;
  job.gradient_scale = c.gradient_scale, job.curvature_scale = c.curvature_scale;
  job.row_parts = parts.rows, job.col_parts = parts.cols;
  parts.col_count = tiles.rows;
  return launch_activation(c.formula, job, stream);
}

}  // namespace

int64_t activation_workspace(const ActivationCall& c) {
  const Tiles tiles = tiles_of(c);
  return (tiles.cols * c.rows + most_col_parts(c) * c.cols) * static_cast<int64_t>(sizeof(float));
}

cudaError_t activation_salience_cuda(const ActivationCall& c, void* workspace, cudaStream_t stream) {
  if (c.batches * c.tokens * c.rows * c.cols == 0) {  // no gradient: all sums are zero
    cudaError_t status = cudaMemsetAsync(c.row_sums, 0, static_cast<size_t>(c.rows) * sizeof(float), stream);
    if (status != cudaSuccess) return status;
    return cudaMemsetAsync(c.col_sums, 0, static_cast<size_t>(c.cols) * sizeof(float), stream);
  }
  const Tiles tiles = tiles_of(c);
  if (tiles.rows * tiles.cols > INT32_MAX) return cudaErrorInvalidConfiguration;
  Parts parts{static_cast<float*>(workspace), static_cast<float*>(workspace) + tiles.cols * c.rows, 0};
  cudaError_t status = cudaErrorInvalidValue;
  if (c.dtype == Dtype::bfloat16) {
    status = first_pass<__nv_bfloat16>(c, tiles, parts, stream);
  } else if (c.dtype == Dtype::float16) {
    status = first_pass<__half>(c, tiles, parts, stream);
  } else if (c.dtype == Dtype::float32) {
    status = first_pass<float>(c, tiles, parts, stream);
  }
  if (status != cudaSuccess) return status;
  const Reduction rows{parts.rows, c.row_sums, tiles.cols, c.rows, ceil_div(c.rows, kReduceCols)};
  const Reduction cols{parts.cols, c.col_sums, parts.col_count, c.cols, ceil_div(c.cols, kReduceCols)};
  return add_two(rows, 1, cols, 1, stream);
}

}  // namespace pyprune
