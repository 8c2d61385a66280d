// Just enough of CUDA to compile the kernels of csrc/kernels with a C++ compiler and run them on the CPU.
//
// A block's threads are fibers that one processor thread runs in turn. They give way at __syncthreads and at the
// operations of a warp, which are carried out when all 32 lanes have arrived. Shared memory is static, and filled with
// NaN before each block; blocks run one after the other, or pair after pair. A launch is over when the call returns,
// or, where it is captured, is kept with the arguments that it has, to be run as often as one likes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define CUDART_VERSION 13000

#define __device__
#define __host__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__

enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorInvalidConfiguration,
  cudaErrorStreamCaptureUnsupported
};
using cudaStream_t = void*;
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum { cudaMemcpyHostToDevice };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
};
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum { cudaEnableDefault };
using cudaEvent_t = uint64_t*;  // how many copies were on their way when it was recorded
enum { cudaEventDisableTiming };
enum { cudaHostAllocDefault };

inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int bytes) {
  return bytes <= 227 * 1024 ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
// A graph would read the host's memory again whenever it is run, and is not to: refused where it is captured. A copy of
// page-locked memory is made when something waits for it: a launch, an event behind it, or another copy.
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, int kind, cudaStream_t stream);
cudaError_t cudaHostAlloc(void** memory, size_t bytes, int flags);
cudaError_t cudaFreeHost(void* memory);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, int flags);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream);
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int device);
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned version, int flags,
                                             cudaDriverEntryPointQueryResult* status);

struct dim3 {
  unsigned x;
  explicit dim3(unsigned n) : x(n) {}
  operator unsigned() const { return x; }
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(8) float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) {
  return {x, y};
}
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  return {x, y, z, w};
}
template <class T>
T __ldg(const T* at) {
  return *at;
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>(((static_cast<uint64_t>(high) << 32) | low) >> (shift & 31));
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

namespace emulator {

struct Index {
  unsigned x;
};
extern Index thread, block, grid;
extern unsigned rank;  // of the block, where two run together
constexpr int kSharedBytes = 227 * 1024;

// The shared memory of the two blocks: one that starts at an address like that of a GPU's, a multiple of 16.
struct alignas(1024) SharedMemory {
  char before[16];
  char bytes[kSharedBytes];
};
extern SharedMemory shared_memory[2];

void launch(unsigned grid, unsigned threads, int shared_bytes, const std::function<void()>& kernel, unsigned pair = 1);
void block_barrier();
void group_barrier(int number, unsigned threads);  // of some threads of a block
void group_arrival(int number, unsigned threads);  // arrives there and goes on
void pair_barrier();                               // of all threads of both blocks
[[noreturn]] void give_up();  // a thread has done what a GPU answers with an error, or with nonsense
void wait_until(const std::function<bool()>& there);

// Waits for all lanes of the warp; the last one to arrive runs `work` with what each lane brought.
void together(void* mine, const std::function<void(void* const (&lanes)[32])>& work);

}  // namespace emulator

#define threadIdx emulator::thread
#define blockIdx emulator::block
#define gridDim emulator::grid

inline void __syncthreads() {
  emulator::block_barrier();
}
inline void __syncwarp() {
  emulator::together(nullptr, [](void* const(&)[32]) {});
}
[[noreturn]] inline void __trap() {
  emulator::give_up();
}
inline float __shfl_xor_sync(uint32_t, float x, int offset) {
  struct Lane {
    float in, out;
  } mine{x, 0.0f};
  emulator::together(&mine, [&](void* const(&lanes)[32]) {
    for (int i = 0; i < 32; ++i) static_cast<Lane*>(lanes[i])->out = static_cast<Lane*>(lanes[i ^ offset])->in;
  });
  return mine.out;
}
