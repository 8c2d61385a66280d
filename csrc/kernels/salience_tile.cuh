// The first pass of the salience kernel: one block of threads per tile.
//
// Tile       kTileRows rows x 32 lanes of V columns, where V elements of the weight are one 16-byte word.
// Thread     lane l of every warp owns columns l*V .. l*V+V-1 of the tile and holds their sums in registers; warp k has
//            rows 4k .. 4k+3 of every 32, with all loads of the four rows in flight before the first is used.
// Row sums   a butterfly over the lanes of a warp, written by lanes 0..3: complete for this tile's columns.
// Col sums   the eight warps' registers, added in order through shared memory at the end of the tile.
// Bytes      weight (and gradient, and curvature) once; partial sums 8 / (V * 32) + 8 / kTileRows bytes an element,
//            about 1% of what is read for bfloat16 weights and gradients.
// Floor      the bytes of the inputs over the memory bandwidth.
#pragma once

#include "../common.h"
#include "device.cuh"
#include "formulas.cuh"

namespace pyprune {

constexpr int kSalienceThreads = 256;
constexpr int kSalienceWarps = kSalienceThreads / 32;
constexpr int kSalienceTileRows = 512;

// A tensor as the first pass sees it.
struct SalienceEntry {
  SalienceTensor tensor;
  float* row_parts;  // [batches, col_tiles, rows]
  float* col_parts;  // [batches, row_tiles, cols]
  int64_t row_tiles, col_tiles;
  bool aligned;  // every row of every input starts at a multiple of 16 bytes
};

enum class LoadMode { aligned, shifted, ragged };

// A lane's V columns of one row.
template <class F, class W, class G, int V>
struct LaneRow {
  Packed<W, V> weight;
  Packed<G, V> grad;
  Packed<float, V> curvature;

  template <LoadMode MODE>
  __device__ void load(const W* w, const G* g, const float* h, int valid) {
    if constexpr (MODE == LoadMode::ragged) {
      weight.load_some(w, valid);
      if constexpr (F::grad) grad.load_some(g, valid);
      if constexpr (F::curvature) curvature.load_some(h, valid);
    } else {
      constexpr bool kAligned = MODE == LoadMode::aligned;
      if (valid == V) {
        weight.template load<kAligned>(w);
        if constexpr (F::grad) grad.template load<kAligned>(g);
        if constexpr (F::curvature) curvature.template load<kAligned>(h);
      } else {
        weight.clear();
        if constexpr (F::grad) grad.clear();
        if constexpr (F::curvature) curvature.clear();
      }
    }
  }

  // Adds the row to the columns' sums and returns the lane's share of the row's sum.
  __device__ float add_to(float (&cols)[V]) const {
    float row = 0.0f;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float g = F::grad ? grad.at(v) : 0.0f;
      const float h = F::curvature ? curvature.at(v) : 0.0f;
      const float s = F::at(weight.at(v), g, h);
      row += s;
      cols[v] += s;
    }
    return row;
  }
};

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// Rows begin .. end - 1 of a tile for one warp. Pointers are at the lane's first column of row 0 of the batch.
template <class F, class W, class G, int V, LoadMode MODE>
__device__ void warp_rows(const W* w, int64_t w_stride, const G* g, int64_t g_stride, const float* h, int64_t h_stride,
                          int64_t begin, int64_t end, int valid, float* row_sums, float (&cols)[V]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t r = begin + 4 * warp; r < end; r += 4 * kSalienceWarps) {
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (MODE != LoadMode::ragged && r + 4 <= end) {
      LaneRow<F, W, G, V> rows[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        rows[k].template load<MODE>(w + (r + k) * w_stride, g + (r + k) * g_stride, h + (r + k) * h_stride, valid);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) sums[k] = warp_sum(rows[k].add_to(cols));
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (r + k < end) {
          LaneRow<F, W, G, V> row;
          row.template load<MODE>(w + (r + k) * w_stride, g + (r + k) * g_stride, h + (r + k) * h_stride, valid);
          sums[k] = warp_sum(row.add_to(cols));
        }
      }
    }
    if (lane < 4 && r + lane < end) {
      row_sums[r + lane] = lane == 0 ? sums[0] : lane == 1 ? sums[1] : lane == 2 ? sums[2] : sums[3];
    }
  }
}

// grid: the tiles of all entries; first [count + 1]: tiles before each entry.
template <class F, class W, class G>
__global__ void __launch_bounds__(kSalienceThreads, 2)
    salience_tiles(const SalienceEntry* entries, const int64_t* first, int count) {
  constexpr int V = 16 / static_cast<int>(sizeof(W));
  constexpr int kTileCols = 32 * V;
  __shared__ float shared[kSalienceWarps][kTileCols];

  const int index = tensor_of(first, count, blockIdx.x);
  const SalienceEntry& e = entries[index];
  const SalienceTensor& t = e.tensor;
  const int64_t tile = static_cast<int64_t>(blockIdx.x) - first[index];
  const int64_t col_tile = tile % e.col_tiles, row_tile = tile / e.col_tiles % e.row_tiles;
  const int64_t batch = tile / (e.col_tiles * e.row_tiles);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first_col = col_tile * kTileCols, col = first_col + lane * V;
  const int64_t begin = row_tile * kSalienceTileRows;
  const int64_t end = begin + kSalienceTileRows < t.rows ? begin + kSalienceTileRows : t.rows;
  const int64_t left = t.cols - col;
  const int valid = left >= V ? V : left > 0 ? static_cast<int>(left) : 0;

  const W* w = static_cast<const W*>(t.weight.data) + batch * t.weight.batch_stride + col;
  const G* g = F::grad ? static_cast<const G*>(t.grad.data) + batch * t.grad.batch_stride + col : nullptr;
  const float* h =
      F::curvature ? static_cast<const float*>(t.curvature.data) + batch * t.curvature.batch_stride + col : nullptr;
  float* row_sums = e.row_parts + (batch * e.col_tiles + col_tile) * t.rows;
  float* col_sums = e.col_parts + (batch * e.row_tiles + row_tile) * t.cols;

  float cols[V];
#pragma unroll
  for (int v = 0; v < V; ++v) cols[v] = 0.0f;

  const int64_t ws = t.weight.row_stride, gs = t.grad.row_stride, hs = t.curvature.row_stride;
  const bool ragged = t.cols - first_col < kTileCols && t.cols % V != 0;  // the same for all threads of the block
  if (ragged) {
    warp_rows<F, W, G, V, LoadMode::ragged>(w, ws, g, gs, h, hs, begin, end, valid, row_sums, cols);
  } else if (e.aligned) {
    warp_rows<F, W, G, V, LoadMode::aligned>(w, ws, g, gs, h, hs, begin, end, valid, row_sums, cols);
  } else {
    warp_rows<F, W, G, V, LoadMode::shifted>(w, ws, g, gs, h, hs, begin, end, valid, row_sums, cols);
  }

#pragma unroll
  for (int v = 0; v < V; ++v) shared[warp][lane * V + v] = cols[v];
  __syncthreads();
  for (int c = threadIdx.x; c < kTileCols; c += kSalienceThreads) {
    if (first_col + c >= t.cols) break;
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < kSalienceWarps; ++k) sum += shared[k][c];
    col_sums[first_col + c] = sum;
  }
}

// Launches the first pass of entries that have these types.
template <class F>
cudaError_t launch_salience_tiles(Dtype dtype, Dtype grad_dtype, const SalienceEntry* entries, const int64_t* first,
                                  int count, int64_t tiles, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(tiles)), block(kSalienceThreads);
  const bool wide_grad = F::grad && grad_dtype == Dtype::float32;
  if (dtype == Dtype::float32) {
    salience_tiles<F, float, float><<<grid, block, 0, stream>>>(entries, first, count);
  } else if (dtype == Dtype::bfloat16 && !wide_grad) {
    salience_tiles<F, __nv_bfloat16, __nv_bfloat16><<<grid, block, 0, stream>>>(entries, first, count);
  } else if (dtype == Dtype::float16 && !wide_grad) {
    salience_tiles<F, __half, __half><<<grid, block, 0, stream>>>(entries, first, count);
  } else if constexpr (F::grad) {
    if (dtype == Dtype::bfloat16) {
      salience_tiles<F, __nv_bfloat16, float><<<grid, block, 0, stream>>>(entries, first, count);
    } else if (dtype == Dtype::float16) {
      salience_tiles<F, __half, float><<<grid, block, 0, stream>>>(entries, first, count);
    } else {
      return cudaErrorInvalidValue;
    }
  } else {
    return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

// One per formula, each in a file of its own so that they compile side by side.
#define PYPRUNE_SALIENCE_LAUNCHER(name)                                                                        \
  cudaError_t launch_##name(Dtype dtype, Dtype grad_dtype, const SalienceEntry* entries, const int64_t* first, \
                            int count, int64_t tiles, cudaStream_t stream)
PYPRUNE_SALIENCE_LAUNCHER(abs);
PYPRUNE_SALIENCE_LAUNCHER(square);
PYPRUNE_SALIENCE_LAUNCHER(taylor_signed);
PYPRUNE_SALIENCE_LAUNCHER(taylor_abs);
PYPRUNE_SALIENCE_LAUNCHER(fisher);
PYPRUNE_SALIENCE_LAUNCHER(mixed);

}  // namespace pyprune
