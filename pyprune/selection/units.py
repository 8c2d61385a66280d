"""Which units stay once it is known how many: the best-scored ones, in each copy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pyprune.discovery.groups import Group
from pyprune.errors import PyPruneError
from pyprune.selection.plan import Cut


def checked_scores(groups: Sequence[Group], scores: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Scores of ``groups`` as float64 arrays [outer, units].

    Raises:
        PyPruneError: scores missing for a group, of another shape than the group, NaN or infinite.
    """
    missing = [g.name for g in groups if g.name not in scores]
    if missing:
        problem = f"no scores for {len(missing)} of the {len(groups)} groups to cut (the first: {missing[0]})"
        raise PyPruneError(
            "scores", None, problem, "Score this model with these groups and roles: pyprune.score(model, groups)."
        )
    out = {}
    for group in groups:
        given = scores[group.name]
        values = given.detach().cpu().double().numpy() if hasattr(given, "detach") else np.asarray(given, np.float64)
        if values.shape != (group.outer, group.units):
            shapes = f"{list(values.shape)}, the group has {[group.outer, group.units]}"
            raise PyPruneError(
                "scores", None, f"those of {group.name} have shape {shapes}", "Score the model as it is now."
            )
        bad = int((~np.isfinite(values)).sum())
        if bad:
            problem = f"{bad} of the {values.size} scores of {group.name} are NaN or infinite"
            raise PyPruneError(
                "scores", None, problem, "Look for NaN in the weights; score in float32 if they were halved."
            )
        out[group.name] = values
    return out


def removal_order(scores: np.ndarray, protected: Iterable[int] = ()) -> np.ndarray:
    """Unit numbers [outer, units], in each copy the first to go in front.

    The lowest score goes first; of equal scores the highest index. ``protected`` units go last.
    """
    keep_first = scores.copy()
    keep_first[:, list(protected)] = np.inf
    return np.argsort(-keep_first, axis=1, kind="stable")[:, ::-1]


def keep(group: Group, order: np.ndarray, width: int) -> Cut:
    """The cut that keeps, in every copy, the ``width`` units which :func:`removal_order` puts last."""
    kept = np.sort(order[:, group.units - width :], axis=1)
    return Cut(group, tuple(tuple(row) for row in kept.tolist()))


def without_removed_layers(cuts: Iterable[Cut]) -> tuple[Cut, ...]:
    """``cuts`` without those of groups that lie in layers or sub-blocks which are removed whole."""
    cuts = tuple(cuts)
    gone = {m for cut in cuts for m in cut.removed_modules()}
    return tuple(c for c in cuts if not _inside(c.group.module, gone))


def _inside(module: str, modules: set[str]) -> bool:
    parts = module.split(".")
    return bool(modules) and any(".".join(parts[:end]) in modules for end in range(1, len(parts) + 1))
