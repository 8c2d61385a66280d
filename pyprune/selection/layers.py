"""Which whole decoder layers go: a number and a criterion in, a plan out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyprune.discovery.groups import Group, Groups
from pyprune.errors import PyPruneError
from pyprune.importance.depth import score_layers
from pyprune.importance.scores import Scores
from pyprune.selection.details import measure
from pyprune.selection.plan import Cut, Plan
from pyprune.selection.requests import Amount, LayerSpec, parse_layers, parse_removal
from pyprune.selection.scope import layer_count, members_of, protected_units

Score = Callable[[Group, int, tuple[int, ...]], Scores]


def select_layers(
    model: Any,
    groups: Groups,
    batches: Any,
    remove: Amount,
    criterion: str = "block_influence",
    *,
    layers: LayerSpec | None = None,
    progress: bool | None = None,
) -> Plan:
    """A plan that removes whole decoder layers.

        plan = pyprune.select_layers(model, pyprune.discover(model), token_ids, 3)
        smaller = pyprune.apply(model, plan)

    Args:
        model: a causal LM; it is left as it was.
        groups: what :func:`pyprune.discover` found in it.
        batches: calibration, as :func:`pyprune.score` takes it.
        remove: how many layers go (int), or which fraction of them (float; the nearest number, at least one).
        criterion: ``block_influence`` or ``perplexity``; see :func:`pyprune.importance.depth.score_layers`.
        layers: decoder layers that may go: ``"3-27"``, ``[3, 4, 5]``. None: all.
        progress: False silences the bar.

    Returns:
        The plan. ``details["removed_layers"]`` names the layers that go, ascending; ``details["layer_scores"]`` says
        what each layer of the model is worth; both stand in ``details`` beside what :func:`pyprune.select` gives.

    Raises:
        PyPruneError: a number that is out of reach, layers that cannot be removed, and all that scoring refuses.
    """

    def scored(group: Group, count: int, protected: tuple[int, ...]) -> Scores:
        return score_layers(model, group, batches, count, criterion, protected, progress=progress)

    return plan_layers(groups, remove, scored, layers)[0]


def plan_layers(groups: Groups, remove: Amount, scored: Score, layers: LayerSpec | None = None) -> tuple[Plan, Scores]:
    """:func:`select_layers` with its scores from ``scored``: (group, how many go, layers that stay) -> scores."""
    group, count, protected = removable(groups, remove, layers)
    scores = scored(group, count, protected)
    plan = without(groups, group, scores.details["removed"])
    plan.details |= {"criterion": scores.criterion, "layer_scores": scores[group.name][0].tolist()}
    plan.details |= {k: scores.details[k] for k in ("loss", "losses") if k in scores.details}
    return plan, scores


def removable(groups: Groups, remove: Amount, layers: LayerSpec | None = None) -> tuple[Group, int, tuple[int, ...]]:
    """The group of the layers, how many of them go, and which stay in any case.

    Raises:
        PyPruneError: the model has no layers that can be removed, or not so many.
    """
    remove = parse_removal("remove_layers", remove)
    members = members_of(groups, "layers", None, "remove_layers")
    group = max(members, key=lambda g: g.units)
    only = None if layers is None else parse_layers(layers, layer_count(groups))
    protected = tuple(sorted({*protected_units(group, only), *_lenders(groups, group)}))
    count = remove if isinstance(remove, int) else max(1, int(remove * group.units + 0.5))
    most = min(group.units - 1, group.units - len(protected))
    if count > most:
        where = f"{len(protected)} of them outside layers= or sharing weights" if protected else "one has to stay"
        problem = f"is too many: the model has {group.units} layers, {where}"
        raise PyPruneError("remove_layers", remove, problem, f"Ask for at most {most}.")
    return group, count, protected


def _lenders(groups: Groups, group: Group) -> set[int]:
    """Layers that hold weights which others use too; they cannot go alone."""
    home = {module: unit for unit, module in enumerate(group.modules)}

    def layer(name: str) -> int | None:
        parts = name.split(".")
        return next((home[m] for end in range(1, len(parts)) if (m := ".".join(parts[:end])) in home), None)

    pairs = ((layer(first), layer(other)) for other, first in groups.tied.items())
    return {first for first, other in pairs if first is not None and first != other}


def without(groups: Groups, group: Group, removed: list[int]) -> Plan:
    """The plan that removes these layers and nothing else."""
    gone = sorted(removed)
    plan = Plan((Cut(group, (tuple(i for i in range(group.units) if i not in gone),)),))
    plan.details = {
        "achieved": measure(groups, plan),
        "allocation": None,
        "roles": ["layers"],
        "layers": None,
        "widths": {"layers": group.units - len(gone)},
        "notes": [],
        "removed_layers": gone,
        "removal_order": list(removed),
    }
    return plan
