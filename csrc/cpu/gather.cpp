// Kept slices: a task is a range of destination rows; neighbouring whole rows move as one block, kept columns are
// permuted into place. Bytes moved: those kept, read and written once. Floor: their sum over the memory bandwidth.

#include "gather.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../planning/chunks.h"
#include "../planning/runs.h"
#include "kernels.h"
#include "permutation.h"

namespace pyprune {
namespace {

// Bytes that one task writes.
constexpr int64_t kTaskBytes = 1 << 18;

// Results beyond this leave no room in the caches for anything else, so they are written past them.
constexpr int64_t kStreamBytes = 4 << 20;

// Results from this size on are given large pages.
constexpr int64_t kLargeBytes = 4 << 20;

// Shorter pieces are left to the caches even then: their lines are shared with neighbours.
constexpr int64_t kStreamPiece = 1024;

// A piece of a permutation costs about a third of a run, whose length a branch has to follow.
constexpr int64_t kPiecesPerRun = 3;

// Of the block of rows after the one at hand, this much is asked for in advance.
constexpr int64_t kPrefetchBlock = 2048;

struct Plan {
  std::vector<int64_t> batches, rows;            // source positions; empty when whole
  std::unique_ptr<PermutationPlan> permutation;  // of kept columns, or else
  std::vector<ByteRun> runs;
  int64_t loose = 0;  // leading runs whose overrun stays within the row
  int64_t row_bytes = 0;
};

Plan plan_of(const GatherTensor& t, int64_t word_bytes) {
  Plan p;
  if (!t.kept_batches.whole) p.batches = expand_runs(t.kept_batches.runs, t.kept_batches.count);
  if (!t.kept_rows.whole) p.rows = expand_runs(t.kept_rows.runs, t.kept_rows.count);
  p.row_bytes = t.out_cols * t.element_size;
  if (t.kept_cols.whole || p.row_bytes == 0) return p;
  // Planning reads every kept column once, which a single row does not repay.
  if (t.out_batches * t.out_rows > 1) {
    auto made = std::make_unique<PermutationPlan>(t.kept_cols, t.element_size, t.cols, t.out_cols, word_bytes);
    const int64_t words = word_bytes == 0 ? 0 : ceil_div(p.row_bytes, word_bytes);
    if (!made->empty() && made->pieces() <= words + kPiecesPerRun * t.kept_cols.count) {
      p.permutation = std::move(made);
      return p;
    }
  }
  const int64_t source_bytes = t.cols * t.element_size;
  bool loose = true;
  for (int64_t i = 0; i < t.kept_cols.count; ++i) {
    const Run& run = t.kept_cols.runs[i];
    p.runs.push_back({run.source * t.element_size, run.dest * t.element_size, run.length * t.element_size});
    const ByteRun& bytes = p.runs.back();
    const int64_t words = ceil_div(bytes.length, kCopyWord) * kCopyWord;
    loose = loose && bytes.source + words <= source_bytes && bytes.dest + words <= p.row_bytes;
    if (loose) ++p.loose;
  }
  return p;
}

void copy_rows(const CpuKernels& kernels, const GatherTensor& t, const Plan& p, bool past_caches, int64_t begin,
               int64_t end) {
  const char* source = static_cast<const char*>(t.source);
  char* dest = static_cast<char*>(t.dest) + begin * p.row_bytes;
  const int64_t stride = t.row_stride * t.element_size;
  const auto address = [&](int64_t row) {
    const int64_t b = row / t.out_rows, r = row % t.out_rows;
    const int64_t from_b = t.kept_batches.whole ? b : p.batches[b];
    const int64_t from_r = t.kept_rows.whole ? r : p.rows[r];
    return source + from_b * t.batch_stride * t.element_size + from_r * stride;
  };
  if (p.permutation) {
    const Permutation permutation = p.permutation->view();
    for (int64_t row = begin; row < end; ++row, dest += p.row_bytes) {
      kernels.permute_row(address(row), dest, permutation, past_caches);
    }
    return;
  }
  if (!t.kept_cols.whole) {
    const int64_t runs = static_cast<int64_t>(p.runs.size());
    for (int64_t row = begin; row < end; ++row, dest += p.row_bytes) {
      kernels.copy_runs(address(row), dest, p.runs.data(), p.loose, runs);
    }
    return;
  }
  for (int64_t row = begin; row < end;) {
    const char* from = address(row);
    int64_t block = 1;
    while (row + block < end && address(row + block) == from + block * p.row_bytes) ++block;
    const int64_t bytes = block * p.row_bytes;
    // The next block begins where no hardware prefetcher expects it.
    if (row + block < end) {
      const char* next = address(row + block);
      for (int64_t i = 0; i < std::min(p.row_bytes, kPrefetchBlock); i += 64) __builtin_prefetch(next + i);
    }
    if (past_caches && bytes >= kStreamPiece) {
      kernels.stream(from, dest, bytes);
    } else {
      std::memcpy(dest, from, static_cast<size_t>(bytes));
    }
    dest += bytes;
    row += block;
  }
}

// Asks for 2 MiB pages under a large result that is written for the first time. Memory that is new to the process comes
// page by page, and 4 KiB at a time that takes several times longer than the copy itself; smaller results rarely hold a
// whole 2 MiB page. A hint: where the system does not follow it, or the memory is there already, nothing changes.
void advise_large_pages(void* dest, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(dest) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(dest) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)dest, (void)bytes;
#endif
}

}  // namespace

void gather_cpu(const GatherTensor* tensors, int64_t count, const Parallel& parallel) {
  const CpuKernels& kernels = cpu_kernels();
  std::vector<Plan> plans;
  std::vector<int64_t> sizes, limits;
  int64_t written = 0;
  for (int64_t i = 0; i < count; ++i) {
    plans.push_back(plan_of(tensors[i], kernels.word_bytes));
    const int64_t row_bytes = plans.back().row_bytes;
    sizes.push_back(row_bytes == 0 ? 0 : tensors[i].out_batches * tensors[i].out_rows);
    const int64_t bytes = sizes.back() * row_bytes;
    if (bytes >= kLargeBytes) advise_large_pages(tensors[i].dest, bytes);
    written += bytes;
    limits.push_back(row_bytes == 0 ? 1 : ceil_div(kTaskBytes, row_bytes));
  }
  const bool past_caches = written >= kStreamBytes;
  const std::vector<Chunk> tasks = chunk_plan(sizes.data(), limits.data(), count);
  for_each_task(parallel, static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const Chunk& task = tasks[i];
    copy_rows(kernels, tensors[task.tensor], plans[task.tensor], past_caches, task.begin, task.end);
    if (past_caches) kernels.drain();
  });
}

}  // namespace pyprune
