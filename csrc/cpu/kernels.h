// The kernels that are compiled once per instruction set, and the table through which the drivers call them.
//
// Files compiled with wider instruction sets include nothing of the C++ library: an inline library function compiled
// for AVX-512 could be the copy that the linker keeps for the whole program, and would then crash an older processor.
#pragma once

#include "../common.h"

namespace pyprune {

// Widest column tile of a salience kernel: as wide as the float column sums (32 KiB) stay near, since rows that are read
// whole come at a third more bytes a second than pieces of them.
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

// Bytes that a column copy may read and write past the end of a run.
constexpr int64_t kCopyWord = 64;

struct CpuKernels {
  const char* name;
  void (*salience_tile)(Formula formula, Dtype dtype, Dtype grad_dtype, const SalienceTile& tile);
  // curvature [count] += scale * grad [count]^2
  void (*accumulate)(void* curvature, const void* grad, int64_t count, Dtype grad_dtype, double scale);
  // One row: the first `loose` runs may overrun by a word (later runs overwrite it), the others are copied exactly.
  void (*copy_runs)(const char* source, char* dest, const ByteRun* runs, int64_t loose, int64_t count);
};

// The table for this processor: the widest set that it has, or the one named by PYPRUNE_CPU_ISA (baseline, avx2,
// avx512).
const CpuKernels& cpu_kernels();

}  // namespace pyprune
