"""Whole layers, or their attention or FFN, before widths: what is asked of each, and what cannot be had together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from pyprune.config import PruneConfig
from pyprune.discovery.groups import Group, Groups
from pyprune.errors import PyPruneError
from pyprune.importance.cache import cached
from pyprune.importance.depth import score_layers
from pyprune.importance.scores import Scores
from pyprune.schedule import equal_scores, requests, without_scores
from pyprune.selection.compose import compose
from pyprune.selection.layers import plan_layers, removable, without
from pyprune.selection.plan import Plan
from pyprune.selection.requests import parse_layers
from pyprune.selection.scope import layer_count
from pyprune.selection.select import select
from pyprune.stage_options import DepthConfig, ScoreConfig, SelectConfig

# What says how widths are scored and chosen.
OF_WIDTHS = {
    ScoreConfig: ("criterion", "route", "aggregation", "token_weights", "score_tokens"),
    SelectConfig: (
        "roles", "allocation", "allocation_criterion", "allocation_tokens", "round_to", "min_keep", "iterative_steps",
    ),
}  # fmt: skip


def cuts_widths(asked: SelectConfig) -> bool:
    """Whether anything but whole layers goes."""
    return asked.ratio is not None or asked.target_params is not None or asked.widths is not None


def check(recipe: PruneConfig) -> None:
    """What contradicts ``remove_layers`` in a recipe.

    Raises:
        PyPruneError: the option that does not go with it.
    """
    depth, asked = recipe.depth, recipe.select
    for option, named in (("roles", asked.roles), ("widths", asked.widths)):
        if "layers" in (named or ()):
            problem = f"names layers, and remove_layers {depth.remove_layers} removes layers already"
            raise PyPruneError(option, None, problem, "Leave one of the two out.")
    if asked.scores_file is not None:
        problem = "are of the whole model, and widths are scored on what remove_layers leaves"
        raise PyPruneError("scores_file", asked.scores_file, problem, "Leave it out.")
    if asked.method == "best" and not cuts_widths(asked):
        problem = "is for cuts of a ratio, and only whole layers go"
        raise PyPruneError("method", asked.method, problem, "Give a ratio too, or leave it out.")
    mode = recipe.compensate.compensation
    if mode != "none" and not cuts_widths(asked):
        problem = "makes up for cuts inside layers, and only whole layers go"
        raise PyPruneError("compensation", mode, problem, "Give a ratio too, or use none.")
    if not cuts_widths(asked):
        for stage in (recipe.score, asked):
            for option in OF_WIDTHS[type(stage)]:
                value = getattr(stage, option)
                if value != getattr(type(stage)(), option):
                    problem = "says how widths are cut, and no size is asked for that would cut any"
                    raise PyPruneError(option, value, problem, "Give a ratio too, or leave it out.")
    if recipe.save.profile is not None:
        from pyprune.checkpoint.profiles import get_profile

        held = get_profile(recipe.save.profile).ROLES
        if held is not None and "layers" not in held:
            problem = f"removes layers, and profile {recipe.save.profile} holds cuts of {', '.join(held)} only"
            raise PyPruneError("remove_layers", depth.remove_layers, problem, "Choose another profile.")


def trial(recipe: PruneConfig, groups: Groups, config: Any = None) -> Plan:
    """A plan of the sizes that are asked for, made without scores: layers and widths in one.

    Args:
        config: of the model, as in :func:`pyprune.selection.layers.removable`.

    Raises:
        PyPruneError: the request cannot be met.
    """
    depth, asked = recipe.depth, recipe.select
    assert depth.remove_layers is not None
    group, count, protected = removable(groups, depth.remove_layers, asked.layers, depth.layer_part, config)
    numbers = [i for i in range(group.units) if i not in protected]
    sizes = {i: sum(groups.numel(p) for p in _counted(groups, asked) if p.startswith(f"{group.modules[i]}."))
             for i in numbers}  # fmt: skip
    smallest = sorted(numbers, key=lambda i: (sizes[i], -i))[:count]
    check_room(recipe, groups, without(groups, group, smallest))
    gone = numbers[-count:]  # the first layers are the ones that configurations tell apart from the rest
    first = without(groups, group, gone)
    if not cuts_widths(asked):
        return first
    left = remaining(asked, groups, first)
    list(requests(left, groups))  # for its errors
    equal = equal_scores(groups)
    if depth.layer_part != "layer":
        return _with_widths(first, left, groups, equal, asked.ratio)
    equal[group.name] = torch.tensor([[0.0 if i in gone else 1.0 for i in range(group.units)]])
    return select(
        groups, equal, asked.ratio, target_params=asked.target_params, roles=left.roles, round_to=left.round_to,
        widths={**(left.widths or {}), "layers": group.units - count}, count_embeddings=left.count_embeddings,
        layers=asked.layers, min_keep=_without_layers(left.min_keep),
        **without_scores({"allocation": left.allocation}),
    )  # fmt: skip


def _with_widths(
    first: Plan, left: SelectConfig, groups: Groups, equal: dict[str, torch.Tensor], ratio: float | None
) -> Plan:
    """Widths in the groups that lie outside the sub-blocks which ``first`` removes, and that removal; ``ratio`` as it
    was asked for."""
    gone = tuple(f"{m}." for m in first.removed_modules())
    after = first.new_shapes(groups.shapes)
    staying = replace(
        groups,
        groups=[
            replace(g, members=tuple(m for m in g.members if m.tensor in after))
            for g in groups if not f"{g.module}.".startswith(gone)
        ],
        shapes={n: s for n, s in groups.shapes.items() if n in after},
        parameters=frozenset(n for n in groups.parameters if n in after),
    )  # fmt: skip
    with as_ratio(ratio):
        widths = select(staying, equal, **without_scores(list(requests(left, staying))[-1]))
    out = compose(groups, first, widths)
    out.details["layers"] = widths.details["layers"]
    return out


def choose(model: Any, groups: Groups, batches: Any, recipe: PruneConfig) -> tuple[Plan, Scores]:
    """The plan that removes layers, by the criterion that is asked for, and what each layer is worth."""
    depth, asked = recipe.depth, recipe.select
    assert depth.remove_layers is not None

    def scored(group: Group, count: int, protected: tuple[int, ...]) -> Scores:
        settings = {
            "layer_criterion": depth.layer_criterion, "count": count, "protected": protected, "group": group.to_dict()
        }  # fmt: skip
        return cached(
            recipe.score.cache, model, batches, settings,
            lambda: score_layers(model, group, batches, count, depth.layer_criterion, protected),
        )  # fmt: skip

    plan, scores = plan_layers(groups, depth.remove_layers, scored, asked.layers, depth.layer_part, model.config)
    check_room(recipe, groups, plan)
    return plan, scores


def requests_after(
    asked: SelectConfig, dense: Groups, plan: Plan, now: Groups
) -> tuple[list[dict[str, Any]], list[str], list[int] | None]:
    """What is asked of the model that ``plan`` leaves: arguments of ``select`` for every step, roles, layers.

    Args:
        now: groups of that model.
    """
    if not cuts_widths(asked):
        return [], [], None
    steps = list(requests(remaining(asked, dense, plan), now))
    with as_ratio(asked.ratio):
        details = select(now, equal_scores(now), **without_scores(steps[-1])).details
    return steps, details["roles"], details["layers"]


def check_room(recipe: PruneConfig, groups: Groups, plan: Plan) -> None:
    """Raises PyPruneError when the layers alone are more than the size that is asked for takes away."""
    asked = recipe.select
    found = plan.details["achieved"]["with_embeddings" if asked.count_embeddings else "without_embeddings"]
    target = _target(asked, groups)
    if target is None or found["after"] >= target:
        return
    size = f"ratio {asked.ratio:g}" if asked.ratio is not None else f"target_params {asked.target_params:,}"
    gone = plan.details["removed_layers"]
    what = {"layer": "layers", "attention": "attention blocks", "ffn": "FFNs"}[plan.details["layer_part"]]
    problem = (
        f"{len(gone)} {what} alone are {found['ratio']:.4f} of the parameters ({found['after']:,} stay), "
        f"more than {size} removes"
    )
    raise PyPruneError(
        "remove_layers", recipe.depth.remove_layers, problem, "Remove fewer layers, or ask for a smaller model."
    )


@contextmanager
def as_ratio(ratio: float | None) -> Iterator[None]:
    """Errors about the parameters that :func:`remaining` makes of a ratio, named after that."""
    try:
        yield
    except PyPruneError as error:
        if ratio is None or error.option != "target_params":
            raise
        problem = f"leaves {error.value:,} parameters, and {error.problem}"
        raise PyPruneError("ratio", ratio, problem, error.hint.replace(error.option, "ratio")) from error


def remaining(asked: SelectConfig, dense: Groups, plan: Plan) -> SelectConfig:
    """What is asked of the model that ``plan`` leaves: sizes in absolute terms, layers under their new numbers.

    Raises:
        PyPruneError: ``layers`` names only layers that are gone.
    """
    layers = asked.layers
    if layers is not None and plan.details["layer_part"] == "layer":
        gone = plan.details["removed_layers"]
        kept = [i for i in range(layer_count(dense)) if i not in gone]
        wanted = parse_layers(layers, layer_count(dense)) or []
        layers = tuple(new for new, old in enumerate(kept) if old in wanted)
        if not layers:
            problem = "holds only layers that remove_layers removes, so that none is left to cut"
            raise PyPruneError("layers", asked.layers, problem, "Widen it.")
    return replace(asked, ratio=None, target_params=_target(asked, dense), layers=layers)


def inside(plan: Plan) -> Plan:
    """The plan without its removal of layers or sub-blocks."""
    return Plan(tuple(c for c in plan.cuts if not c.group.modules), plan.details)


def summary(config: DepthConfig, plan: Plan) -> dict[str, Any]:
    """What the report says of the layers that went."""
    names = ("layer_part", "removed_layers", "removal_order", "layer_scores", "loss", "losses")
    return {"criterion": config.layer_criterion, **{k: plan.details[k] for k in names if k in plan.details}}


def _target(asked: SelectConfig, dense: Groups) -> int | None:
    if asked.ratio is None:
        return asked.target_params
    total = dense.num_parameters(asked.count_embeddings)
    return total - round(asked.ratio * total)


def _counted(groups: Groups, asked: SelectConfig) -> Sequence[str]:
    return sorted(groups.parameters if asked.count_embeddings else groups.parameters - groups.embeddings)


def _without_layers(least: Any) -> Any:
    """``min_keep`` for the widths; a single amount would hold for the layers too."""
    return least if isinstance(least, dict) else None
