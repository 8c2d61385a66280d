// A table's way to the device.

#include "workspace.h"

#include <algorithm>

namespace pyprune {
namespace {

constexpr int kThreads = 256;
constexpr int kWords = 250;  // with their number and address less than the 4 KiB of arguments that every launch takes

struct Piece {
  uint4 words[kWords];
  int count;
};
static_assert(kWords <= kThreads, "a thread writes one word");

__global__ void __launch_bounds__(kThreads) put_piece(const __grid_constant__ Piece piece, uint4* to) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < piece.count) to[i] = piece.words[i];
}

}  // namespace

cudaError_t Table::send_to(void* device, cudaStream_t stream) const {
  if (bytes_.size() > sizeof(Piece::words)) {
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    const cudaError_t status = cudaStreamIsCapturing(stream, &capture);
    if (status != cudaSuccess) return status;
    if (capture == cudaStreamCaptureStatusNone)
      return cudaMemcpyAsync(device, bytes_.data(), bytes_.size(), cudaMemcpyHostToDevice, stream);
  }
  for (size_t at = 0; at < bytes_.size(); at += sizeof(Piece::words)) {
    const size_t here = std::min(sizeof(Piece::words), bytes_.size() - at);
    Piece piece{};
    piece.count = static_cast<int>((here + sizeof(uint4) - 1) / sizeof(uint4));
    std::memcpy(piece.words, bytes_.data() + at, here);
    put_piece<<<1, kThreads, 0, stream>>>(piece, reinterpret_cast<uint4*>(static_cast<char*>(device) + at));
    const cudaError_t status = cudaGetLastError();
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace pyprune
