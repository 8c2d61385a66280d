"""Which whole decoder layers go, or which layers' attention or FFN: a number and a criterion in, a plan out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pyprune.discovery.groups import Group, Groups
from pyprune.errors import PyPruneError, unknown_name
from pyprune.importance.depth import score_layers
from pyprune.importance.scores import Scores
from pyprune.selection.details import measure
from pyprune.selection.plan import Cut, Plan
from pyprune.selection.requests import Amount, LayerSpec, parse_layers, parse_removal
from pyprune.selection.scope import layer_count, members_of, protected_units

Score = Callable[[Group, int, tuple[int, ...]], Scores]

PARTS = {"layer": (), "attention": ("kv_heads", "query_heads"), "ffn": ("ffn", "experts", "expert_ffn")}
"""What of a layer may go -> the roles of the groups that lie in it; none for the layer itself."""


def select_layers(
    model: Any,
    groups: Groups,
    batches: Any,
    remove: Amount,
    criterion: str = "block_influence",
    *,
    part: str = "layer",
    layers: LayerSpec | None = None,
    progress: bool | None = None,
) -> Plan:
    """A plan that removes whole decoder layers, or the attention or the FFN of some.

        plan = pyprune.select_layers(model, pyprune.discover(model), token_ids, 3)
        smaller = pyprune.apply(model, plan)

    Args:
        model: a causal LM; it is left as it was.
        groups: what :func:`pyprune.discover` found in it.
        batches: calibration, as :func:`pyprune.score` takes it.
        remove: how many layers go (int), or which fraction of them (float; the nearest number, at least one).
        criterion: ``block_influence`` or ``perplexity``; see :func:`pyprune.importance.depth.score_layers`.
        part: what goes of them: ``layer``, ``attention`` or ``ffn``.
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

    return plan_layers(groups, remove, scored, layers, part, model.config)[0]


def plan_layers(
    groups: Groups, remove: Amount, scored: Score, layers: LayerSpec | None = None, part: str = "layer",
    config: Any = None,
) -> tuple[Plan, Scores]:  # fmt: skip
    """:func:`select_layers` with its scores from ``scored``: (group, how many go, layers that stay) -> scores."""
    group, count, protected = removable(groups, remove, layers, part, config)
    scores = scored(group, count, protected)
    plan = without(groups, group, scores.details["removed"])
    plan.details |= {"criterion": scores.criterion, "layer_scores": scores[group.name][0].tolist()}
    plan.details |= {k: scores.details[k] for k in ("loss", "losses") if k in scores.details}
    return plan, scores


def removable(
    groups: Groups, remove: Amount, layers: LayerSpec | None = None, part: str = "layer", config: Any = None
) -> tuple[Group, int, tuple[int, ...]]:  # fmt: skip
    """The group of the layers or sub-blocks, how many of them go, and which units stay in any case.

    Args:
        config: of the model. transformers measures a KV cache by the first layer of each of its kinds
            (``layer_types``); where the attention of some layers goes or is gone, those layers keep theirs.

    Raises:
        PyPruneError: the model has no layers or sub-blocks that can be removed, or not so many.
    """
    remove = parse_removal("remove_layers", remove)
    if part not in PARTS:
        raise unknown_name("layer_part", part, PARTS)
    members = members_of(groups, "layers", None, "remove_layers")
    group = max(members, key=lambda g: g.units)
    only = None if layers is None else parse_layers(layers, layer_count(groups))
    stay = {*protected_units(group, only), *_lenders(groups, group)}
    why = "outside layers= or sharing weights"
    if part == "attention" or (part == "layer" and getattr(config, "pyprune_skipped", None)):
        stay |= _first_of_each(sublayers(groups, group, "attention")[1], config)
        why += ", or the first of their kind"
    if part != "layer":
        group, numbers = sublayers(groups, group, part)
        stay = {unit for unit, layer in enumerate(numbers) if layer in stay}
    protected = tuple(sorted(stay))
    count = remove if isinstance(remove, int) else max(1, int(remove * group.units + 0.5))
    most = min(group.units - 1, group.units - len(protected))
    if count > most:
        what = "layers" if part == "layer" else f"layers with {part}"
        where = f"{len(protected)} of them {why}" if protected else "one has to stay"
        problem = f"is too many: the model has {group.units} {what}, {where}"
        raise PyPruneError("remove_layers", remove, problem, f"Ask for at most {most}.")
    return group, count, protected


def sublayers(groups: Groups, layers: Group, part: str) -> tuple[Group, list[int]]:
    """The attention or the FFN of every layer that has one as a module of its own: (the group, layer of each unit).

    Raises:
        PyPruneError: no layer has.
    """
    found: dict[int, str] = {}
    for g in groups:
        if g.role not in PARTS[part] or g.layer is None:
            continue
        home = layers.modules[g.layer] if g.layer < len(layers.modules) else ""
        inside = g.module.removeprefix(f"{home}.")
        if home and inside != g.module:
            found[g.layer] = f"{home}.{inside.split('.')[0]}"
    shared = {m for m in found.values() if any(g.layer is not None and g.role in _others(part) and
              (g.module + ".").startswith(m + ".") for g in groups)}  # fmt: skip
    numbers = [i for i in sorted(found) if found[i] not in shared]
    if not numbers:
        problem = f"{part} can only go where it is a module of its own inside the layers, and in this model it is not"
        raise PyPruneError("layer_part", part, problem, "Remove whole layers, or cut widths.")
    modules = tuple(found[i] for i in numbers)
    name = f"{layers.module}:{part}"
    return Group(name, "sublayers", layers.module, None, len(modules), (), modules=modules), numbers


def _others(part: str) -> tuple[str, ...]:
    return tuple(role for other, roles in PARTS.items() if other != part for role in roles)


def _first_of_each(numbers: Sequence[int], config: Any) -> set[int]:
    """Of these layers the first of each kind."""
    kinds = None if config is None else getattr(config.get_text_config(decoder=True), "layer_types", None)
    first: dict[str, int] = {}
    for i in numbers:
        first.setdefault(kinds[i] if kinds else "", i)
    return set(first.values())


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
    part = "layer" if group.role == "layers" else group.name.rpartition(":")[2]
    numbers = list(range(group.units)) if part == "layer" else [_number(m, group.module) for m in group.modules]
    plan.details = {
        "achieved": measure(groups, plan),
        "allocation": None,
        "roles": [group.role],
        "layers": None,
        "widths": {group.role: group.units - len(gone)},
        "notes": [],
        "layer_part": part,
        "removed_layers": [numbers[i] for i in gone],
        "removal_order": [numbers[i] for i in removed],
    }
    return plan


def _number(module: str, path: str) -> int:
    """The layer that a module lies in, ``path`` being that of the layers."""
    return int(module[len(path) + 1 if path else 0 :].split(".", 1)[0])
