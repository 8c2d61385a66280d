#pragma once

#include "../common.h"
#include "parallel.h"

namespace pyprune {

// Copies the kept slices of each of the tensors; see GatherTensor.
void gather_cpu(const GatherTensor* tensors, int64_t count, const Parallel& parallel);

}  // namespace pyprune
