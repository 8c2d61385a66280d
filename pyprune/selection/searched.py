"""Allocations ``search``, ``divergence``, ``descent``: names of what needs a model and text (:mod:`pyprune.search`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pyprune.discovery.groups import Group
from pyprune.errors import PyPruneError
from pyprune.selection.allocation import Budget, register
from pyprune.selection.global_ranking import FLOORS

ON_MODEL = ("search", "divergence", "descent")


@register("search", min_keep=FLOORS)
def search(groups: Sequence[Group], scores: Mapping[str, np.ndarray], budget: Budget) -> dict[str, int]:
    """Refuses: scores alone do not say how far a candidate is from the dense model."""
    hint = "Call pyprune.search_plan(model, groups, scores, batches, ratio), or prune with allocation search."
    raise PyPruneError("allocation", "search", "measures candidates, which needs a model and text", hint)


@register("divergence", min_keep=FLOORS, scored=False)
def divergence(groups: Sequence[Group], scores: Mapping[str, np.ndarray], budget: Budget) -> dict[str, int]:
    """Refuses: scores alone do not say how far a width takes the model from the dense one."""
    hint = "Call pyprune.search_plan(..., allocation='divergence'), or prune with allocation divergence."
    raise PyPruneError("allocation", "divergence", "measures widths, which needs a model and text", hint)


@register("descent", min_keep=FLOORS)
def descent(groups: Sequence[Group], scores: Mapping[str, np.ndarray], budget: Budget) -> dict[str, int]:
    """Refuses: scores alone do not say how steeply the divergence rises with a width."""
    hint = "Call pyprune.search_plan(..., allocation='descent'), or prune with allocation descent."
    raise PyPruneError("allocation", "descent", "measures widths, which needs a model and text", hint)
