// The formulas of salience: what each reads beside the weight, and its value at an element.
#pragma once

#include <cuda_runtime_api.h>

namespace pyprune {

struct AbsFormula {
  static constexpr bool grad = false, curvature = false;
  static __device__ float at(float w, float, float) { return fabsf(w); }
};
struct SquareFormula {
  static constexpr bool grad = false, curvature = false;
  static __device__ float at(float w, float, float) { return w * w; }
};
struct TaylorSignedFormula {
  static constexpr bool grad = true, curvature = false;
  static __device__ float at(float w, float g, float) { return w * g; }
};
struct TaylorAbsFormula {
  static constexpr bool grad = true, curvature = false;
  static __device__ float at(float w, float g, float) { return fabsf(w * g); }
};
struct FisherFormula {
  static constexpr bool grad = false, curvature = true;
  static __device__ float at(float w, float, float h) { return w * w * h; }
};
struct MixedFormula {
  static constexpr bool grad = true, curvature = true;
  static __device__ float at(float w, float g, float h) { return fabsf(w * g - (w * w * h) * 0.5f); }
};

}  // namespace pyprune
