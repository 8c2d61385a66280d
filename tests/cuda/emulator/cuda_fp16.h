// The type and its widening, which is all that the kernels use.
#pragma once

#include "cuda_runtime_api.h"

struct __half {
  uint16_t bits;
};
inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float size = exponent == 31  ? (fraction != 0 ? NAN : INFINITY)
                     : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                     : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  return x.bits >> 15 ? -size : size;
}
