"""What a plan reports about itself: parameters and widths, read from the shapes that it gives."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

from pyprune.discovery.groups import Groups
from pyprune.selection.plan import Plan


def measure(groups: Groups, plan: Plan) -> dict[str, Any]:
    """Parameters before and after ``plan`` and the fraction removed, with embeddings and without.

    Returns ``{"with_embeddings": {"before", "after", "ratio"}, "without_embeddings": {...}}``, from the shapes that
    the plan gives.
    """
    after = plan.new_shapes(groups.shapes)
    out = {}
    for label, names in (
        ("with_embeddings", groups.parameters),
        ("without_embeddings", groups.parameters - groups.embeddings),
    ):
        dense = sum(groups.numel(p) for p in names)
        left = sum(prod(after[p]) for p in names if p in after)
        out[label] = {"before": dense, "after": left, "ratio": (dense - left) / dense if dense else 0.0}
    return out


def widths_by_role(groups: Groups, plan: Plan, roles: Iterable[str]) -> dict[str, int | dict[str, int]]:
    """Role -> units kept: one number where all groups of the role keep the same, else by layer (or by group name).

    Frozen and uncut groups count with all their units; groups in removed layers are left out.
    """
    width = {c.group.name: c.width for c in plan.cuts}
    gone = tuple(m + "." for m in plan.removed_modules())
    out: dict[str, int | dict[str, int]] = {}
    for role in roles:
        present = [g for g in groups if g.role == role and not (gone and (g.module + ".").startswith(gone))]
        kept = [width.get(g.name, g.units) for g in present]
        if not kept:
            continue
        if len(set(kept)) == 1:
            out[role] = kept[0]
            continue
        labels = [g.name if g.layer is None else str(g.layer) for g in present]
        if len(set(labels)) < len(labels):
            labels = [g.name for g in present]
        out[role] = dict(zip(labels, kept, strict=True))
    return out
