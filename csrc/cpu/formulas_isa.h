// The formulas of salience. Part of isa_kernels.cpp: compiled per instruction set.
#pragma once

#include "simd.h"

namespace pyprune {
namespace PYPRUNE_ISA {

// Per-element salience; what a formula does not read is never loaded.
struct Abs {
  static constexpr bool grad = false, curvature = false;
  template <class V>
  static PYPRUNE_INLINE V at(V w, V, V) {
    return abs(w);
  }
};
struct Square {
  static constexpr bool grad = false, curvature = false;
  template <class V>
  static PYPRUNE_INLINE V at(V w, V, V) {
    return w * w;
  }
};
struct TaylorSigned {
  static constexpr bool grad = true, curvature = false;
  template <class V>
  static PYPRUNE_INLINE V at(V w, V g, V) {
    return w * g;
  }
};
struct TaylorAbs {
  static constexpr bool grad = true, curvature = false;
  template <class V>
  static PYPRUNE_INLINE V at(V w, V g, V) {
    return abs(w * g);
  }
};
struct Fisher {
  static constexpr bool grad = false, curvature = true;
  template <class V>
  static PYPRUNE_INLINE V at(V w, V, V h) {
    return w * w * h;
  }
};
struct Mixed {
  static constexpr bool grad = true, curvature = true;
  template <class V>
  static PYPRUNE_INLINE V at(V w, V g, V h) {
    return abs(w * g - (w * w * h) * half(w));
  }
  static PYPRUNE_INLINE Vec<float> half(Vec<float>) { return Vec<float>::splat(0.5f); }
  static PYPRUNE_INLINE Vec<double> half(Vec<double>) { return Vec<double>::splat(0.5); }
};

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
