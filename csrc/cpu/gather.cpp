// Kept slices: a task is a range of destination rows; neighbouring whole rows move as one block, kept columns run by
// run. Bytes moved: those kept, read and written once. Floor: their sum over the memory bandwidth.

#include "gather.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "../planning/chunks.h"
#include "../planning/runs.h"
#include "kernels.h"

namespace pyprune {
namespace {

// Bytes that one task writes.
constexpr int64_t kTaskBytes = 1 << 18;

struct Plan {
  std::vector<int64_t> batches, rows;  // source positions; empty when whole
  std::vector<ByteRun> cols;
  int64_t loose = 0;  // leading column runs whose overrun stays within the row
  int64_t row_bytes = 0;
};

Plan plan_of(const GatherTensor& t) {
  Plan p;
  if (!t.kept_batches.whole) p.batches = expand_runs(t.kept_batches.runs, t.kept_batches.count);
  if (!t.kept_rows.whole) p.rows = expand_runs(t.kept_rows.runs, t.kept_rows.count);
  p.row_bytes = t.out_cols * t.element_size;
  if (t.kept_cols.whole) return p;
  const int64_t source_bytes = t.cols * t.element_size;
  bool loose = true;
  for (int64_t i = 0; i < t.kept_cols.count; ++i) {
    const Run& run = t.kept_cols.runs[i];
    p.cols.push_back({run.source * t.element_size, run.dest * t.element_size, run.length * t.element_size});
    const ByteRun& bytes = p.cols.back();
    const int64_t words = ceil_div(bytes.length, kCopyWord) * kCopyWord;
    loose = loose && bytes.source + words <= source_bytes && bytes.dest + words <= p.row_bytes;
    if (loose) ++p.loose;
  }
  return p;
}

void copy_rows(const CpuKernels& kernels, const GatherTensor& t, const Plan& p, int64_t begin, int64_t end) {
  const char* source = static_cast<const char*>(t.source);
  char* dest = static_cast<char*>(t.dest) + begin * p.row_bytes;
  const int64_t stride = t.row_stride * t.element_size;
  const auto address = [&](int64_t row) {
    const int64_t b = row / t.out_rows, r = row % t.out_rows;
    const int64_t from_b = t.kept_batches.whole ? b : p.batches[b];
    const int64_t from_r = t.kept_rows.whole ? r : p.rows[r];
    return source + from_b * t.batch_stride * t.element_size + from_r * stride;
  };
  if (!t.kept_cols.whole) {
    const int64_t runs = static_cast<int64_t>(p.cols.size());
    for (int64_t row = begin; row < end; ++row, dest += p.row_bytes) {
      kernels.copy_runs(address(row), dest, p.cols.data(), p.loose, runs);
    }
    return;
  }
  for (int64_t row = begin; row < end;) {
    const char* from = address(row);
    int64_t block = 1;
    while (row + block < end && address(row + block) == from + block * p.row_bytes) ++block;
    std::memcpy(dest, from, static_cast<size_t>(block * p.row_bytes));
    dest += block * p.row_bytes;
    row += block;
  }
}

}  // namespace

void gather_cpu(const GatherTensor* tensors, int64_t count, const Parallel& parallel) {
  std::vector<Plan> plans;
  std::vector<int64_t> sizes, limits;
  for (int64_t i = 0; i < count; ++i) {
    plans.push_back(plan_of(tensors[i]));
    const int64_t row_bytes = plans.back().row_bytes;
    sizes.push_back(row_bytes == 0 ? 0 : tensors[i].out_batches * tensors[i].out_rows);
    limits.push_back(row_bytes == 0 ? 1 : ceil_div(kTaskBytes, row_bytes));
  }
  const std::vector<Chunk> tasks = chunk_plan(sizes.data(), limits.data(), count);
  const CpuKernels& kernels = cpu_kernels();
  for_each_task(parallel, static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const Chunk& task = tasks[i];
    copy_rows(kernels, tensors[task.tensor], plans[task.tensor], task.begin, task.end);
  });
}

}  // namespace pyprune
