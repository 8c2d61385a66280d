// Salience from activations: channels are packed into panels, then a task scores a block of rows.

#include "activation.h"

#include <algorithm>

#include "../planning/chunks.h"
#include "kernels.h"

namespace pyprune {
namespace {

// Columns that one task of the last pass adds up.
constexpr int64_t kReduceCols = 512;

// Scratch begins its parts at cache lines, which vectors then never straddle.
int64_t whole_lines(int64_t floats) {
  return ceil_div(floats, 16) * 16;
}

// One factor of the gradient as panels.
struct Panels {
  Matrix from;
  int64_t tokens, channels, width, count;  // count: of one sample

  Panels(const Matrix& matrix, int64_t tokens_, int64_t channels_, int64_t width_)
      : from(matrix), tokens(tokens_), channels(channels_), width(width_), count(ceil_div(channels_, width_)) {}
  int64_t sample() const { return count * tokens * width; }  // elements

  void pack(const CpuKernels& kernels, Dtype dtype, int64_t index, float* to) const {
    const int64_t s = index / count, begin = index % count * width;
    const char* at = static_cast<const char*>(from.data) + (s * from.batch_stride + begin) * size_of(dtype);
    kernels.pack_panel(dtype, at, from.row_stride, tokens, std::min(width, channels - begin), width,
                       to + index * tokens * width);
  }
};

struct Scratch {
  Panels rows, cols;
  int64_t blocks;

  Scratch(const CpuKernels& kernels, const ActivationCall& call)
      : rows(call.rows_input, call.tokens, call.rows, kernels.panel_rows),
        cols(call.cols_input, call.tokens, call.cols, kernels.panel_cols),
        blocks(ceil_div(call.rows, kActivationRows)) {}
};

}  // namespace

int64_t activation_scratch(const ActivationCall& call) {
  const Scratch s(cpu_kernels(), call);
  return whole_lines(call.batches * s.rows.sample()) + call.batches * s.cols.sample() + s.blocks * call.cols;
}

void activation_salience_cpu(const ActivationCall& call, float* scratch, const Parallel& parallel) {
  const CpuKernels& kernels = cpu_kernels();
  const Scratch s(kernels, call);
  float* row_panels = scratch;
  float* col_panels = row_panels + whole_lines(call.batches * s.rows.sample());
  float* col_parts = col_panels + call.batches * s.cols.sample();
  const int64_t packed_rows = call.batches * s.rows.count;
  const int64_t packed = call.tokens == 0 ? 0 : packed_rows + call.batches * s.cols.count;
  for_each_task(parallel, packed, [&](int64_t i) {
    i < packed_rows ? s.rows.pack(kernels, call.dtype, i, row_panels)
                    : s.cols.pack(kernels, call.dtype, i - packed_rows, col_panels);
  });
  for_each_task(parallel, s.blocks, [&](int64_t i) {
    const int64_t first = i * kActivationRows;
    ActivationRows job{};
    job.formula = call.formula;
    job.dtype = call.dtype;
    job.row_panels = row_panels + first * call.tokens;
    job.col_panels = col_panels;
    job.row_sample = s.rows.sample();
    job.col_sample = s.cols.sample();
    job.weight = static_cast<const char*>(call.weight.data) + first * call.weight.row_stride * size_of(call.dtype);
    job.weight_stride = call.weight.row_stride;
    job.samples = call.batches;
    job.tokens = call.tokens;
    job.rows = std::min(kActivationRows, call.rows - first);
    job.cols = call.cols;
    job.gradient_scale = call.gradient_scale;
    job.curvature_scale = call.curvature_scale;
    job.row_sums = call.row_sums + first;
    job.col_sums = col_parts + i * call.cols;
    kernels.activation_rows(job);
  });
  for_each_task(parallel, ceil_div(call.cols, kReduceCols), [&](int64_t i) {
    double sums[kReduceCols] = {};
    const int64_t begin = i * kReduceCols, count = std::min(kReduceCols, call.cols - begin);
    for (int64_t b = 0; b < s.blocks; ++b) {
      for (int64_t c = 0; c < count; ++c) sums[c] += static_cast<double>(col_parts[b * call.cols + begin + c]);
    }
    for (int64_t c = 0; c < count; ++c) call.col_sums[begin + c] = static_cast<float>(sums[c]);
  });
}

}  // namespace pyprune
