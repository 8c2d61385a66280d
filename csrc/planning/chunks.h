// Cutting a list of unequal tensors into pieces of like size, so that many tensors are one launch.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace pyprune {

// Items begin .. end - 1 of one tensor.
struct Chunk {
  int64_t tensor;
  int64_t begin;
  int64_t end;
};

// Pieces of at most limits[i] items of each of the tensors, which have sizes[i] items; empty tensors give none.
inline std::vector<Chunk> chunk_plan(const int64_t* sizes, const int64_t* limits, int64_t tensors) {
  std::vector<Chunk> plan;
  for (int64_t t = 0; t < tensors; ++t) {
    const int64_t limit = std::max<int64_t>(limits[t], 1);
    for (int64_t begin = 0; begin < sizes[t]; begin += limit) {
      plan.push_back({t, begin, std::min(begin + limit, sizes[t])});
    }
  }
  return plan;
}

// first[i] = items before tensor i, first[tensors] = all of them: a thread block finds its tensor by bisection.
inline std::vector<int64_t> first_items(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> first(sizes.size() + 1, 0);
  for (size_t t = 0; t < sizes.size(); ++t) first[t + 1] = first[t] + sizes[t];
  return first;
}

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace pyprune
