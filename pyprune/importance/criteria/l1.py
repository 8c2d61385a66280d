"""Magnitude, L1: sum of |w| over a slice (Li et al. 2017, "Pruning filters for efficient ConvNets", section 3.1)."""

from collections.abc import Sequence

from torch import Tensor

from pyprune.importance.registry import Criterion, Sums
from pyprune.ops import salience


def measure(weights: Sequence[Tensor], gradients: Sequence[Tensor] | None, curvatures: Sequence[Tensor] | None) -> Sums:
    return salience("abs", weights)


CRITERION = Criterion("l1", "sum of |w| (Li et al. 2017)", measure)
