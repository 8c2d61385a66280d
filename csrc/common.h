// Types that the CPU, the CUDA and the binding side share: plain data, no torch, no CUDA.
#pragma once

#include <stdint.h>

namespace pyprune {

enum class Dtype : int32_t { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };

// Bytes of an element.
inline int64_t size_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// What sums and curvatures are held in, beside weights or gradients of `dtype`.
inline Dtype wide_of(Dtype dtype) {
  return dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
}

// The numbers are those of pyprune/ops/reference.py.
enum class Formula : int32_t { abs = 0, square = 1, taylor_signed = 2, taylor_abs = 3, fisher = 4, mixed = 5 };

inline bool reads_grad(Formula f) {
  return f == Formula::taylor_signed || f == Formula::taylor_abs || f == Formula::mixed;
}

inline bool reads_curvature(Formula f) {
  return f == Formula::fisher || f == Formula::mixed;
}

// A [batches, rows, cols] tensor whose columns are neighbours in memory; strides in elements.
struct Matrix {
  const void* data;
  int64_t batch_stride;
  int64_t row_stride;
};

// Whether every row starts at a multiple of 16 bytes. True of a matrix that is not there, whose fields are zero.
inline bool rows_aligned(const Matrix& m, Dtype dtype, int64_t batches, int64_t rows) {
  const int64_t row = rows > 1 ? m.row_stride * size_of(dtype) : 0;
  const int64_t batch = batches > 1 ? m.batch_stride * size_of(dtype) : 0;
  return reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && row % 16 == 0 && batch % 16 == 0;
}

// One tensor of a salience call. Pointers to sums are float, or double beside float64 weights.
struct SalienceTensor {
  Matrix weight;
  Matrix grad;       // data is null when the formula does not read it; dtype grad_dtype
  Matrix curvature;  // float32, or float64 beside float64 weights
  int64_t batches, rows, cols;
  void* row_sums;  // [batches, rows]
  void* col_sums;  // [batches, cols]
  Dtype dtype;
  Dtype grad_dtype;
};

// One tensor of an accumulation: curvature[i] += scale * grad[i]^2 for i < size, both contiguous.
struct AccumulateTensor {
  void* curvature;  // float32, or float64 beside float64 gradients
  const void* grad;
  int64_t size;
  Dtype grad_dtype;
};

// Sums over the rows of [batches, rows, cols], channels being columns. With b: sums [batches, cols] of a * b over each
// batch's rows. Without (its data is null): sums [cols] of a and squares [cols] of a^2 over all rows of all batches.
struct ChannelCall {
  Matrix a, b;
  int64_t batches, rows, cols;
  Dtype dtype;    // of both
  void* sums;     // float, or double for float64
  void* squares;  // likewise; null beside b
};

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

// Positions source .. source + length - 1 of a dimension go to dest .. dest + length - 1.
struct Run {
  int64_t source;
  int64_t dest;
  int64_t length;
};

// The kept positions of one dimension, in the order of the destination, or all of them when `whole`.
struct KeptRuns {
  const Run* runs;
  int64_t count;
  bool whole;
};

// One tensor of a gather: dest[b, r, c] = source[kept_batches[b], kept_rows[r], kept_cols[c]]. The source's columns are
// neighbours in memory and its strides are in elements; the destination is contiguous.
struct GatherTensor {
  const void* source;
  void* dest;
  int64_t element_size;
  int64_t batches, rows, cols;              // of the source
  int64_t batch_stride, row_stride;         // of the source
  int64_t out_batches, out_rows, out_cols;  // of the destination
  KeptRuns kept_batches, kept_rows, kept_cols;
};

}  // namespace pyprune
