// Sixteen lanes of float or double on whatever registers the file is compiled for.
//
// The number of lanes is fixed, and contraction to fused multiply-add is off, so sums are formed in the same order and
// with the same roundings on SSE2, AVX2 and AVX-512: a score does not depend on the machine it was computed on.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define PYPRUNE_REGISTER 64
#elif defined(__AVX2__)
#define PYPRUNE_REGISTER 32
#else
#define PYPRUNE_REGISTER 16
#endif

#define PYPRUNE_INLINE inline __attribute__((always_inline))
#define PYPRUNE_EACH_PART _Pragma("GCC unroll 16") for (int i = 0; i < Vec::parts; ++i)

namespace pyprune {
namespace PYPRUNE_ISA {

constexpr int kLanes = 16;

// Elements whose lines are asked for together: whole lines of the narrowest type, for which none is asked twice.
constexpr int kAsked = 32;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
struct Vec {
  static constexpr int parts = kLanes * sizeof(T) / PYPRUNE_REGISTER;
  static constexpr int part_lanes = PYPRUNE_REGISTER / sizeof(T);
  typedef T Part __attribute__((vector_size(PYPRUNE_REGISTER)));
  Part part[parts];

  static PYPRUNE_INLINE Vec zero() {
    Vec v;
    PYPRUNE_EACH_PART v.part[i] = Part{};
    return v;
  }

  static PYPRUNE_INLINE Vec splat(T x) {
    Vec v;
    PYPRUNE_EACH_PART v.part[i] = x - Part{};
    return v;
  }

  PYPRUNE_INLINE void store(T* to) const { memcpy(to, part, sizeof(part)); }

  // Pairwise over the lanes, halves first: the same tree on every register width.
  PYPRUNE_INLINE T sum() const {
    T lane[kLanes];
    store(lane);
    for (int step = kLanes / 2; step > 0; step /= 2) {
      for (int k = 0; k < step; ++k) lane[k] += lane[k + step];
    }
    return lane[0];
  }
};

template <class T>
PYPRUNE_INLINE Vec<T> operator+(Vec<T> a, Vec<T> b) {
  using Vec = Vec<T>;
  PYPRUNE_EACH_PART a.part[i] += b.part[i];
  return a;
}

template <class T>
PYPRUNE_INLINE Vec<T> operator-(Vec<T> a, Vec<T> b) {
  using Vec = Vec<T>;
  PYPRUNE_EACH_PART a.part[i] -= b.part[i];
  return a;
}

template <class T>
PYPRUNE_INLINE Vec<T> operator*(Vec<T> a, Vec<T> b) {
  using Vec = Vec<T>;
  PYPRUNE_EACH_PART a.part[i] *= b.part[i];
  return a;
}

PYPRUNE_INLINE Vec<float> abs(Vec<float> a) {
  using Vec = Vec<float>;
  typedef uint32_t Bits __attribute__((vector_size(PYPRUNE_REGISTER)));
  PYPRUNE_EACH_PART a.part[i] = (Vec::Part)((Bits)a.part[i] & 0x7fffffffu);
  return a;
}

PYPRUNE_INLINE Vec<double> abs(Vec<double> a) {
  using Vec = Vec<double>;
  typedef uint64_t Bits __attribute__((vector_size(PYPRUNE_REGISTER)));
  PYPRUNE_EACH_PART a.part[i] = (Vec::Part)((Bits)a.part[i] & 0x7fffffffffffffffull);
  return a;
}

// Sixteen elements at any address, widened to the type of the sums.
template <class T>
PYPRUNE_INLINE Vec<T> load(const T* from) {
  Vec<T> v;
  memcpy(v.part, from, sizeof(v.part));
  return v;
}

typedef uint32_t Word32 __attribute__((vector_size(PYPRUNE_REGISTER)));
typedef uint16_t Word16 __attribute__((vector_size(PYPRUNE_REGISTER / 2)));

PYPRUNE_INLINE Vec<float> load(const BFloat16* from) {
  using Vec = Vec<float>;
  Vec v;
  PYPRUNE_EACH_PART {
    Word16 bits;
    memcpy(&bits, from + i * Vec::part_lanes, sizeof(bits));
    v.part[i] = (Vec::Part)(__builtin_convertvector(bits, Word32) << 16);
  }
  return v;
}

// IEEE half to single on integers: rebias the exponent, with infinities and subnormals put right.
PYPRUNE_INLINE Word32 widen_half(Word32 half) {
  typedef float Part __attribute__((vector_size(PYPRUNE_REGISTER)));
  const Word32 magnitude = (half & 0x7fffu) << 13;
  const Word32 exponent = magnitude & 0x0f800000u;
  const Word32 rebiased = magnitude + 0x38000000u;
  const Part subnormal = (Part)(rebiased + 0x00800000u) - (Part)(Word32{} + 0x38800000u);
  Word32 out = exponent == 0x0f800000u ? rebiased + 0x38000000u : rebiased;
  out = exponent == 0u ? (Word32)subnormal : out;
  return out | ((half & 0x8000u) << 16);
}

PYPRUNE_INLINE Vec<float> load(const Float16* from) {
  using Vec = Vec<float>;
  Vec v;
  PYPRUNE_EACH_PART {
    const Float16* at = from + i * Vec::part_lanes;
#if defined(__AVX512F__)
    v.part[i] = (Vec::Part)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
#elif defined(__F16C__)
    v.part[i] = (Vec::Part)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
#else
    Word16 bits;
    memcpy(&bits, at, sizeof(bits));
    v.part[i] = (Vec::Part)widen_half(__builtin_convertvector(bits, Word32));
#endif
  }
  return v;
}

// Asks for a cache line, whether or not such memory exists. Into the second-level cache: the first level has few
// buffers for lines on their way, and what is asked for early would keep them all from the loads at hand.
PYPRUNE_INLINE void ask_for(const void* line) {
  __builtin_prefetch(line, 0, 2);
}

// The cache lines of `count` elements `ahead` elements on.
template <int count, class T>
PYPRUNE_INLINE void prefetch(const T* at, int64_t ahead) {
  const uintptr_t place = reinterpret_cast<uintptr_t>(at) + static_cast<uintptr_t>(ahead) * sizeof(T);
#pragma GCC unroll 8
  for (size_t i = 0; i < count * sizeof(T); i += 64) ask_for(reinterpret_cast<const void*>(place + i));
}

// `count` elements, the others zero, which add nothing to any sum.
template <class T>
struct Padded {
  T data[kLanes];
  PYPRUNE_INLINE Padded(const T* from, int64_t count) {
    memset(data, 0, sizeof(data));
    memcpy(data, from, static_cast<size_t>(count) * sizeof(T));
  }
};

// Bytes between what is read and what is asked for ahead of it. From 256 to 1,536 it makes no difference; from 2,048 on
// in 16-bit types and from 4,096 on in float32 bytes come at four fifths of the rate (one core of a Zen 4), as what the
// hardware would have asked for by itself is no longer met.
constexpr int64_t kPrefetchBytes = 1024;

// Elements from a place in a row to what is read kPrefetchBytes later: so far on where row follows row in memory, else
// the same place as few whole rows below as come to that.
template <class T>
PYPRUNE_INLINE int64_t prefetch_distance(int64_t cols, int64_t stride) {
  constexpr int64_t kAhead = kPrefetchBytes / static_cast<int64_t>(sizeof(T));
  if (cols == 0 || cols == stride) return kAhead;
  return (kAhead + cols - 1) / cols * stride;
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
