#pragma once

#include "../common.h"
#include "parallel.h"

namespace pyprune {

// Floats of scratch that a call needs.
int64_t activation_scratch(const ActivationCall& call);

// Salience of one weight from activations; see ActivationCall. Sums over blocks of rows are added up in float64, in an
// order that depends on the shape alone.
void activation_salience_cpu(const ActivationCall& call, float* scratch, const Parallel& parallel);

}  // namespace pyprune
