// The inner loops. This file is compiled once for each instruction set, with PYPRUNE_ISA naming the set.

#include "activation_isa.h"
#include "channels_isa.h"
#include "formulas_isa.h"
#include "kernels.h"
#include "pack.h"
#include "simd.h"

namespace pyprune {
namespace PYPRUNE_ISA {

// A tile, one row after the other: each element is read once, in the order of memory, and added to its row's sixteen
// lanes and to its column, whose sums stay in the nearest caches. Taking several rows together would save traffic with
// those caches, but reads as many streams as rows, each too short for a hardware prefetcher: a quarter slower.
// Bytes moved: those of the elements read. Floor: the same over the memory bandwidth; arithmetic stays below it.
template <class F, class Acc, class W, class G>
void tile_of(const SalienceTile& t) {
  alignas(64) Acc col_sums[kTileCols + kLanes];
  memset(col_sums, 0, static_cast<size_t>(t.cols + kLanes) * sizeof(Acc));
  const W* w = static_cast<const W*>(t.weight);
  const G* g = static_cast<const G*>(t.grad);
  const Acc* h = static_cast<const Acc*>(t.curvature);
  const int64_t w_ahead = prefetch_distance<W>(t.cols, t.weight_stride);
  const int64_t g_ahead = prefetch_distance<G>(t.cols, t.grad_stride);
  const int64_t h_ahead = prefetch_distance<Acc>(t.cols, t.curvature_stride);
  for (int64_t r = 0; r < t.rows; ++r) {
    Vec<Acc> row = Vec<Acc>::zero();
    int64_t c = 0;
#pragma GCC unroll 2
    for (; c + kLanes <= t.cols; c += kLanes) {
      const Vec<Acc> wv = load(w + c);
      prefetch(w + c, w_ahead);
      Vec<Acc> gv = wv, hv = wv;
      if (F::grad) {
        gv = load(g + c);
        prefetch(g + c, g_ahead);
      }
      if (F::curvature) {
        hv = load(h + c);
        prefetch(h + c, h_ahead);
      }
      const Vec<Acc> s = F::at(wv, gv, hv);
      row = row + s;
      (load(col_sums + c) + s).store(col_sums + c);
    }
    if (c < t.cols) {
      const int64_t left = t.cols - c;
      const Vec<Acc> wv = load(Padded<W>(w + c, left).data);
      Vec<Acc> gv = wv, hv = wv;
      if (F::grad) gv = load(Padded<G>(g + c, left).data);
      if (F::curvature) hv = load(Padded<Acc>(h + c, left).data);
      const Vec<Acc> s = F::at(wv, gv, hv);
      row = row + s;
      (load(col_sums + c) + s).store(col_sums + c);
    }
    static_cast<Acc*>(t.row_sums)[r] = row.sum();
    w += t.weight_stride;
    if (F::grad) g += t.grad_stride;
    if (F::curvature) h += t.curvature_stride;
  }
  if (t.cols > 0) memcpy(t.col_sums, col_sums, static_cast<size_t>(t.cols) * sizeof(Acc));
}

template <class F>
void tile_with(Dtype dtype, Dtype grad_dtype, const SalienceTile& t) {
  const bool wide_grad = F::grad && grad_dtype == Dtype::float32;
  switch (dtype) {
    case Dtype::float32:
      return tile_of<F, float, float, float>(t);
    case Dtype::float64:
      return tile_of<F, double, double, double>(t);
    case Dtype::bfloat16:
      return wide_grad ? tile_of<F, float, BFloat16, float>(t) : tile_of<F, float, BFloat16, BFloat16>(t);
    case Dtype::float16:
      return wide_grad ? tile_of<F, float, Float16, float>(t) : tile_of<F, float, Float16, Float16>(t);
  }
}

void salience_tile(Formula formula, Dtype dtype, Dtype grad_dtype, const SalienceTile& t) {
  switch (formula) {
    case Formula::abs:
      return tile_with<Abs>(dtype, grad_dtype, t);
    case Formula::square:
      return tile_with<Square>(dtype, grad_dtype, t);
    case Formula::taylor_signed:
      return tile_with<TaylorSigned>(dtype, grad_dtype, t);
    case Formula::taylor_abs:
      return tile_with<TaylorAbs>(dtype, grad_dtype, t);
    case Formula::fisher:
      return tile_with<Fisher>(dtype, grad_dtype, t);
    case Formula::mixed:
      return tile_with<Mixed>(dtype, grad_dtype, t);
  }
}

// curvature += scale * grad^2. Bytes moved: curvature twice, grad once.
template <class Acc, class G>
void accumulate_of(Acc* curvature, const G* grad, int64_t count, double scale) {
  const Vec<Acc> factor = Vec<Acc>::splat(static_cast<Acc>(scale));
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec<Acc> g = load(grad + i);
    (load(curvature + i) + factor * (g * g)).store(curvature + i);
  }
  if (i < count) {
    const int64_t left = count - i;
    const Vec<Acc> g = load(Padded<G>(grad + i, left).data);
    Acc sums[kLanes];
    (load(Padded<Acc>(curvature + i, left).data) + factor * (g * g)).store(sums);
    memcpy(curvature + i, sums, static_cast<size_t>(left) * sizeof(Acc));
  }
}

void accumulate(void* curvature, const void* grad, int64_t count, Dtype grad_dtype, double scale) {
  switch (grad_dtype) {
    case Dtype::float32:
      return accumulate_of(static_cast<float*>(curvature), static_cast<const float*>(grad), count, scale);
    case Dtype::float64:
      return accumulate_of(static_cast<double*>(curvature), static_cast<const double*>(grad), count, scale);
    case Dtype::bfloat16:
      return accumulate_of(static_cast<float*>(curvature), static_cast<const BFloat16*>(grad), count, scale);
    case Dtype::float16:
      return accumulate_of(static_cast<float*>(curvature), static_cast<const Float16*>(grad), count, scale);
  }
}

}  // namespace PYPRUNE_ISA

#define PYPRUNE_TEXT(x) #x
#define PYPRUNE_NAME(x) PYPRUNE_TEXT(x)
#define PYPRUNE_JOIN(a, b) a##b
#define PYPRUNE_TABLE(isa) PYPRUNE_JOIN(cpu_kernels_, isa)

extern const CpuKernels PYPRUNE_TABLE(PYPRUNE_ISA);
const CpuKernels PYPRUNE_TABLE(PYPRUNE_ISA) = {
    PYPRUNE_NAME(PYPRUNE_ISA),   PYPRUNE_ISA::salience_tile, PYPRUNE_ISA::accumulate,  PYPRUNE_ISA::channel_tile,
    PYPRUNE_ISA::copy_runs,      PYPRUNE_ISA::kWordBytes,    PYPRUNE_ISA::permute_row, PYPRUNE_ISA::stream,
    PYPRUNE_ISA::drain,          PYPRUNE_ISA::kPanelRows,    PYPRUNE_ISA::kPanelCols,  PYPRUNE_ISA::pack_panel,
    PYPRUNE_ISA::activation_rows};

}  // namespace pyprune
