"""Magnitude, L1: sum of |w| over a slice (Li et al. 2017, "Pruning filters for efficient ConvNets", section 3.1)."""

from pyprune.importance.registry import Criterion

CRITERION = Criterion("l1", "sum of |w| (Li et al. 2017)", "abs")
