// First pass of the salience kernel for the second-order forms w^2 * h and |w * g - w^2 * h / 2|.

#include "salience_tile.cuh"

namespace pyprune {

PYPRUNE_SALIENCE_LAUNCHER(fisher) {
  return launch_salience_tiles<FisherFormula>(dtype, grad_dtype, entries, first, count, tiles, stream);
}

PYPRUNE_SALIENCE_LAUNCHER(mixed) {
  return launch_salience_tiles<MixedFormula>(dtype, grad_dtype, entries, first, count, tiles, stream);
}

}  // namespace pyprune
