"""Magnitude, squared L2: sum of w^2 over a slice, so that a unit's score is its squared Euclidean norm."""

from collections.abc import Sequence

from torch import Tensor

from pyprune.importance.registry import Criterion, Sums
from pyprune.ops import salience


def measure(weights: Sequence[Tensor], gradients: Sequence[Tensor] | None, curvatures: Sequence[Tensor] | None) -> Sums:
    return salience("square", weights)


CRITERION = Criterion("l2", "sum of w^2", measure)
