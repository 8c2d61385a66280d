// The inner loops. This file is compiled once for each instruction set, with PYPRUNE_ISA naming the set.

#include "activation_isa.h"
#include "channels_isa.h"
#include "formulas_isa.h"
#include "kernels.h"
#include "pack.h"
#include "simd.h"

namespace pyprune {
namespace PYPRUNE_ISA {

// Salience of sixteen elements, added to their row's lanes and to their columns.
template <class F, class Acc, class W, class G>
PYPRUNE_INLINE void add_salience(const W* w, const G* g, const Acc* h, Acc* col_sums, Vec<Acc>& row) {
  const Vec<Acc> wv = load(w);
  const Vec<Acc> s = F::at(wv, F::grad ? load(g) : wv, F::curvature ? load(h) : wv);
  row = row + s;
  (load(col_sums) + s).store(col_sums);
}

// A tile, one row after the other: each element is read once, in the order of memory, and added to its row's sixteen
// lanes and to its column, whose sums stay in the nearest caches. Taking several rows together would save traffic with
// those caches, but reads as many streams as rows, each too short for a hardware prefetcher: a quarter slower.
// Bytes moved: those of the elements read. Floor: the same over the memory bandwidth; arithmetic stays below it.
template <class F, class Acc, class W, class G>
void tile_of(const SalienceTile& t) {
  alignas(64) Acc col_sums[kTileCols + kLanes];
  memset(col_sums, 0, static_cast<size_t>(t.cols + kLanes) * sizeof(Acc));
  const W* w = static_cast<const W*>(t.weight);
  // What a formula does not read points somewhere all the same.
  const G* g = static_cast<const G*>(F::grad ? t.grad : t.weight);
  const Acc* h = static_cast<const Acc*>(F::curvature ? t.curvature : t.weight);
  const int64_t w_ahead = prefetch_distance<W>(t.cols, t.weight_stride);
  const int64_t g_ahead = prefetch_distance<G>(t.cols, t.grad_stride);
  const int64_t h_ahead = prefetch_distance<Acc>(t.cols, t.curvature_stride);
  for (int64_t r = 0; r < t.rows; ++r) {
    Vec<Acc> row = Vec<Acc>::zero();
    int64_t c = 0;
    for (; c + kAsked <= t.cols; c += kAsked) {
      prefetch<kAsked>(w + c, w_ahead);
      if (F::grad) prefetch<kAsked>(g + c, g_ahead);
      if (F::curvature) prefetch<kAsked>(h + c, h_ahead);
#pragma GCC unroll 8
      for (int k = 0; k < kAsked; k += kLanes) add_salience<F>(w + c + k, g + c + k, h + c + k, col_sums + c + k, row);
    }
    for (; c + kLanes <= t.cols; c += kLanes) add_salience<F>(w + c, g + c, h + c, col_sums + c, row);
    if (c < t.cols) {
      const int64_t left = t.cols - c;
      const Padded<W> last_w(w + c, left);
      const Padded<G> last_g(g + c, F::grad ? left : 0);
      const Padded<Acc> last_h(h + c, F::curvature ? left : 0);
      add_salience<F>(last_w.data, last_g.data, last_h.data, col_sums + c, row);
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
