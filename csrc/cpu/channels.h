#pragma once

#include "../common.h"
#include "parallel.h"

namespace pyprune {

// Sums over the rows of each channel; see ChannelCall. Accumulates in float32 (float64 for float64) within tiles and in
// float64 across them, in an order that depends on the shape alone.
void channels_cpu(const ChannelCall& call, const Parallel& parallel);

}  // namespace pyprune
