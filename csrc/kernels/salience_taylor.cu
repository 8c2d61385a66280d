// First pass of the salience kernel for the first-order forms w * g and |w * g|.

#include "salience_tile.cuh"

namespace pyprune {

PYPRUNE_SALIENCE_LAUNCHER(taylor_signed) {
  return launch_salience_tiles<TaylorSignedFormula>(dtype, grad_dtype, entries, first, count, tiles, stream);
}

PYPRUNE_SALIENCE_LAUNCHER(taylor_abs) {
  return launch_salience_tiles<TaylorAbsFormula>(dtype, grad_dtype, entries, first, count, tiles, stream);
}

}  // namespace pyprune
