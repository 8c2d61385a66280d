#pragma once

#include "../common.h"
#include "parallel.h"

namespace pyprune {

// curvature[i] += scale * grad[i]^2 for each of the tensors.
void accumulate_square_cpu(const AccumulateTensor* tensors, int64_t count, double scale, const Parallel& parallel);

}  // namespace pyprune
