"""Magnitude, squared L2: sum of w^2 over a slice, so that a unit's score is its squared Euclidean norm."""

from pyprune.importance.registry import Criterion

CRITERION = Criterion("l2", "sum of w^2", "square")
