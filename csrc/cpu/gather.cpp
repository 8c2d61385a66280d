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
#include <unistd.h>
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

// A cache line. Rows of whole lines share none with their neighbours.
constexpr int64_t kLine = 64;

// Shorter rows are not worth an address each.
constexpr int64_t kStreamRow = 256;

// What is read this many bytes later is asked for in advance: along kept rows, which no hardware prefetcher knows, and
// along rows in order, where less is enough and more is slower. Of 1, 2 and 4 KiB the best each (one core of a Zen 4).
constexpr int64_t kLead = 4096;
constexpr int64_t kLeadInOrder = 1024;

// Rows that straddle lines are joined here, within the nearest cache, before they are written past the caches.
constexpr int64_t kStage = 8192;

// A piece of a permutation costs about a third of a run, whose length a branch has to follow.
constexpr int64_t kPiecesPerRun = 3;

struct Plan {
  std::vector<int64_t> batches, rows;                  // source positions; empty when whole
  std::shared_ptr<const PermutationPlan> permutation;  // of kept columns, or else
  std::vector<ByteRun> runs;
  int64_t loose = 0;  // leading runs whose overrun stays within the row
  int64_t row_bytes = 0;
};

// Permutations made so far; coupled tensors, and the same ones of other layers, are often cut at the same columns.
class Permutations {
 public:
  explicit Permutations(int64_t word_bytes) : word_bytes_(word_bytes) {}

  // Null where there is no such form, or runs are quicker.
  std::shared_ptr<const PermutationPlan> of(const GatherTensor& t) {
    const KeptRuns& kept = t.kept_cols;
    const size_t bytes = static_cast<size_t>(kept.count) * sizeof(Run);
    for (const Made& m : made_) {
      if (m.element_size == t.element_size && m.cols == t.cols && m.kept.count == kept.count &&
          std::memcmp(m.kept.runs, kept.runs, bytes) == 0) {
        return m.plan;
      }
    }
    auto plan = std::make_shared<const PermutationPlan>(kept, t.element_size, t.cols, t.out_cols, word_bytes_);
    const int64_t words = word_bytes_ == 0 ? 0 : ceil_div(t.out_cols * t.element_size, word_bytes_);
    if (plan->empty() || plan->pieces() > words + kPiecesPerRun * kept.count) plan = nullptr;
    if (made_.size() == kRemembered) made_.erase(made_.begin());
    made_.push_back({t.element_size, t.cols, kept, plan});
    return plan;
  }

 private:
  struct Made {
    int64_t element_size, cols;
    KeptRuns kept;
    std::shared_ptr<const PermutationPlan> plan;
  };
  static constexpr size_t kRemembered = 4;
  int64_t word_bytes_;
  std::vector<Made> made_;
};

Plan plan_of(const GatherTensor& t, Permutations& permutations) {
  Plan p;
  if (!t.kept_batches.whole) p.batches = expand_runs(t.kept_batches.runs, t.kept_batches.count);
  if (!t.kept_rows.whole) p.rows = expand_runs(t.kept_rows.runs, t.kept_rows.count);
  p.row_bytes = t.out_cols * t.element_size;
  if (t.kept_cols.whole || p.row_bytes == 0) return p;
  // Planning reads every kept column once, which a single row does not repay.
  if (t.out_batches * t.out_rows > 1) {
    p.permutation = permutations.of(t);
    if (p.permutation) return p;
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

// The source's rows in the order of the destination's.
class Rows {
 public:
  Rows(const GatherTensor& t, const Plan& plan, bool large)
      : large_(large),
        t_(t),
        plan_(plan),
        row_stride_(t.row_stride * t.element_size),
        batch_stride_(t.batch_stride * t.element_size) {
    last_ = t.out_batches * t.out_rows - 1;
    lead_bytes_ = t.kept_rows.whole ? kLeadInOrder : kLead;
    lead_ = ceil_div(lead_bytes_, std::max<int64_t>(t.cols * t.element_size, 1));
  }

  const char* operator[](int64_t row) const {
    const int64_t b = t_.out_batches == 1 ? 0 : row / t_.out_rows, r = row - b * t_.out_rows;
    const int64_t from_b = t_.kept_batches.whole ? b : plan_.batches[b];
    const int64_t from_r = t_.kept_rows.whole ? r : plan_.rows[r];
    return static_cast<const char*>(t_.source) + from_b * batch_stride_ + from_r * row_stride_;
  }

  // Where reading will be lead_bytes_ after the start of this row: a later row, or further on in a long one. Null where
  // the call is small and its tensors may well be in the caches.
  const char* ahead(int64_t row) const {
    if (!large_) return nullptr;
    return lead_ == 1 ? (*this)[row] + lead_bytes_ : (*this)[std::min(row + lead_, last_)];
  }

 private:
  bool large_;
  const GatherTensor& t_;
  const Plan& plan_;
  int64_t row_stride_, batch_stride_, last_, lead_, lead_bytes_;
};

// Joins rows and writes them past the caches, in whole lines.
class Stage {
 public:
  Stage(const CpuKernels& kernels, char* dest, int64_t row_bytes)
      : kernels_(kernels), dest_(dest), row_bytes_(row_bytes) {}

  char* next_row() {
    if (filled_ + row_bytes_ > kStage) flush(filled_ / kLine * kLine);
    filled_ += row_bytes_;
    return bytes_ + filled_ - row_bytes_;
  }

  void flush() { flush(filled_); }

 private:
  void flush(int64_t count) {
    kernels_.stream(bytes_, dest_, count, nullptr);
    std::memmove(bytes_, bytes_ + count, static_cast<size_t>(filled_ - count));
    dest_ += count;
    filled_ -= count;
  }

  const CpuKernels& kernels_;
  char* dest_;
  int64_t row_bytes_, filled_ = 0;
  alignas(kLine) char bytes_[kStage];
};

void copy_permuted(const CpuKernels& kernels, const Plan& p, const Rows& rows, char* dest, bool past_caches,
                   int64_t begin, int64_t end) {
  const Permutation permutation = p.permutation->view();
  const bool whole_lines = p.row_bytes % kLine == 0 && reinterpret_cast<uintptr_t>(dest) % kLine == 0;
  if (past_caches && !whole_lines && p.row_bytes <= kStage / 2) {
    Stage stage(kernels, dest, p.row_bytes);
    for (int64_t row = begin; row < end; ++row) {
      kernels.permute_row(rows[row], stage.next_row(), permutation, rows.ahead(row), false);
    }
    return stage.flush();
  }
  for (int64_t row = begin; row < end; ++row, dest += p.row_bytes) {
    kernels.permute_row(rows[row], dest, permutation, rows.ahead(row), past_caches && whole_lines);
  }
}

void copy_whole(const CpuKernels& kernels, const Plan& p, const Rows& rows, char* dest, bool past_caches, int64_t begin,
                int64_t end) {
  const bool whole_lines = p.row_bytes % kLine == 0 && reinterpret_cast<uintptr_t>(dest) % kLine == 0;
  if (past_caches && whole_lines && p.row_bytes >= kStreamRow) {
    for (int64_t row = begin; row < end; ++row, dest += p.row_bytes) {
      kernels.stream(rows[row], dest, p.row_bytes, rows.ahead(row));
    }
    return;
  }
  for (int64_t row = begin; row < end;) {
    const char* from = rows[row];
    int64_t block = 1;
    while (row + block < end && rows[row + block] == from + block * p.row_bytes) ++block;
    const int64_t bytes = block * p.row_bytes;
    if (past_caches && bytes >= kStreamPiece) {
      kernels.stream(from, dest, bytes, from + kLead);
    } else {
      std::memcpy(dest, from, static_cast<size_t>(bytes));
    }
    dest += bytes;
    row += block;
  }
}

void copy_rows(const CpuKernels& kernels, const GatherTensor& t, const Plan& p, bool large, bool past_caches,
               int64_t begin, int64_t end) {
  const Rows rows(t, p, large);
  char* dest = static_cast<char*>(t.dest) + begin * p.row_bytes;
  if (p.permutation) return copy_permuted(kernels, p, rows, dest, past_caches, begin, end);
  if (t.kept_cols.whole) return copy_whole(kernels, p, rows, dest, past_caches, begin, end);
  const int64_t runs = static_cast<int64_t>(p.runs.size());
  for (int64_t row = begin; row < end; ++row, dest += p.row_bytes) {
    kernels.copy_runs(rows[row], dest, p.runs.data(), p.loose, runs);
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

// Whether a result's memory is there already, judged by the page in its middle. The system clears a new page when it is
// first written, through the caches: written past them, its lines would go to memory and come back once more.
bool is_resident(const void* dest, int64_t bytes) {
#if defined(__linux__)
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t middle = (reinterpret_cast<uintptr_t>(dest) + static_cast<uintptr_t>(bytes) / 2) / page * page;
  unsigned char resident = 1;
  return mincore(reinterpret_cast<void*>(middle), page, &resident) != 0 || (resident & 1) != 0;
#else
  (void)dest, (void)bytes;
  return true;
#endif
}

}  // namespace

void gather_cpu(const GatherTensor* tensors, int64_t count, const Parallel& parallel) {
  const CpuKernels& kernels = cpu_kernels();
  std::vector<Plan> plans;
  std::vector<int64_t> sizes, limits;
  std::vector<char> resident;
  Permutations permutations(kernels.word_bytes);
  int64_t written = 0;
  for (int64_t i = 0; i < count; ++i) {
    plans.push_back(plan_of(tensors[i], permutations));
    const int64_t row_bytes = plans.back().row_bytes;
    sizes.push_back(row_bytes == 0 ? 0 : tensors[i].out_batches * tensors[i].out_rows);
    const int64_t bytes = sizes.back() * row_bytes;
    if (bytes >= kLargeBytes) advise_large_pages(tensors[i].dest, bytes);
    resident.push_back(is_resident(tensors[i].dest, bytes));
    written += bytes;
    limits.push_back(row_bytes == 0 ? 1 : ceil_div(kTaskBytes, row_bytes));
  }
  const bool large = written >= kStreamBytes;
  const std::vector<Chunk> tasks = chunk_plan(sizes.data(), limits.data(), count);
  for_each_task(parallel, static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const Chunk& task = tasks[i];
    const bool past_caches = large && resident[task.tensor];
    copy_rows(kernels, tensors[task.tensor], plans[task.tensor], large, past_caches, task.begin, task.end);
    if (past_caches) kernels.drain();
  });
}

}  // namespace pyprune
