// Squared gradients into curvatures, all tensors of one gradient dtype in a launch.
//
// Tile    8192 neighbouring elements of one tensor; a thread owns 8 of every 2048.
// Bytes   curvature read and written, gradient read: 8 + 2 or 8 + 4 an element.
// Floor   those bytes over the memory bandwidth.

#include "accumulate.h"

#include <vector>

#include "../planning/chunks.h"
#include "device.cuh"
#include "workspace.h"

namespace pyprune {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 8;
constexpr int kRounds = 4;
constexpr int64_t kTile = kThreads * kVector * kRounds;

struct Launch {
  Dtype grad_dtype;
  std::vector<AccumulateTensor> entries;
  std::vector<int64_t> tiles;
  const AccumulateTensor* device_entries;
  const int64_t* device_first;
};

template <class G>
__global__ void __launch_bounds__(kThreads)
    accumulate_tiles(const AccumulateTensor* entries, const int64_t* first, int count, float scale) {
  const int index = tensor_of(first, count, blockIdx.x);
  const AccumulateTensor& t = entries[index];
  const int64_t start = (static_cast<int64_t>(blockIdx.x) - first[index]) * kTile;
  float* curvature = static_cast<float*>(t.curvature);
  const G* grad = static_cast<const G*>(t.grad);
  const bool aligned = reinterpret_cast<uintptr_t>(curvature) % 16 == 0;
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int64_t i = start + (static_cast<int64_t>(round) * kThreads + threadIdx.x) * kVector;
    if (aligned && i + kVector <= t.size) {
      Packed<G, kVector> g;
      g.template load<false>(grad + i);
      float4* out = reinterpret_cast<float4*>(curvature + i);
      float4 lo = out[0], hi = out[1];
      lo.x += scale * (g.at(0) * g.at(0));
      lo.y += scale * (g.at(1) * g.at(1));
      lo.z += scale * (g.at(2) * g.at(2));
      lo.w += scale * (g.at(3) * g.at(3));
      hi.x += scale * (g.at(4) * g.at(4));
      hi.y += scale * (g.at(5) * g.at(5));
      hi.z += scale * (g.at(6) * g.at(6));
      hi.w += scale * (g.at(7) * g.at(7));
      out[0] = lo;
      out[1] = hi;
    } else {
      for (int64_t k = i; k < i + kVector && k < t.size; ++k) {
        const float g = widen(grad[k]);
        curvature[k] += scale * (g * g);
      }
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
