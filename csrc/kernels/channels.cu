// Sums over tokens, channel by channel: of products of two tensors, sample by sample, or of one tensor and its squares.
// In a ChannelCall samples are batches, tokens rows, and channels columns.
//
// Tile     32 lanes of V channels (V elements are one 16-byte word) x a number of tokens of one sample: as many as
//          leave a thousand tiles or more, 32 to 512.
// Thread   lane l of every warp owns channels l*V .. l*V+V-1 and holds their sums in registers; warp k takes tokens
//          4k .. 4k+3 of every 32, with all loads of the four in flight before the first is used.
// Sums     the eight warps' registers, added in order through shared memory; then the tiles of a sample, in order.
// Bytes    the tensors once; partial sums 4 (moments: 8) bytes a channel and tile.
// Floor    the bytes of the tensors over the memory bandwidth.

#include "channels.h"

#include <algorithm>

#include "../planning/chunks.h"
#include "device.cuh"
#include "parts.h"

namespace pyprune {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kRound = 4 * kWarps;  // tokens of a block at once
constexpr int kMaxRounds = 16;
constexpr int64_t kEnoughTiles = 1024;

struct Job {
  Matrix a, b;
  int64_t tokens, channels;
  int64_t channel_tiles, token_tiles, tile_tokens;
  bool aligned;
  float* sums;     // [batches, token_tiles, channels]
  float* squares;  // likewise
};

template <class T, int V>
__device__ inline void load_channels(Packed<T, V>& to, const T* from, int valid, bool aligned) {
  if (valid < V) {
    to.load_some(from, valid);
  } else if (aligned) {
    to.template load<true>(from);
  } else {
    to.template load<false>(from);
  }
}

// The warps' sums of a tile, in order of the warps.
template <int V>
__device__ void write_sums(float (*shared)[32 * V], const float (&sums)[V], float* out, int64_t left) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int v = 0; v < V; ++v) shared[warp][lane * V + v] = sums[v];
  __syncthreads();
  for (int c = threadIdx.x; c < 32 * V && c < left; c += kThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < kWarps; ++k) sum += shared[k][c];
    out[c] = sum;
  }
}

template <class T, bool DOTS>
__global__ void __launch_bounds__(kThreads, 2) channel_tiles(const Job job) {
  constexpr int V = 16 / static_cast<int>(sizeof(T));
  __shared__ float shared[DOTS ? 1 : 2][kWarps][32 * V];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t channel_tile = blockIdx.x % job.channel_tiles;
  const int64_t rest = blockIdx.x / job.channel_tiles;  // sample * token_tiles + token tile
  const int64_t batch = rest / job.token_tiles, begin = rest % job.token_tiles * job.tile_tokens;
  const int64_t end = begin + job.tile_tokens < job.tokens ? begin + job.tile_tokens : job.tokens;
  const int64_t first = channel_tile * 32 * V, channel = first + lane * V, left = job.channels - channel;
  const int valid = left >= V ? V : left > 0 ? static_cast<int>(left) : 0;
  const T* a = static_cast<const T*>(job.a.data) + batch * job.a.batch_stride + channel;
  const T* b = DOTS ? static_cast<const T*>(job.b.data) + batch * job.b.batch_stride + channel : nullptr;

  float sums[V], squares[V];
#pragma unroll
  for (int v = 0; v < V; ++v) sums[v] = squares[v] = 0.0f;
  for (int64_t t = begin + 4 * warp; t < end; t += kRound) {
    Packed<T, V> x[4], y[DOTS ? 4 : 1];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int here = t + k < end ? valid : 0;
      load_channels(x[k], a + (t + k) * job.a.row_stride, here, job.aligned);
      if constexpr (DOTS) load_channels(y[k], b + (t + k) * job.b.row_stride, here, job.aligned);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if constexpr (DOTS) {
          sums[v] += x[k].at(v) * y[k].at(v);
        } else {
          sums[v] += x[k].at(v);
          squares[v] += x[k].at(v) * x[k].at(v);
        }
      }
    }
  }
  write_sums<V>(shared[0], sums, job.sums + rest * job.channels + first, job.channels - first);
  if constexpr (!DOTS)
    write_sums<V>(shared[1], squares, job.squares + rest * job.channels + first, job.channels - first);
}

Job job_of(const ChannelCall& c) {
  Job job{};
  job.a = c.a, job.b = c.b;
  job.tokens = c.rows, job.channels = c.cols;
  job.channel_tiles = ceil_div(c.cols, 32 * (16 / size_of(c.dtype)));
  // A sample without tokens still has sums: zeros, written by a tile that reads nothing.
  const int64_t rounds = ceil_div(std::max<int64_t>(c.rows, 1), kRound);
  const int64_t all = job.channel_tiles * c.batches * rounds;
  job.tile_tokens = kRound * std::clamp<int64_t>(all / kEnoughTiles, 1, kMaxRounds);
  job.token_tiles = ceil_div(std::max<int64_t>(c.rows, 1), job.tile_tokens);
  job.aligned = rows_aligned(c.a, c.dtype, c.batches, c.rows) && rows_aligned(c.b, c.dtype, c.batches, c.rows);
  return job;
}

template <class T>
void launch(const Job& job, bool dots, unsigned grid, cudaStream_t stream) {
  if (dots) {
    channel_tiles<T, true><<<grid, kThreads, 0, stream>>>(job);
  } else {
    channel_tiles<T, false><<<grid, kThreads, 0, stream>>>(job);
  }
}

// Whether what a tile sums up is the result.
bool one_part(const ChannelCall& c, const Job& job) {
  return job.token_tiles == 1 && (c.batches == 1 || c.b.data != nullptr);
}

}  // namespace

int64_t channel_workspace(const ChannelCall& c) {
  const Job job = job_of(c);
  const int64_t sums = c.b.data == nullptr ? 2 : 1;
  const int64_t parts = sums * c.batches * job.token_tiles * c.cols * static_cast<int64_t>(sizeof(float));
  return one_part(c, job) ? 0 : parts;
}

cudaError_t channel_sums_cuda(const ChannelCall& c, void* workspace, cudaStream_t stream) {
  Job job = job_of(c);
  const int64_t tiles = job.channel_tiles * job.token_tiles * c.batches;
  if (tiles == 0) return cudaSuccess;
  if (tiles > INT32_MAX) return cudaErrorInvalidConfiguration;
  const bool dots = c.b.data != nullptr, whole = one_part(c, job);
  float* parts = static_cast<float*>(workspace);
  float* const sums = static_cast<float*>(c.sums);
  float* const squares = static_cast<float*>(c.squares);
  job.sums = whole ? sums : parts;
  job.squares = whole ? squares : parts + c.batches * job.token_tiles * c.cols;
  const unsigned grid = static_cast<unsigned>(tiles);
  if (c.dtype == Dtype::bfloat16) {
    launch<__nv_bfloat16>(job, dots, grid, stream);
  } else if (c.dtype == Dtype::float16) {
    launch<__half>(job, dots, grid, stream);
  } else if (c.dtype == Dtype::float32) {
    launch<float>(job, dots, grid, stream);
  } else {
    return cudaErrorInvalidValue;
  }
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess || whole) return status;
  const int64_t pieces = ceil_div(c.cols, kReduceCols);
  if (dots) return add_two({job.sums, sums, job.token_tiles, c.cols, pieces}, c.batches, {}, 0, stream);
  const int64_t parts_of_all = c.batches * job.token_tiles;
  return add_two({job.sums, sums, parts_of_all, c.cols, pieces}, 1,
                 {job.squares, squares, parts_of_all, c.cols, pieces}, 1, stream);
}

}  // namespace pyprune
