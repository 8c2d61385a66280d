// What the kernels share on the device: loads of any alignment, widening, and the search for a block's tensor.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace pyprune {

__device__ inline float widen(float x) {
  return x;
}
__device__ inline float widen(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ inline float widen(__half x) {
  return __half2float(x);
}

// Sixteen bytes from an address that is a multiple of sixteen, through the read-only path.
__device__ inline uint4 load16_aligned(const void* address) {
  return __ldg(static_cast<const uint4*>(address));
}

// Bytes off .. off + 15 of two neighbouring words.
__device__ inline uint4 shifted(uint4 lo, uint4 hi, uint32_t off) {
  uint32_t a = lo.x, b = lo.y, c = lo.z, d = lo.w, e = hi.x, f = hi.y, g = hi.z;
  if (off & 8) {
    a = c, b = d, c = e, d = f, e = g, f = hi.w;
    g = 0;
  }
  if (off & 4) {
    a = b, b = c, c = d, d = e, e = f;
  }
  const uint32_t bits = (off & 3) * 8;
  return make_uint4(__funnelshift_r(a, b, bits), __funnelshift_r(b, c, bits), __funnelshift_r(c, d, bits),
                    __funnelshift_r(d, e, bits));
}

// A mask of the lowest `bytes` bytes of a word; none below zero, all from four on.
__device__ inline uint32_t low_bytes(int bytes) {
  return bytes <= 0 ? 0u : bytes >= 4 ? 0xffffffffu : (1u << (8 * bytes)) - 1;
}

// Sixteen bytes from any address that is a multiple of two: the two aligned words around it, shifted together. Both
// words hold at least one wanted byte, so nothing outside the tensor's own sixteen-byte granules is touched.
__device__ inline uint4 load16_shifted(const void* address) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  const uint32_t off = static_cast<uint32_t>(at & 15);
  const uint4* words = reinterpret_cast<const uint4*>(at - off);
  const uint4 lo = __ldg(words);
  return off == 0 ? lo : shifted(lo, __ldg(words + 1), off);
}

// The first `bytes` of sixteen from any address that is a multiple of two, the others zero. The second word is touched
// only when it holds wanted bytes.
__device__ inline uint4 load16_partial(const void* address, int bytes) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  const uint32_t off = static_cast<uint32_t>(at & 15);
  const uint4* words = reinterpret_cast<const uint4*>(at - off);
  const uint4 none = make_uint4(0, 0, 0, 0);
  const uint4 lo = bytes > 0 ? __ldg(words) : none;
  const uint4 hi = static_cast<int>(off) + bytes > 16 ? __ldg(words + 1) : none;
  uint4 x = shifted(lo, hi, off);
  x.x &= low_bytes(bytes);
  x.y &= low_bytes(bytes - 4);
  x.z &= low_bytes(bytes - 8);
  x.w &= low_bytes(bytes - 12);
  return x;
}

// COUNT elements of T as they lie in memory, in registers.
template <class T, int COUNT>
struct Packed {
  static constexpr int kWords = COUNT * static_cast<int>(sizeof(T)) / 16;
  static_assert(kWords * 16 == COUNT * static_cast<int>(sizeof(T)), "whole 16-byte words");
  uint4 word[kWords];

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) word[i] = make_uint4(0, 0, 0, 0);
  }

  template <bool ALIGNED>
  __device__ void load(const T* from) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const T* at = from + i * (16 / static_cast<int>(sizeof(T)));
      word[i] = ALIGNED ? load16_aligned(at) : load16_shifted(at);
    }
  }

  // The first `valid` elements, the others zero.
  __device__ void load_some(const T* from, int valid) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      constexpr int kEach = 16 / static_cast<int>(sizeof(T));
      const int left = valid - i * kEach;
      word[i] = load16_partial(from + i * kEach, (left < 0 ? 0 : left < kEach ? left : kEach) * sizeof(T));
    }
  }

  __device__ float at(int i) const { return widen(reinterpret_cast<const T*>(word)[i]); }
};

__device__ inline float quad_sum(float x) {  // over the four lanes that share a row
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

__device__ inline float column_sum(float x) {  // over the eight lanes that share a column
  x += __shfl_xor_sync(0xffffffffu, x, 4);
  x += __shfl_xor_sync(0xffffffffu, x, 8);
  return x + __shfl_xor_sync(0xffffffffu, x, 16);
}

// The tensor that item `item` belongs to: the last t with first[t] <= item, where first[count] is the number of items.
// Tensors without items are passed over.
__device__ inline int tensor_of(const int64_t* first, int count, int64_t item) {
  int lo = 0, hi = count;
  while (hi - lo > 1) {
    const int mid = (lo + hi) / 2;
    if (first[mid] <= item) {
      lo = mid;
    } else {
      hi = mid;
    }
  }
  return lo;
}

}  // namespace pyprune
