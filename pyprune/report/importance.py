"""Widths and importance of a pruning run in few numbers, so that they can be drawn after the scores are gone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from pyprune.discovery.groups import Group, Groups
from pyprune.discovery.roles import INSIDE_HEADS
from pyprune.importance.scores import Scores
from pyprune.selection.plan import Cut, Plan

BINS = 40
MOST_UNITS = 128  # of a role in a layer that are kept one by one
LONGEST_SCALE = 12.0  # decades of scores that a logarithmic scale spans
NO_WIDTH = ("vocab",)
FORMAT = {"format": "pyprune-importance", "version": 1}


def importance_summary(groups: Groups, scores: Scores, plan: Plan) -> dict[str, Any]:
    """What there was, what stayed, and how the scores are spread, by role and layer; JSON-serialisable.

    Args:
        groups: of the dense model.
        scores: of the dense model, for those groups that were scored.
        plan: over the dense model's groups.

    Returns:
        ``widths``: {"role", "layer", "before", "after"} in units, for dimensions of heads those of one head; whole
        layers one entry each. ``roles``: a mapping for each scored role, with ``mode`` "units" (``scores`` and ``kept``
        of at most 128 units a layer) or "bins" (``kept`` and ``removed``: numbers of units in the 40 bins that lie
        between ``edges``).
    """
    kept = _masks(groups, plan)
    return {
        **FORMAT,
        "criterion": scores.criterion,
        "widths": _widths((g, kept[g.name]) for g in groups if g.role not in NO_WIDTH),
        "roles": _roles(groups, scores, kept),
    }


def widths_of_plan(plan: Plan) -> list[dict[str, Any]]:
    """The ``widths`` of :func:`importance_summary` as far as a plan alone knows them: of the groups that are cut."""
    kept = {c.group.name: _mask(c) for c in plan.cuts}
    for cut in plan.cuts:
        _leave_out_copies(cut.group, kept)
    return _widths((c.group, kept[c.group.name]) for c in plan.cuts)


def _masks(groups: Groups, plan: Plan) -> dict[str, np.ndarray]:
    """Group name -> bool [outer, units], True for units that stay."""
    cuts = {c.group.name: c for c in plan.cuts}
    gone = tuple(m + "." for m in plan.removed_modules())
    out = {}
    for g in groups:
        if gone and (g.module + ".").startswith(gone):
            out[g.name] = np.zeros((g.outer, g.units), dtype=bool)
        else:
            out[g.name] = _mask(cuts[g.name]) if g.name in cuts else np.ones((g.outer, g.units), dtype=bool)
    for g in groups:
        _leave_out_copies(g, out)
    return out


def _mask(cut: Cut) -> np.ndarray:
    out = np.zeros((cut.group.outer, cut.group.units), dtype=bool)
    for row, kept in zip(out, cut.kept, strict=True):
        row[list(kept)] = True
    return out


def _leave_out_copies(group: Group, kept: dict[str, np.ndarray]) -> None:
    """Units in a copy that is itself removed (query heads of a KV head) go with it."""
    holder = kept.get(group.within or "")
    if holder is not None and holder.size == group.outer:
        kept[group.name] &= holder.reshape(-1, 1)


def _widths(found: Iterable[tuple[Group, np.ndarray]]) -> list[dict[str, Any]]:
    sums: dict[tuple[str, int | None], list[int]] = {}
    for group, mask in found:
        if group.role == "layers":
            for i, stays in enumerate(mask.reshape(-1).tolist()):
                sums[group.role, i] = [1, int(stays)]
            continue
        entry = sums.setdefault((group.role, group.layer), [0, 0])
        if group.role in INSIDE_HEADS:  # counted within one head
            entry[:] = group.units, int(mask.sum(axis=1).max())
            continue
        entry[0] += mask.size
        entry[1] += int(mask.sum())
    return [{"role": r, "layer": i, "before": b, "after": a} for (r, i), (b, a) in sums.items()]


def _roles(groups: Groups, scores: Scores, kept: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    by_role: dict[str, dict[int | None, list[Group]]] = {}
    for g in groups:
        if g.name in scores:
            by_role.setdefault(g.role, {}).setdefault(g.layer, []).append(g)
    out = []
    for role, layers in by_role.items():
        rows = []
        for layer, members in layers.items():
            values = np.concatenate([scores[g.name].double().numpy().reshape(-1) for g in members])
            rows.append((layer, values, np.concatenate([kept[g.name].reshape(-1) for g in members])))
        out.append({"role": role, **_one_by_one(rows)} if _few(rows) else {"role": role, **_binned(rows)})
    return out


def _few(rows: list[Any]) -> bool:
    return max(len(values) for _, values, _ in rows) <= MOST_UNITS


def _one_by_one(rows: list[Any]) -> dict[str, Any]:
    entries = [
        {**_spread(layer, values), "scores": [_short(v) for v in values], "kept": mask.astype(int).tolist()}
        for layer, values, mask in rows
    ]
    return {"mode": "units", "scale": _scale(rows), "rows": entries}


def _binned(rows: list[Any]) -> dict[str, Any]:
    scale, edges = _scale(rows), _edges(rows)
    entries = []
    for layer, values, mask in rows:
        at = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, BINS - 1)
        counts = {
            name: np.bincount(at[chosen], minlength=BINS).tolist()
            for name, chosen in (("kept", mask), ("removed", ~mask))
        }
        entries.append({**_spread(layer, values), **counts})
    return {"mode": "bins", "scale": scale, "edges": [_short(e) for e in edges], "rows": entries}


def _spread(layer: int | None, values: np.ndarray) -> dict[str, Any]:
    least, median, greatest = (_short(f(values)) for f in (np.min, np.median, np.max))
    return {"layer": layer, "least": least, "median": median, "greatest": greatest}


def _scale(rows: list[Any]) -> str:
    least, greatest = min(v.min() for _, v, _ in rows), max(v.max() for _, v, _ in rows)
    return "log" if least >= 0 and greatest > 0 else "linear"


def _edges(rows: list[Any]) -> np.ndarray:
    """BINS + 1 ascending numbers from the least to the greatest score of the role, over all layers."""
    values = np.concatenate([v for _, v, _ in rows])
    greatest = float(values.max())
    if _scale(rows) == "linear":
        return np.linspace(float(values.min()), greatest, BINS + 1)
    least = max(float(values[values > 0].min()), greatest * 10.0**-LONGEST_SCALE)
    return np.geomspace(least, greatest, BINS + 1)


def _short(value: float) -> float:
    """Five digits are more than a picture shows."""
    return float(f"{value:.5g}")
