// Kept positions as runs of neighbours, the form in which slices are moved.
#pragma once

#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

#include "../common.h"

namespace pyprune {

// Run-length coding of kept positions [count], in their order; a repeated or descending position starts a new run.
inline std::vector<Run> coalesce_runs(const int64_t* positions, int64_t count) {
  std::vector<Run> runs;
  for (int64_t i = 0; i < count; ++i) {
    if (!runs.empty() && runs.back().source + runs.back().length == positions[i]) {
      ++runs.back().length;
    } else {
      runs.push_back({positions[i], i, 1});
    }
  }
  return runs;
}

// The positions again: [sum of lengths].
inline std::vector<int64_t> expand_runs(const Run* runs, int64_t count) {
  std::vector<int64_t> positions;
  if (count > 0) positions.reserve(static_cast<size_t>(runs[count - 1].dest + runs[count - 1].length));
  for (int64_t i = 0; i < count; ++i) {
    positions.resize(positions.size() + static_cast<size_t>(runs[i].length));
    std::iota(positions.end() - runs[i].length, positions.end(), runs[i].source);
  }
  return positions;
}

// The widest word (16, 8, 4, 2 or 1 bytes) that divides every quantity it is asked about: addresses, strides, run
// starts and run lengths, all in bytes. Moving such words instead of elements keeps every access aligned.
class WordWidth {
 public:
  void must_divide(int64_t bytes) { all_ |= bytes; }
  int64_t bytes() const { return all_ & -all_; }  // the lowest bit of any of them

 private:
  int64_t all_ = 16;
};

}  // namespace pyprune
