// Moving kept columns, and writing past the caches. Part of isa_kernels.cpp: compiled per instruction set.
//
// Bytes moved: the lines of the source that hold a kept element, and what is kept, once. Floor: their sum over the
// memory bandwidth.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"
#include "simd.h"

namespace pyprune {
namespace PYPRUNE_ISA {

// Kept columns are often short runs, with lengths that no branch predictor learns. Copying a whole word for each, and
// letting the next run overwrite what was too much, costs one load and one store and no misprediction.
void copy_runs(const char* source, char* dest, const ByteRun* runs, int64_t loose, int64_t count) {
  int64_t i = 0;
  for (; i < loose; ++i) {
    const char* from = source + runs[i].source;
    char* to = dest + runs[i].dest;
    int64_t left = runs[i].length;
    do {
      char word[kCopyWord];
      memcpy(word, from, kCopyWord);
      memcpy(to, word, kCopyWord);
      from += kCopyWord;
      to += kCopyWord;
      left -= kCopyWord;
    } while (left > 0);
  }
  for (; i < count; ++i) memcpy(dest + runs[i].dest, source + runs[i].source, static_cast<size_t>(runs[i].length));
}

#if defined(__AVX512F__)

constexpr int64_t kWordBytes = 64;
constexpr int64_t kIndexBytes = 64;
typedef __m512i Word;

template <int LANE>
PYPRUNE_INLINE Word permuted(const char* source, const Piece& piece, const char* index) {
  const __m512i order = _mm512_load_si512(index);
  const __m512i low = _mm512_loadu_si512(source + piece.source);
  const __m512i high = _mm512_loadu_si512(source + piece.source + 64);
  if (LANE == 4) return _mm512_maskz_permutex2var_epi32(static_cast<__mmask16>(piece.mask), low, order, high);
  return _mm512_maskz_permutex2var_epi16(piece.mask, low, order, high);
}

PYPRUNE_INLINE Word either(Word a, Word b) {
  return _mm512_or_si512(a, b);
}

PYPRUNE_INLINE void put(char* to, Word word) {
  _mm512_storeu_si512(to, word);
}

PYPRUNE_INLINE void put_past_caches(char* to, Word word) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), word);
}

#elif defined(__AVX2__)

constexpr int64_t kWordBytes = 16;
constexpr int64_t kIndexBytes = 32;
typedef __m128i Word;

template <int LANE>
PYPRUNE_INLINE Word permuted(const char* source, const Piece& piece, const char* index) {
  const __m128i* window = reinterpret_cast<const __m128i*>(source + piece.source);
  const __m128i* order = reinterpret_cast<const __m128i*>(index);
  return _mm_or_si128(_mm_shuffle_epi8(_mm_loadu_si128(window), _mm_load_si128(order)),
                      _mm_shuffle_epi8(_mm_loadu_si128(window + 1), _mm_load_si128(order + 1)));
}

PYPRUNE_INLINE Word either(Word a, Word b) {
  return _mm_or_si128(a, b);
}

PYPRUNE_INLINE void put(char* to, Word word) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), word);
}

PYPRUNE_INLINE void put_past_caches(char* to, Word word) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), word);
}

#else

constexpr int64_t kWordBytes = 0;

void permute_row(const char*, char*, const Permutation&, const char*, bool) {}

#endif

#if defined(__AVX2__)

// The word whose pieces begin at `piece`; both pointers move on to the next word's.
template <int LANE>
PYPRUNE_INLINE Word next_word(const char* source, const Piece*& piece, const char*& index) {
  Word word = permuted<LANE>(source, *piece, index);
  while (!piece->last) {
    ++piece;
    index += kIndexBytes;
    word = either(word, permuted<LANE>(source, *piece, index));
  }
  ++piece;
  index += kIndexBytes;
  return word;
}

template <int LANE, bool AHEAD, bool PAST_CACHES>
void permute_lanes(const char* source, char* dest, const Permutation& p, const char* ahead) {
  const Piece* piece = p.pieces;
  const char* index = p.indices;
  int64_t left = p.row_bytes;
  for (; left >= kWordBytes; left -= kWordBytes, dest += kWordBytes) {
    if (AHEAD) {
      ask_for(ahead + piece->source);
      if (kWordBytes == 64) ask_for(ahead + piece->source + 64);
    }
    const Word word = next_word<LANE>(source, piece, index);
    PAST_CACHES ? put_past_caches(dest, word) : put(dest, word);
  }
  if (left > 0) {
    char last[kWordBytes];
    put(last, next_word<LANE>(source, piece, index));
    memcpy(dest, last, static_cast<size_t>(left));
  }
}

template <int LANE>
void permute_with(const char* source, char* dest, const Permutation& p, const char* ahead, bool past_caches) {
  if (ahead == nullptr) return permute_lanes<LANE, false, false>(source, dest, p, ahead);
  past_caches ? permute_lanes<LANE, true, true>(source, dest, p, ahead)
              : permute_lanes<LANE, true, false>(source, dest, p, ahead);
}

// Each word of the destination is written once, whole: two loads, a permutation and a store, with no branch on a run.
void permute_row(const char* source, char* dest, const Permutation& p, const char* ahead, bool past_caches) {
  p.lane_bytes == 4 ? permute_with<4>(source, dest, p, ahead, past_caches)
                    : permute_with<2>(source, dest, p, ahead, past_caches);
}

#endif

template <bool AHEAD>
void stream_with(const char* source, char* dest, int64_t count, const char* ahead) {
#if defined(__x86_64__)
  const int64_t head = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(dest) % 64);
  if (count >= head + 64) {
    memcpy(dest, source, static_cast<size_t>(head));
    dest += head;
    source += head;
    count -= head;
    for (; count >= 64; count -= 64, dest += 64, source += 64) {
      if (AHEAD) {
        ask_for(ahead);
        ahead += 64;
      }
#if defined(__AVX512F__)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(dest), _mm512_loadu_si512(source));
#else
      for (int i = 0; i < 4; ++i) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(dest) + i,
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(source) + i));
      }
#endif
    }
  }
#endif
  memcpy(dest, source, static_cast<size_t>(count));
}

void stream(const char* source, char* dest, int64_t count, const char* ahead) {
  ahead != nullptr ? stream_with<true>(source, dest, count, ahead) : stream_with<false>(source, dest, count, ahead);
}

void drain() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
