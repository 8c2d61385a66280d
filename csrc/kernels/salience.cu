// Salience of many tensors: tables, and the launches of both passes.

#include "salience.h"

#include <algorithm>
#include <vector>

#include "../planning/chunks.h"
#include "parts.h"
#include "salience_tile.cuh"
#include "workspace.h"

namespace pyprune {
namespace {

// Entries of one pair of dtypes: one launch of the first pass.
struct Pair {
  Dtype dtype, grad_dtype;
  std::vector<SalienceEntry> entries;
  std::vector<int64_t> tiles;
};

// Everything that is sent to the device, with the partial sums behind it in the workspace.
struct Plan {
  std::vector<Pair> pairs;
  std::vector<Reduction> reductions;
  std::vector<int64_t> reduction_blocks;
};

struct Tiles {
  int64_t rows, cols;
};

// A tensor with no rows or no columns still has sums: zeros, written by a tile that reads nothing.
Tiles tiles_of(const SalienceTensor& t) {
  const int64_t tile_cols = 32 * (16 / size_of(t.dtype));
  return {std::max<int64_t>(1, ceil_div(t.rows, kSalienceTileRows)), std::max<int64_t>(1, ceil_div(t.cols, tile_cols))};
}

// Bytes that suffice for the table of `count` tensors: an entry, at most two reductions and the numbers before each,
// and for every launch (the pairs of dtypes, and the second pass) an end of two lists and their alignment.
int64_t table_bound(int64_t count) {
  constexpr int64_t kEach = sizeof(SalienceEntry) + 2 * sizeof(Reduction) + 3 * sizeof(int64_t), kLaunch = 2 * 16 + 8;
  return (count * kEach + (SaliencePasses::kPairs + 1) * kLaunch + 255) / 256 * 256;
}

Plan plan_of(Formula formula, const SalienceTensor* tensors, int64_t count) {
  Plan plan;
  for (int64_t i = 0; i < count; ++i) {
    const SalienceTensor& t = tensors[i];
    const Tiles tiles = tiles_of(t);
    SalienceEntry e{};
    e.tensor = t;
    e.row_tiles = tiles.rows, e.col_tiles = tiles.cols;
    e.aligned = rows_aligned(t.weight, t.dtype, t.batches, t.rows) &&
                rows_aligned(t.grad, t.grad_dtype, t.batches, t.rows) &&
                rows_aligned(t.curvature, Dtype::float32, t.batches, t.rows);
    const Dtype grad_dtype = reads_grad(formula) ? t.grad_dtype : t.dtype;
    auto pair = std::find_if(plan.pairs.begin(), plan.pairs.end(),
                             [&](const Pair& p) { return p.dtype == t.dtype && p.grad_dtype == grad_dtype; });
    if (pair == plan.pairs.end()) {
      plan.pairs.push_back({t.dtype, grad_dtype, {}, {}});
      pair = plan.pairs.end() - 1;
      pair->entries.reserve(static_cast<size_t>(count - i));
      pair->tiles.reserve(static_cast<size_t>(count - i));
    }
    pair->entries.push_back(e);
    pair->tiles.push_back(t.batches * e.row_tiles * e.col_tiles);
  }
  return plan;
}

// Points each entry at its partial sums, which are the outputs themselves where one tile holds them whole.
void place_parts(Plan& plan, float* parts) {
  for (Pair& pair : plan.pairs) {
    for (SalienceEntry& e : pair.entries) {
      const SalienceTensor& t = e.tensor;
      const auto place = [&](void* out, int64_t tiles, int64_t length) {
        float* sums = static_cast<float*>(out);
        if (tiles == 1) return sums;
        float* here = parts;
        parts += t.batches * tiles * length;
        const int64_t pieces = ceil_div(length, kReduceCols);
        plan.reductions.push_back({here, sums, tiles, length, pieces});
        plan.reduction_blocks.push_back(t.batches * pieces);
        return here;
      };
      e.row_parts = place(t.row_sums, e.col_tiles, t.rows);
      e.col_parts = place(t.col_sums, e.row_tiles, t.cols);
    }
  }
}

SaliencePasses passes_of(Formula formula, Table& table, const Plan& plan) {
  SaliencePasses passes{};
  passes.formula = formula;
  for (const Pair& pair : plan.pairs) {
    const std::vector<int64_t> first = first_items(pair.tiles);
    const SalienceEntry* entries = table.append(pair.entries);
    passes.first_pass[passes.launches++] = {
        pair.dtype,  pair.grad_dtype, entries, table.append(first), static_cast<int64_t>(pair.entries.size()),
        first.back()};
  }
  const std::vector<int64_t> first = first_items(plan.reduction_blocks);
  passes.reductions = table.append(plan.reductions);
  passes.first_reduction = table.append(first);
  passes.reduction_count = static_cast<int64_t>(plan.reductions.size());
  passes.reduction_blocks = first.back();
  return passes;
}

cudaError_t first_pass(Formula formula, const SalienceLaunch& l, cudaStream_t stream) {
  const int count = static_cast<int>(l.count);
  const int64_t tiles = l.blocks;
  if (tiles == 0) return cudaSuccess;
  if (tiles > INT32_MAX) return cudaErrorInvalidConfiguration;
  switch (formula) {
    case Formula::abs:
      return launch_abs(l.dtype, l.grad_dtype, l.entries, l.first, count, tiles, stream);
    case Formula::square:
      return launch_square(l.dtype, l.grad_dtype, l.entries, l.first, count, tiles, stream);
    case Formula::taylor_signed:
      return launch_taylor_signed(l.dtype, l.grad_dtype, l.entries, l.first, count, tiles, stream);
    case Formula::taylor_abs:
      return launch_taylor_abs(l.dtype, l.grad_dtype, l.entries, l.first, count, tiles, stream);
    case Formula::fisher:
      return launch_fisher(l.dtype, l.grad_dtype, l.entries, l.first, count, tiles, stream);
    case Formula::mixed:
      return launch_mixed(l.dtype, l.grad_dtype, l.entries, l.first, count, tiles, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int64_t salience_workspace(const SalienceTensor* tensors, int64_t count) {
  int64_t parts = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Tiles tiles = tiles_of(tensors[i]);
    if (tiles.cols > 1) parts += tensors[i].batches * tiles.cols * tensors[i].rows;
    if (tiles.rows > 1) parts += tensors[i].batches * tiles.rows * tensors[i].cols;
  }
  return table_bound(count) + parts * static_cast<int64_t>(sizeof(float));
}

cudaError_t prepare_salience_cuda(Formula formula, const SalienceTensor* tensors, int64_t count, void* workspace,
                                  cudaStream_t stream, SaliencePasses& passes) {
  Plan plan = plan_of(formula, tensors, count);
  if (plan.pairs.size() > SaliencePasses::kPairs) return cudaErrorInvalidValue;
  place_parts(plan, reinterpret_cast<float*>(static_cast<char*>(workspace) + table_bound(count)));
  Table table(workspace);
  passes = passes_of(formula, table, plan);
  if (table.size() > table_bound(count)) return cudaErrorInvalidValue;
  return table.send(stream);
}

cudaError_t launch_salience(const SaliencePasses& passes, cudaStream_t stream) {
  for (int32_t i = 0; i < passes.launches; ++i) {
    const cudaError_t status = first_pass(passes.formula, passes.first_pass[i], stream);
    if (status != cudaSuccess) return status;
  }
  return add_parts(passes.reductions, passes.first_reduction, static_cast<int>(passes.reduction_count),
                   passes.reduction_blocks, stream);
}

}  // namespace pyprune
