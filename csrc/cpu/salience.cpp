// Salience of many tensors: tiles in parallel, then the partial sums of tensors that have several tiles in a row or
// column.

#include "salience.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "../planning/chunks.h"
#include "kernels.h"

namespace pyprune {
namespace {

// Elements that one task reads: long enough to hide the hand-out, short enough to balance.
constexpr int64_t kTaskElements = 1 << 17;

// Columns that one task of the second pass adds up.
constexpr int64_t kReduceCols = 1024;

struct Layout {
  int64_t row_tiles, col_tiles;
  char* row_parts;  // [batches, col_tiles, rows], the output itself when there is one tile
  char* col_parts;  // [batches, row_tiles, cols], likewise
};

// out[b, i] = sum over k of parts[b, k, i], k ascending
struct Reduction {
  const char* parts;
  char* out;
  int64_t count, length, batches;
  bool is_double;
};

const char* element(const Matrix& m, Dtype dtype, int64_t b, int64_t r, int64_t c) {
  if (m.data == nullptr) return nullptr;
  return static_cast<const char*>(m.data) + (b * m.batch_stride + r * m.row_stride + c) * size_of(dtype);
}

void run_tile(const CpuKernels& kernels, Formula formula, const SalienceTensor& t, const Layout& l, int64_t index) {
  const int64_t ct = index % l.col_tiles, rt = index / l.col_tiles % l.row_tiles;
  const int64_t b = index / (l.col_tiles * l.row_tiles);
  const int64_t r = rt * kTileRows, c = ct * kTileCols;
  const int64_t sum_size = size_of(wide_of(t.dtype));
  SalienceTile tile;
  tile.weight = element(t.weight, t.dtype, b, r, c);
  tile.grad = element(t.grad, t.grad_dtype, b, r, c);
  tile.curvature = element(t.curvature, wide_of(t.dtype), b, r, c);
  tile.weight_stride = t.weight.row_stride;
  tile.grad_stride = t.grad.row_stride;
  tile.curvature_stride = t.curvature.row_stride;
  tile.rows = std::min(kTileRows, t.rows - r);
  tile.cols = std::min(kTileCols, t.cols - c);
  tile.row_sums = l.row_parts + ((b * l.col_tiles + ct) * t.rows + r) * sum_size;
  tile.col_sums = l.col_parts + ((b * l.row_tiles + rt) * t.cols + c) * sum_size;
  kernels.salience_tile(formula, t.dtype, t.grad_dtype, tile);
}

template <class Acc>
void reduce(const Reduction& job, int64_t batch, int64_t begin, int64_t end) {
  double sums[kReduceCols];
  const int64_t n = end - begin;
  std::fill(sums, sums + n, 0.0);
  const Acc* parts = reinterpret_cast<const Acc*>(job.parts) + batch * job.count * job.length + begin;
  for (int64_t k = 0; k < job.count; ++k, parts += job.length) {
    for (int64_t i = 0; i < n; ++i) sums[i] += static_cast<double>(parts[i]);
  }
  Acc* out = reinterpret_cast<Acc*>(job.out) + batch * job.length + begin;
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<Acc>(sums[i]);
}

void run_reductions(const std::vector<Reduction>& jobs, const Parallel& parallel) {
  std::vector<int64_t> sizes, limits;
  for (const Reduction& job : jobs) {
    sizes.push_back(job.batches * ceil_div(job.length, kReduceCols));
    const int64_t piece = job.count * std::min(job.length, kReduceCols);
    limits.push_back(std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, piece)));
  }
  const std::vector<Chunk> tasks = chunk_plan(sizes.data(), limits.data(), static_cast<int64_t>(sizes.size()));
  for_each_task(parallel, static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const Reduction& job = jobs[tasks[i].tensor];
    const int64_t pieces = ceil_div(job.length, kReduceCols);
    for (int64_t k = tasks[i].begin; k < tasks[i].end; ++k) {
      const int64_t begin = k % pieces * kReduceCols, end = std::min(begin + kReduceCols, job.length);
      job.is_double ? reduce<double>(job, k / pieces, begin, end) : reduce<float>(job, k / pieces, begin, end);
    }
  });
}

}  // namespace

void salience_cpu(Formula formula, const SalienceTensor* tensors, int64_t count, const Parallel& parallel) {
  std::vector<Layout> layouts(static_cast<size_t>(count));
  std::vector<int64_t> sizes(static_cast<size_t>(count)), limits(static_cast<size_t>(count));
  int64_t scratch_sums = 0;
  for (int64_t i = 0; i < count; ++i) {
    const SalienceTensor& t = tensors[i];
    Layout& l = layouts[i];
    // A tensor with no rows or no columns still has sums: zeros, written by a tile that reads nothing.
    l.row_tiles = std::max<int64_t>(1, ceil_div(t.rows, kTileRows));
    l.col_tiles = std::max<int64_t>(1, ceil_div(t.cols, kTileCols));
    sizes[i] = t.batches * l.row_tiles * l.col_tiles;
    const int64_t tile = std::min(kTileRows, t.rows) * std::min(kTileCols, t.cols);
    limits[i] = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(tile, 64));
    if (l.row_tiles > 1) scratch_sums += t.batches * l.row_tiles * t.cols;
    if (l.col_tiles > 1) scratch_sums += t.batches * l.col_tiles * t.rows;
  }

  // Sums are of one type.
  const bool is_double = tensors[0].dtype == Dtype::float64;
  const int64_t sum_size = size_of(wide_of(tensors[0].dtype));
  const std::unique_ptr<char[]> scratch(new char[scratch_sums * sum_size]);
  char* free_scratch = scratch.get();
  std::vector<Reduction> reductions;
  for (int64_t i = 0; i < count; ++i) {
    const SalienceTensor& t = tensors[i];
    Layout& l = layouts[i];
    const auto place = [&](void* sums, int64_t tiles, int64_t length) {
      char* const out = static_cast<char*>(sums);
      if (tiles == 1) return out;
      char* const parts = free_scratch;
      free_scratch += t.batches * tiles * length * sum_size;
      reductions.push_back({parts, out, tiles, length, t.batches, is_double});
      return parts;
    };
    l.row_parts = place(t.row_sums, l.col_tiles, t.rows);
    l.col_parts = place(t.col_sums, l.row_tiles, t.cols);
  }

  const CpuKernels& kernels = cpu_kernels();
  const std::vector<Chunk> tasks = chunk_plan(sizes.data(), limits.data(), count);
  for_each_task(parallel, static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const Chunk& task = tasks[i];
    for (int64_t k = task.begin; k < task.end; ++k) {
      run_tile(kernels, formula, tensors[task.tensor], layouts[task.tensor], k);
    }
  });
  run_reductions(reductions, parallel);
}

}  // namespace pyprune
