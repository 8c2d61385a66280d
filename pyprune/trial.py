"""Before anything is scored: whether a model can have the asked size, and which of several recipes meets it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from pyprune import layer_removal, method
from pyprune.config import PruneConfig
from pyprune.discovery.groups import Groups
from pyprune.errors import PyPruneError
from pyprune.importance.calibration import Calibration
from pyprune.importance.scores import Scores
from pyprune.schedule import equal_scores, requests, without_scores
from pyprune.selection.plan import Plan
from pyprune.selection.quantities import measure_budget
from pyprune.selection.searched import ON_MODEL
from pyprune.selection.select import select
from pyprune.surgery.rebuild import rebuild

log = logging.getLogger(__name__)


def first_that_fits(
    ways: Sequence[PruneConfig], model: Any, groups: Groups, batches: Calibration | None, ready: Scores | None
) -> tuple[PruneConfig, list[dict[str, Any]], Plan, Any]:
    """The first recipe whose size the model can have: with its requests to ``select``, a plan of that size (which units
    go is not known yet), and a model of that plan's shapes on the meta device.

    Args:
        ways: what to try, the best first.
        batches: calibration, where it is read.
        ready: scores that are given, where they are.

    Raises:
        PyPruneError: why the last of them cannot be met.
    """
    for number, way in enumerate(ways, start=1):
        try:
            way = method.for_model(way, model, groups, batches)
            return way, *_planned(way, model, groups, ready)
        except PyPruneError as error:
            if number == len(ways):
                raise
            log.info("not %s over %s: %s", way.select.allocation, way.select.roles, error)
    raise AssertionError("no way")


def _planned(
    recipe: PruneConfig, model: Any, groups: Groups, ready: Scores | None
) -> tuple[list[dict[str, Any]], Plan, Any]:
    asked: list[dict[str, Any]] = []
    if recipe.depth.remove_layers is not None:
        trial = layer_removal.trial(recipe, groups, model.config)
    else:
        sizes = recipe.select
        quantity = measure_budget(model, groups, sizes.budget, length=sizes.budget_length)
        asked = [{**request, "budget": quantity} for request in requests(sizes, groups)]
        last = asked[-1] if ready is not None and sizes.allocation not in ON_MODEL else without_scores(asked[-1])
        trial = select(groups, equal_scores(groups) if ready is None else ready, **last)
    return asked, trial, rebuild(model, trial).model
