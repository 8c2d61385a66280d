// Kept columns of a row, planned once per tensor as permutations of windows; see Permutation.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "../common.h"
#include "kernels.h"

namespace pyprune {

class PermutationPlan {
 public:
  // Stays empty where this instruction set, element size or row has no such form.
  PermutationPlan(const KeptRuns& kept, int64_t element_size, int64_t source_cols, int64_t out_cols,
                  int64_t word_bytes) {
    lane_bytes_ = word_bytes == 64 ? std::min<int64_t>(element_size, 4) : 1;
    row_bytes_ = out_cols * element_size;
    word_bytes_ = word_bytes;
    source_lanes_ = source_cols * element_size / lane_bytes_;
    const bool wide_enough = source_cols * element_size >= 2 * word_bytes && row_bytes_ >= word_bytes;
    if (word_bytes == 0 || !wide_enough || (word_bytes == 64 && element_size == 1)) return;

    const int64_t per_element = element_size / lane_bytes_, word_lanes = word_bytes / lane_bytes_;
    int64_t to = 0;
    for (int64_t i = 0; i < kept.count; ++i) {
      const int64_t first = kept.runs[i].source * per_element, length = kept.runs[i].length * per_element;
      for (int64_t k = 0; k < length; ++k) {
        add(to, first + k);
        if (++to == word_lanes) {
          close(true);
          to = 0;
        }
      }
    }
    if (to > 0) close(true);
  }

  bool empty() const { return pieces_.empty(); }
  int64_t pieces() const { return static_cast<int64_t>(pieces_.size()); }

  // Valid as long as the plan.
  Permutation view() const {
    return {pieces_.data(), reinterpret_cast<const char*>(indices_.data()), lane_bytes_, row_bytes_};
  }

 private:
  struct Lane {
    int64_t to, from;
  };
  struct alignas(kIndexAlignment) Index64 {
    char bytes[64];
  };

  // Lane `to` of the word at hand comes from lane `from` of the source's row.
  void add(int64_t to, int64_t from) {
    const int64_t lower = lanes_.empty() ? from : std::min(lower_, from);
    const int64_t upper = lanes_.empty() ? from : std::max(upper_, from);
    if (upper - lower >= 2 * word_bytes_ / lane_bytes_) {
      close(false);
      lower_ = upper_ = from;
    } else {
      lower_ = lower;
      upper_ = upper;
    }
    lanes_.push_back({to, from});
  }

  // The lanes gathered so far become a piece. Its window begins at the lowest of them, or ends with the row.
  void close(bool last) {
    const int64_t begin = std::min(lower_, source_lanes_ - 2 * word_bytes_ / lane_bytes_);
    Piece piece = {begin * lane_bytes_, 0, last ? 1u : 0u};
    char* index = new_index();
    for (const Lane& lane : lanes_) {
      const int64_t from = lane.from - begin;
      if (lane_bytes_ == 1) {
        index[from / 16 * 16 + lane.to] = static_cast<char>(from % 16);
        continue;
      }
      piece.mask |= 1u << lane.to;
      const uint32_t entry = static_cast<uint32_t>(from);
      std::memcpy(index + lane.to * lane_bytes_, &entry, static_cast<size_t>(lane_bytes_));  // little-endian
    }
    pieces_.push_back(piece);
    lanes_.clear();
  }

  // Indices of 64 bytes, or of 32 of which two share a place.
  char* new_index() {
    if (word_bytes_ == 64) {
      indices_.push_back({});
      return indices_.back().bytes;
    }
    if (pieces_.size() % 2 == 0) {
      indices_.push_back({});
      std::memset(indices_.back().bytes, 0x80, 64);
    }
    return indices_.back().bytes + pieces_.size() % 2 * 32;
  }

  int64_t lane_bytes_, row_bytes_, word_bytes_, source_lanes_;
  int64_t lower_ = 0, upper_ = 0;
  std::vector<Lane> lanes_;
  std::vector<Piece> pieces_;
  std::vector<Index64> indices_;
};

}  // namespace pyprune
