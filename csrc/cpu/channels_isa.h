// Sums over rows, channel by channel. Part of isa_kernels.cpp: compiled per instruction set.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace pyprune {
namespace PYPRUNE_ISA {

// What is summed beside the sum itself: x, x^2 of one tensor, or a * b of two.
struct Moments {
  static constexpr bool pair = false;
};
struct Dots {
  static constexpr bool pair = true;
};

// sums[c] and squares[c] of sixteen columns more; both stay in the first-level cache.
template <class F, class Acc, class T>
PYPRUNE_INLINE void add_channels(const T* a, const T* b, Acc* sums, Acc* squares) {
  const Vec<Acc> x = load(a);
  if (F::pair) {
    (load(sums) + x * load(b)).store(sums);
  } else {
    (load(sums) + x).store(sums);
    (load(squares) + x * x).store(squares);
  }
}

// A tile, row by row in the order of memory: every element is read once.
// Bytes moved: those of the elements. Floor: the same over the memory bandwidth; arithmetic stays below it.
template <class F, class Acc, class T>
void channels_of(const ChannelTile& t) {
  // Half a page apart modulo a page: processors take a load for one of a store's result when the last twelve bits of
  // their addresses agree, and wait for it.
  constexpr int64_t kHeld = kChannelCols + kLanes, kApart = 2048 / sizeof(Acc);
  alignas(64) Acc held[F::pair ? kHeld : 2 * kHeld + kApart];
  Acc *sums = held, *squares = held + (F::pair ? 0 : kHeld + kApart);
  const size_t bytes = static_cast<size_t>(t.cols) * sizeof(Acc);
  memset(sums, 0, bytes + kLanes * sizeof(Acc));
  if (!F::pair) memset(squares, 0, bytes + kLanes * sizeof(Acc));
  const T* a = static_cast<const T*>(t.a);
  const T* b = F::pair ? static_cast<const T*>(t.b) : a;
  const int64_t a_ahead = prefetch_distance<T>(t.cols, t.a_stride), b_ahead = prefetch_distance<T>(t.cols, t.b_stride);
  for (int64_t r = 0; r < t.rows; ++r) {
    int64_t c = 0;
    for (; c + kAsked <= t.cols; c += kAsked) {
      prefetch<kAsked>(a + c, a_ahead);
      if (F::pair) prefetch<kAsked>(b + c, b_ahead);
#pragma GCC unroll 8
      for (int k = 0; k < kAsked; k += kLanes) {
        add_channels<F>(a + c + k, b + c + k, sums + c + k, squares + c + k);
      }
    }
    for (; c + kLanes <= t.cols; c += kLanes) {
      add_channels<F>(a + c, b + c, sums + c, squares + c);
    }
    if (c < t.cols) {
      const Padded<T> last_a(a + c, t.cols - c), last_b(b + c, t.cols - c);
      add_channels<F>(last_a.data, last_b.data, sums + c, squares + c);
    }
    a += t.a_stride;
    b = F::pair ? b + t.b_stride : a;
  }
  memcpy(t.sums, sums, bytes);
  if (!F::pair) memcpy(t.squares, squares, bytes);
}

template <class F>
void channels_with(Dtype dtype, const ChannelTile& t) {
  switch (dtype) {
    case Dtype::float32:
      return channels_of<F, float, float>(t);
    case Dtype::float64:
      return channels_of<F, double, double>(t);
    case Dtype::bfloat16:
      return channels_of<F, float, BFloat16>(t);
    case Dtype::float16:
      return channels_of<F, float, Float16>(t);
  }
}

void channel_tile(Dtype dtype, const ChannelTile& t) {
  t.b != nullptr ? channels_with<Dots>(dtype, t) : channels_with<Moments>(dtype, t);
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
