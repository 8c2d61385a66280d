"""What `prune` does when only a size is asked for: the combination that measured best at that size.

docs/results.md has the measurements. Who names a criterion, an allocation or a compensation gets exactly that, with
plain choices for the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pyprune.checkpoint.profiles import get_profile
from pyprune.compensation.stage import INSIDE
from pyprune.config import PruneConfig
from pyprune.discovery.groups import Groups
from pyprune.errors import PyPruneError
from pyprune.selection.global_ranking import FLOORS
from pyprune.selection.scope import roles_to_share
from pyprune.stage_options import ScoreConfig
from pyprune.surgery.skeleton import is_stock

CHANNELS = ("ffn", "expert_ffn")
FEW_TOKENS = 8192  # that scores are measured on: they only have to rank layers, and gradients cost most


@dataclass(frozen=True)
class Method:
    """A way to prune: values of the options of the same names."""

    criterion: str
    allocation: str
    allocation_criterion: str | None
    compensation: str


PLAIN = Method("param_first", "uniform", None, "none")
LIGHT = Method("wanda", "knapsack", "group_fisher", "obs")  # FFN channels, where the loss is least
HEAVY = Method("wanda", "log_depth", None, "obs")  # heads too, and more in later layers
EVEN = Method("wanda", "uniform", None, "obs")  # where every layer must keep the same
LIGHT_UP_TO = 0.35  # of the parameters that are counted


def filled(recipe: PruneConfig) -> tuple[PruneConfig, bool]:
    """The recipe with a value for every option that says how to prune, and whether these were left open.

    They are open when a size and a text are given and nothing that says how. What depends on the model is settled by
    :func:`for_groups`.
    """
    asked = recipe.select
    said = (recipe.score.criterion, asked.allocation, asked.allocation_criterion, recipe.compensate.compensation)
    sized = (asked.ratio is not None or asked.target_params is not None) and asked.widths is None
    unsaid = all(value is None for value in said) and asked.scores_file is None
    inside = set(asked.roles or ()) <= set(INSIDE)
    text = recipe.calibration.calibration is not None
    if not (sized and unsaid and inside and text) or recipe.streaming.stream:
        return _with(recipe, PLAIN), False
    even = recipe.save.profile is not None and get_profile(recipe.save.profile).EVEN
    return _with(recipe, EVEN if even else LIGHT, FEW_TOKENS), True


def for_groups(recipe: PruneConfig, groups: Groups) -> PruneConfig:
    """What :func:`filled` left open, settled for a model: roles, allocation, and whether a refit can help."""
    asked = recipe.select
    total = groups.num_parameters(asked.count_embeddings)
    goes = asked.ratio if asked.ratio is not None else 1 - (asked.target_params or total) / total
    if asked.allocation != EVEN.allocation and goes > LIGHT_UP_TO:
        heavier = replace(asked, allocation=HEAVY.allocation, allocation_criterion=HEAVY.allocation_criterion)
        recipe = replace(recipe, select=heavier)
    elif asked.allocation != EVEN.allocation and asked.roles is None:
        channels = groups.prunable(CHANNELS)
        room = sum(int(g.units * (1 - FLOORS[g.role])) * g.outer * groups.parameters_per_unit(g) for g in channels)
        if room > goes * total:
            roles = tuple(r for r in CHANNELS if any(g.role == r for g in channels))
            recipe = replace(recipe, select=replace(recipe.select, roles=roles))
    asked = recipe.select
    if not all(g.exact for g in groups.prunable(roles_to_share(groups, asked.roles, ()))):
        return replace(recipe, compensate=replace(recipe.compensate, compensation="none"))
    return recipe


def for_saving(recipe: PruneConfig, smallest: Any) -> PruneConfig:
    """The form that plain transformers open with ``trust_remote_code``, where a stock class cannot hold the widths.

    Args:
        smallest: a model of the pruned widths, on the meta device.
    """
    if recipe.save.profile is not None or recipe.save.output_dir is None or is_stock(smallest.config):
        return recipe
    try:
        get_profile("hetero-hf").check(smallest)
    except PyPruneError:
        return recipe  # as pyprune.load opens it
    return replace(recipe, save=replace(recipe.save, profile="hetero-hf"))


def scoring(config: ScoreConfig) -> ScoreConfig:
    """Scoring alone, with the plain criterion where none is named."""
    return config if config.criterion is not None else replace(config, criterion=PLAIN.criterion)


def _with(recipe: PruneConfig, method: Method, score_tokens: int | None = None) -> PruneConfig:
    """The recipe with a method's values where it has none."""
    score, asked, after = recipe.score, recipe.select, recipe.compensate
    return replace(
        recipe,
        score=replace(
            score, criterion=score.criterion or method.criterion, score_tokens=score.score_tokens or score_tokens
        ),
        select=replace(
            asked,
            allocation=asked.allocation or method.allocation,
            allocation_criterion=asked.allocation_criterion or method.allocation_criterion,
        ),
        compensate=replace(after, compensation=after.compensation or method.compensation),
    )
