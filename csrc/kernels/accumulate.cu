// Squared gradients into curvatures, all tensors of one gradient dtype in a launch.
//
// Tile    8192 neighbouring elements of one tensor; a thread owns 4 of every 1024, so that what a warp stores at once
//         has no gaps, and has two such groups in flight. The end of a tensor, and one whose groups do not start at
//         multiples of their size, goes element by element, neighbours in neighbouring threads.
// Bytes   curvature read and written, gradient read: 8 + 2 or 8 + 4 an element.
// Floor   those bytes over the memory bandwidth.

#include "accumulate.h"

#include <type_traits>
#include <vector>

#include "../planning/chunks.h"
#include "device.cuh"
#include "workspace.h"

namespace pyprune {
namespace {

constexpr int kThreads = 256;
constexpr int kGroup = 4;
constexpr int kRounds = 8;
constexpr int kAtOnce = 2;
constexpr int64_t kTile = kThreads * kGroup * kRounds;

struct Launch {
  Dtype grad_dtype;
  std::vector<AccumulateTensor> entries;
  std::vector<int64_t> tiles;
  const AccumulateTensor* device_entries;
  const int64_t* device_first;
};

// All groups of a whole tile, from its first elements on.
template <class G>
__device__ void add_groups(float* curvature, const G* grad, float scale) {
  using Word = std::conditional_t<sizeof(G) == 4, uint4, uint2>;
  static_assert(sizeof(Word) == kGroup * sizeof(G), "one load");
#pragma unroll 1
  for (int round = 0; round < kRounds; round += kAtOnce) {
    Word words[kAtOnce];
    float4 sums[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int i = ((round + k) * kThreads + static_cast<int>(threadIdx.x)) * kGroup;
      words[k] = __ldg(reinterpret_cast<const Word*>(grad + i));
      sums[k] = *reinterpret_cast<const float4*>(curvature + i);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int i = ((round + k) * kThreads + static_cast<int>(threadIdx.x)) * kGroup;
      const G* const g = reinterpret_cast<const G*>(&words[k]);
      sums[k].x += scale * (widen(g[0]) * widen(g[0]));
      sums[k].y += scale * (widen(g[1]) * widen(g[1]));
      sums[k].z += scale * (widen(g[2]) * widen(g[2]));
      sums[k].w += scale * (widen(g[3]) * widen(g[3]));
      *reinterpret_cast<float4*>(curvature + i) = sums[k];
    }
  }
}

template <class G>
__global__ void __launch_bounds__(kThreads)
    accumulate_tiles(const AccumulateTensor* entries, const int64_t* first, int count, float scale) {
  const int index = tensor_of(first, count, blockIdx.x);
  const AccumulateTensor& t = entries[index];
  const int64_t start = (static_cast<int64_t>(blockIdx.x) - first[index]) * kTile;
  const int64_t left = t.size - start;
  float* const curvature = static_cast<float*>(t.curvature) + start;
  const G* const grad = static_cast<const G*>(t.grad) + start;
  const bool aligned = reinterpret_cast<uintptr_t>(curvature) % (kGroup * sizeof(float)) == 0 &&
                       reinterpret_cast<uintptr_t>(grad) % (kGroup * sizeof(G)) == 0;
  if (aligned && left >= kTile) {
    add_groups(curvature, grad, scale);
  } else {
    const int end = static_cast<int>(left < kTile ? left : kTile);
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < end; i += kThreads) {
      const float g = widen(__ldg(grad + i));
      curvature[i] += scale * (g * g);
    }
  }
}

std::vector<Launch> launches_of(const AccumulateTensor* tensors, int64_t count) {
  std::vector<Launch> launches;
  for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::float16}) {
    Launch launch{dtype, {}, {}, nullptr, nullptr};
    for (int64_t i = 0; i < count; ++i) {
      if (tensors[i].grad_dtype != dtype || tensors[i].size == 0) continue;
      launch.entries.push_back(tensors[i]);
      launch.tiles.push_back(ceil_div(tensors[i].size, kTile));
    }
    if (!launch.entries.empty()) launches.push_back(launch);
  }
  return launches;
}

void fill(Table& table, std::vector<Launch>& launches) {
  for (Launch& launch : launches) {
    launch.device_entries = table.append(launch.entries);
    launch.device_first = table.append(first_items(launch.tiles));
  }
}

}  // namespace

int64_t accumulate_workspace(const AccumulateTensor* tensors, int64_t count) {
  std::vector<Launch> launches = launches_of(tensors, count);
  Table table(nullptr);
  fill(table, launches);
  return table.size();
}

cudaError_t accumulate_square_cuda(const AccumulateTensor* tensors, int64_t count, double scale, void* workspace,
                                   cudaStream_t stream) {
  std::vector<Launch> launches = launches_of(tensors, count);
  Table table(workspace);
  fill(table, launches);
  cudaError_t status = table.send(stream);
  for (const Launch& l : launches) {
    const int64_t tiles = first_items(l.tiles).back();
    const int entries = static_cast<int>(l.entries.size());
    if (status != cudaSuccess) return status;
    if (tiles > INT32_MAX) return cudaErrorInvalidConfiguration;
    const unsigned grid = static_cast<unsigned>(tiles);
    const float factor = static_cast<float>(scale);
    if (l.grad_dtype == Dtype::float32) {
      accumulate_tiles<float><<<grid, kThreads, 0, stream>>>(l.device_entries, l.device_first, entries, factor);
    } else if (l.grad_dtype == Dtype::bfloat16) {
      accumulate_tiles<__nv_bfloat16><<<grid, kThreads, 0, stream>>>(l.device_entries, l.device_first, entries, factor);
    } else {
      accumulate_tiles<__half><<<grid, kThreads, 0, stream>>>(l.device_entries, l.device_first, entries, factor);
    }
    status = cudaGetLastError();
  }
  return status;
}

}  // namespace pyprune
