// A weight's salience from activations: blocks of the gradient are formed, squared and spent within the caches.
// Part of isa_kernels.cpp: compiled per instruction set.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "formulas_isa.h"
#include "kernels.h"
#include "simd.h"

namespace pyprune {
namespace PYPRUNE_ISA {

// A tile of the gradient, kPanelRows x kPanelCols, takes most registers; the rest hold one token's factors. Multiplying
// and adding are fused where the set can: products of matrices are not bound to equal bits on all sets.
#if defined(__AVX512F__)
typedef __m512 Factors;
constexpr int kPanelRows = 8, kPanelParts = 3;
PYPRUNE_INLINE Factors fused(Factors a, Factors b, Factors c) {
  return _mm512_fmadd_ps(a, b, c);
}
#elif defined(__FMA__)
typedef __m256 Factors;
constexpr int kPanelRows = 6, kPanelParts = 2;
PYPRUNE_INLINE Factors fused(Factors a, Factors b, Factors c) {
  return _mm256_fmadd_ps(a, b, c);
}
#else
typedef float Factors __attribute__((vector_size(16)));
constexpr int kPanelRows = 2, kPanelParts = 4;
PYPRUNE_INLINE Factors fused(Factors a, Factors b, Factors c) {
  return a * b + c;
}
#endif

constexpr int kPartLanes = sizeof(Factors) / sizeof(float);
constexpr int kPanelCols = kPanelParts * kPartLanes;
constexpr int kTileSize = kPanelRows * kPanelCols;
static_assert(kPanelCols % kLanes == 0 && kActivationRows % kPanelRows == 0, "tiles fit vectors and tasks");

// Tokens that are multiplied before the next tile's turn: a panel of columns stays in the first-level cache meanwhile.
constexpr int64_t kTokens = 256;

// `count` channels of one token, float32; zeros up to `width`.
template <class T>
PYPRUNE_INLINE void pack_token(const T* from, int64_t count, int64_t width, float* to) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) load(from + c).store(to + c);
  for (; c < width; c += kLanes) {
    float lanes[kLanes] = {};
    if (c < count) load(Padded<T>(from + c, count - c < kLanes ? count - c : kLanes).data).store(lanes);
    memcpy(to + c, lanes, static_cast<size_t>(width - c < kLanes ? width - c : kLanes) * sizeof(float));
  }
}

// A whole panel's width is known when this is compiled, which makes each token a load and a store or few.
template <int WIDTH, class T>
void pack_whole(const T* from, int64_t stride, int64_t tokens, float* to) {
  for (int64_t t = 0; t < tokens; ++t, from += stride, to += WIDTH) {
    if (sizeof(T) == sizeof(float)) {
      memcpy(to, from, WIDTH * sizeof(float));
    } else {
      pack_token(from, WIDTH, WIDTH, to);
    }
  }
}

template <class T>
void pack_panel_of(const T* from, int64_t stride, int64_t tokens, int64_t channels, int64_t width, float* to) {
  if (channels == kPanelRows && width == kPanelRows) return pack_whole<kPanelRows>(from, stride, tokens, to);
  if (channels == kPanelCols && width == kPanelCols) return pack_whole<kPanelCols>(from, stride, tokens, to);
  for (int64_t t = 0; t < tokens; ++t, from += stride, to += width) pack_token(from, channels, width, to);
}

void pack_panel(Dtype dtype, const void* from, int64_t stride, int64_t tokens, int64_t channels, int64_t width,
                float* to) {
  switch (dtype) {
    case Dtype::float32:
      return pack_panel_of(static_cast<const float*>(from), stride, tokens, channels, width, to);
    case Dtype::bfloat16:
      return pack_panel_of(static_cast<const BFloat16*>(from), stride, tokens, channels, width, to);
    case Dtype::float16:
      return pack_panel_of(static_cast<const Float16*>(from), stride, tokens, channels, width, to);
    case Dtype::float64:
      return;  // not offered
  }
}

// tile (+)= rows^T cols over `tokens` tokens.
PYPRUNE_INLINE void tile_product(const float* rows, const float* cols, int64_t tokens, bool add, float* tile) {
  Factors sums[kPanelRows][kPanelParts];
#pragma GCC unroll 8
  for (int r = 0; r < kPanelRows; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < kPanelParts; ++p) {
      sums[r][p] = Factors{};
      if (add) memcpy(&sums[r][p], tile + r * kPanelCols + p * kPartLanes, sizeof(Factors));
    }
  }
  for (int64_t t = 0; t < tokens; ++t, rows += kPanelRows, cols += kPanelCols) {
    Factors b[kPanelParts];
#pragma GCC unroll 4
    for (int p = 0; p < kPanelParts; ++p) memcpy(&b[p], cols + p * kPartLanes, sizeof(Factors));
#pragma GCC unroll 8
    for (int r = 0; r < kPanelRows; ++r) {
      const Factors a = rows[r] - Factors{};
#pragma GCC unroll 4
      for (int p = 0; p < kPanelParts; ++p) sums[r][p] = fused(a, b[p], sums[r][p]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kPanelRows; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < kPanelParts; ++p) memcpy(tile + r * kPanelCols + p * kPartLanes, &sums[r][p], sizeof(Factors));
  }
}

// Panel by panel of the columns: the block of the gradient that it makes with these rows, sample by sample, stays in
// the second-level cache, as do the squares; then weight, formula and sums. Arithmetic: 2 * rows * cols operations a
// token, which is the floor. Bytes moved: the weight once; panels come from the caches.
template <class F, class W>
void activation_rows_of(const ActivationRows& job) {
  constexpr int64_t kTiles = kActivationRows / kPanelRows;
  alignas(64) float products[kTiles * kTileSize];  // of one sample, or of all where no squares are wanted
  alignas(64) float squares[F::curvature ? kTiles * kTileSize : 1];
  alignas(64) float gradients[F::grad && F::curvature ? kTiles * kTileSize : 1];
  alignas(64) float row_lanes[kActivationRows * kLanes];
  const int64_t tiles = (job.rows + kPanelRows - 1) / kPanelRows;
  const Vec<float> gradient_scale = Vec<float>::splat(job.gradient_scale);
  const Vec<float> curvature_scale = Vec<float>::splat(job.curvature_scale);
  memset(row_lanes, 0, sizeof(row_lanes));
  for (int64_t c = 0; c < job.cols; c += kPanelCols) {
    const W* weight = static_cast<const W*>(job.weight) + c;
    if (F::curvature) memset(squares, 0, static_cast<size_t>(tiles) * kTileSize * sizeof(float));
    if (F::grad && F::curvature) memset(gradients, 0, static_cast<size_t>(tiles) * kTileSize * sizeof(float));
    if (job.samples * job.tokens == 0) memset(products, 0, sizeof(products));
    for (int64_t s = 0; s < job.samples; ++s) {
      const float* cols = job.col_panels + s * job.col_sample + c * job.tokens;
      for (int64_t t = 0; t < job.tokens; t += kTokens) {
        const int64_t count = job.tokens - t < kTokens ? job.tokens - t : kTokens;
        const bool last = t + count == job.tokens, add = t > 0 || (!F::curvature && s > 0);
        for (int64_t i = 0; i < tiles; ++i) {
          float* tile = products + i * kTileSize;
          if (last && s + 1 == job.samples) {
            for (int64_t r = i * kPanelRows; r < job.rows && r < (i + 1) * kPanelRows; ++r) {
              prefetch<kPanelCols>(weight + r * job.weight_stride, 0);
            }
          }
          const float* rows = job.row_panels + s * job.row_sample + (i * job.tokens + t) * kPanelRows;
          tile_product(rows, cols + t * kPanelCols, count, add, tile);
          if (!F::curvature || !last) continue;
          for (int k = 0; k < kTileSize; k += kLanes) {
            const Vec<float> g = load(tile + k);
            float* square = squares + (F::curvature ? i * kTileSize + k : 0);
            (load(square) + g * g).store(square);
            if (!F::grad) continue;
            float* sum = gradients + (F::grad && F::curvature ? i * kTileSize + k : 0);
            (load(sum) + g).store(sum);
          }
        }
      }
    }
    const int64_t width = job.cols - c < kPanelCols ? job.cols - c : kPanelCols;
    for (int64_t k = 0; k < width; k += kLanes) {
      const int64_t left = width - k < kLanes ? width - k : kLanes;
      Vec<float> col = Vec<float>::zero();
      for (int64_t r = 0; r < job.rows; ++r) {
        const W* from = weight + r * job.weight_stride + k;
        const Vec<float> w = left == kLanes ? load(from) : load(Padded<W>(from, left).data);
        const int64_t at = r * kPanelCols + k;
        const Vec<float> g = load((F::grad && F::curvature ? gradients : products) + at) * gradient_scale;
        const Vec<float> h = F::curvature ? load(squares + at) * curvature_scale : w;
        const Vec<float> salience = F::at(w, g, h);
        col = col + salience;
        (load(row_lanes + r * kLanes) + salience).store(row_lanes + r * kLanes);
      }
      float lanes[kLanes];
      col.store(lanes);
      memcpy(job.col_sums + c + k, lanes, static_cast<size_t>(left) * sizeof(float));
    }
  }
  for (int64_t r = 0; r < job.rows; ++r) job.row_sums[r] = load(row_lanes + r * kLanes).sum();
}

template <class F>
void activation_rows_with(const ActivationRows& job) {
  switch (job.dtype) {
    case Dtype::float32:
      return activation_rows_of<F, float>(job);
    case Dtype::bfloat16:
      return activation_rows_of<F, BFloat16>(job);
    case Dtype::float16:
      return activation_rows_of<F, Float16>(job);
    case Dtype::float64:
      return;  // not offered
  }
}

void activation_rows(const ActivationRows& job) {
  switch (job.formula) {
    case Formula::taylor_signed:
      return activation_rows_with<TaylorSigned>(job);
    case Formula::taylor_abs:
      return activation_rows_with<TaylorAbs>(job);
    case Formula::fisher:
      return activation_rows_with<Fisher>(job);
    case Formula::mixed:
      return activation_rows_with<Mixed>(job);
    case Formula::abs:
    case Formula::square:
      return;  // they read no gradient
  }
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
