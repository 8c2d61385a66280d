// The kernels that are compiled once per instruction set, and the table through which the drivers call them.
//
// Files compiled with wider instruction sets include nothing of the C++ library: an inline library function compiled
// for AVX-512 could be the copy that the linker keeps for the whole program, and would then crash an older processor.
#pragma once

#include "../common.h"

namespace pyprune {

// Widest column tile of a salience kernel: as wide as the float column sums (32 KiB) stay near, since rows that are
// read whole come at a third more bytes a second than pieces of them.
constexpr int64_t kTileCols = 8192;

// Rows of a tile. Column sums of a tile are written once, so they cost 4 / (128 * bytes per element) of what is read.
constexpr int64_t kTileRows = 128;

// A tile of at most kTileRows x kTileCols elements. Strides in elements. Sums are written, not added to.
struct SalienceTile {
  const void* weight;
  const void* grad;
  const void* curvature;
  int64_t weight_stride, grad_stride, curvature_stride;
  int64_t rows, cols;
  void* row_sums;  // [rows]
  void* col_sums;  // [cols]
};

// A run of bytes within a row: length bytes from source to dest.
struct ByteRun {
  int64_t source;
  int64_t dest;
  int64_t length;
};

// Bytes that a copy of a run may read and write past its end.
constexpr int64_t kCopyWord = 64;

// Kept columns as permutations: the destination's row is cut into words of CpuKernels::word_bytes bytes, and each word
// is put together from one or more windows of the source, which are twice as long. A piece is a window's share of a
// word.
//
// Words of 64 bytes: lanes of 2 or 4 bytes; lane i of the index (of the same width) names the lane of the window that
// goes to lane i of the word, where the mask has bit i.
// Words of 16 bytes: lanes of 1 byte; the index has two halves of 16 bytes, one for each half of the window, which name
// the byte of that half, or 0x80 for none.
struct Piece {
  int64_t source;  // byte of the row at which the window begins
  uint32_t mask;
  uint32_t last;  // 1 for the last piece of a word
};

struct Permutation {
  const Piece* pieces;  // in the order of the words
  const char* indices;  // one for each piece, kIndexAlignment aligned
  int64_t lane_bytes;
  int64_t row_bytes;  // of the destination
};

constexpr int64_t kIndexAlignment = 64;

// Widest column tile of a channel kernel; its two rows of float sums take 32 KiB.
constexpr int64_t kChannelCols = 4096;

// A tile of at most kTileRows x kChannelCols elements of one tensor, or of two. Strides in elements.
struct ChannelTile {
  const void* a;
  const void* b;  // null: sums of a and of its squares; else sums of a * b
  int64_t a_stride, b_stride;
  int64_t rows, cols;
  void* sums;     // [cols], written
  void* squares;  // [cols], written when b is null
};

// Most rows of a weight that one task scores from activations: a multiple of every panel_rows.
constexpr int64_t kActivationRows = 96;

// Up to kActivationRows rows of a weight, scored from activations. Panels hold neighbouring channels of all tokens,
// float32, zero beyond the last channel: [samples, panels, tokens, panel_rows or panel_cols].
struct ActivationRows {
  Formula formula;
  Dtype dtype;  // of the weight
  const float* row_panels;
  const float* col_panels;
  int64_t row_sample, col_sample;  // elements from one sample's panels to the next one's
  const void* weight;              // its first row here
  int64_t weight_stride;
  int64_t samples, tokens, rows, cols;
  float gradient_scale, curvature_scale;
  float* row_sums;  // [rows], written
  float* col_sums;  // [cols], written: sums over these rows
};

struct CpuKernels {
  const char* name;
  void (*salience_tile)(Formula formula, Dtype dtype, Dtype grad_dtype, const SalienceTile& tile);
  // curvature [count] += scale * grad [count]^2
  void (*accumulate)(void* curvature, const void* grad, int64_t count, Dtype grad_dtype, double scale);
  void (*channel_tile)(Dtype dtype, const ChannelTile& tile);
  // One row: the first `loose` runs may overrun by a word (later runs overwrite it), the others are copied exactly.
  void (*copy_runs)(const char* source, char* dest, const ByteRun* runs, int64_t loose, int64_t count);
  int64_t word_bytes;  // of a permutation: 64, 16, or 0 where the instruction set has none
  // One row. `ahead` is a row that is read later and is asked for meanwhile, or null; such an address is never read, so
  // it may be any. past_caches needs `ahead` and a destination aligned to 64 bytes.
  void (*permute_row)(const char* source, char* dest, const Permutation& permutation, const char* ahead,
                      bool past_caches);
  // count bytes past the caches: the destination's lines are not read first, which is a third of a copy's traffic.
  // As many bytes from `ahead` on are asked for, unless it is null.
  void (*stream)(const char* source, char* dest, int64_t count, const char* ahead);
  // What was written past the caches is seen by others after this.
  void (*drain)();
  int64_t panel_rows, panel_cols;
  // One panel of `width` channels (panel_rows or panel_cols), of which `channels` exist; stride in elements.
  void (*pack_panel)(Dtype dtype, const void* from, int64_t stride, int64_t tokens, int64_t channels, int64_t width,
                     float* to);
  void (*activation_rows)(const ActivationRows& job);
};

// The table for this processor: the widest set that it has, or the one named by PYPRUNE_CPU_ISA (baseline, avx2,
// avx512).
const CpuKernels& cpu_kernels();

}  // namespace pyprune
