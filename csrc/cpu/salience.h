#pragma once

#include "../common.h"
#include "parallel.h"

namespace pyprune {

// Row and column sums of the formula for each of one or more tensors, all or none of which are float64; see
// SalienceTensor for what is read and written.
// Accumulates in float32 (float64 beside float64 weights) within tiles and in float64 across them, in an order that
// depends on the shapes alone.
void salience_cpu(Formula formula, const SalienceTensor* tensors, int64_t count, const Parallel& parallel);

}  // namespace pyprune
