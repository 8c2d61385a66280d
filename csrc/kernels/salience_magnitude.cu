// First pass of the salience kernel for the magnitudes |w| and w^2.

#include "salience_tile.cuh"

namespace pyprune {

PYPRUNE_SALIENCE_LAUNCHER(abs) {
  return launch_salience_tiles<AbsFormula>(dtype, grad_dtype, entries, first, count, tiles, stream);
}

PYPRUNE_SALIENCE_LAUNCHER(square) {
  return launch_salience_tiles<SquareFormula>(dtype, grad_dtype, entries, first, count, tiles, stream);
}

}  // namespace pyprune
