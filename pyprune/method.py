"""The method ``best``: what measured best at the size that is asked for (docs/results.md), settled for a model.

Up to about a third of the parameters FFN channels go, beyond that heads too, and heads go also where the budget is not
one of parameters: as many in each layer as measured on the model. Where that would take much memory or has too little
text, a small cut is made where the expected loss is least, and a large one more in later layers. A refit and gains
follow. What the user names stays, where the cut allows it: no refit makes up for hidden channels, for example.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from pyprune.checkpoint.profiles import get_profile, own_profile
from pyprune.compensation.checks import INSIDE, REFITS
from pyprune.config import PruneConfig
from pyprune.discovery.groups import Group, Groups
from pyprune.importance.calibration import Calibration
from pyprune.importance.input_scores import unread
from pyprune.importance.registry import get_criterion
from pyprune.schedule import equal_scores
from pyprune.search.plan import LEAST_SAMPLES
from pyprune.selection.scope import roles_to_share
from pyprune.selection.searched import ON_MODEL
from pyprune.selection.select import ALLOCATIONS, select
from pyprune.stage_options import AUTO, SelectConfig

log = logging.getLogger(__name__)

TOKENS = "token_fisher"  # expected loss of a unit that a linear layer reads
LOSS = "group_fisher"  # of any unit
FFN_ROLES = ("ffn", "expert_ffn")
LIGHT_UP_TO = 0.35  # of the parameters that are counted
MEASURED_UP_TO = 1 << 30  # bytes of the sums that refits of candidates are made from
SCORE_TOKENS = 8192  # what criteria read where they order units that nothing is measured with


def for_profile(recipe: PruneConfig) -> PruneConfig:
    """With the same widths in every layer where the profile holds no others."""
    if recipe.select.method != "best" or recipe.save.profile is None or not get_profile(recipe.save.profile).EVEN:
        return recipe
    return _allocated(recipe, "uniform")


def ways(recipe: PruneConfig, groups: Groups, samples: int) -> list[PruneConfig]:
    """Roles, allocation, and whether a refit can help, for a model: the best first. The others are for models in which
    channels alone do not make up the size, or whose class has no layers of different widths.

    Args:
        samples: sequences in the calibration.
    """
    if recipe.select.method != "best":
        return [recipe]
    found = [
        _settled(way, groups, samples, channels_only)
        for way in (recipe, _allocated(recipe, "uniform"))
        for channels_only in (True, False)
    ]
    return [way for i, way in enumerate(found) if way not in found[:i]]


def _settled(recipe: PruneConfig, groups: Groups, samples: int, channels_only: bool) -> PruneConfig:
    asked = recipe.select
    goes = _share_that_goes(asked, groups)
    sized = asked.widths is None and (asked.ratio or asked.target_params) is not None
    roles = tuple(r for r in FFN_ROLES if groups.prunable([r]))
    heavy = goes > LIGHT_UP_TO
    if heavy or not channels_only or asked.budget != "parameters":
        # Where all queries share one KV head, that cannot go.
        alone = groups.prunable(["query_heads"]) and not groups.prunable(["kv_heads"])
        roles = ("query_heads", *roles) if alone else ()
    if sized and asked.roles is None and roles:
        recipe = replace(recipe, select=replace(recipe.select, roles=roles))
    cut = groups.prunable(_roles(recipe.select, groups))
    how = recipe.compensate
    if how.compensation == "none" or not all(g.exact and g.role in INSIDE for g in cut):
        how = replace(how, compensation="none", compensation_criterion="none", compensation_gains=False)
    if samples < 2:  # none to decide with
        how = replace(how, compensation_gains=False)
    if how.compensation not in REFITS or how.compensation_target != "own":
        how = replace(how, compensation_scope="outputs")
    recipe = replace(recipe, compensate=how)
    unmeasured = "log_depth" if heavy else "knapsack"
    recipe = _allocated(recipe, "descent" if _can_measure(recipe, cut, samples) else unmeasured)
    channels = all(g.role in FFN_ROLES for g in cut)
    by_tokens = recipe.select.allocation == "knapsack" and not heavy and channels
    if how.compensation_criterion == AUTO:
        judge = TOKENS if by_tokens and how.compensation == "obs" else "none"
        recipe = replace(recipe, compensate=replace(how, compensation_criterion=judge))
    if recipe.select.allocation_criterion == AUTO:
        recipe = replace(recipe, select=replace(recipe.select, allocation_criterion=TOKENS if by_tokens else LOSS))
    if not ALLOCATIONS[recipe.select.allocation].scored:
        recipe = replace(recipe, select=replace(recipe.select, allocation_criterion=None, allocation_tokens=None))
    if recipe.score.score_tokens is None and recipe.select.allocation != "descent":
        # A descent measures widths of units in this order, so that a better order is worth all tokens there.
        recipe = replace(recipe, score=replace(recipe.score, score_tokens=SCORE_TOKENS))
    return recipe


def _roles(asked: SelectConfig, groups: Groups) -> list[str]:
    """What is cut: the roles that a size is shared out over, and those whose widths are given."""
    sized = (asked.ratio or asked.target_params) is not None
    fixed = asked.widths or {}
    return [*(roles_to_share(groups, asked.roles, fixed) if sized else ()), *fixed]


def _share_that_goes(asked: SelectConfig, groups: Groups) -> float:
    """Of what is counted."""
    if asked.ratio is not None:
        return asked.ratio
    if asked.target_params is not None:
        return 1 - asked.target_params / groups.num_parameters(asked.count_embeddings)
    achieved = select(groups, equal_scores(groups), widths=asked.widths, layers=asked.layers).details["achieved"]
    return float(achieved["with_embeddings" if asked.count_embeddings else "without_embeddings"]["ratio"])


def for_model(recipe: PruneConfig, model: Any, groups: Groups, batches: Calibration | None) -> PruneConfig:
    """Expected loss in place of what linear layers read and of refits, where something is cut that none reads as inputs
    (an expert in a batched product)."""
    chosen, how = recipe.select, recipe.compensate
    asked = (recipe.score.criterion, chosen.allocation_criterion, how.compensation_criterion)
    if chosen.method != "best" or batches is None or not any(map(_by_readers, asked)):
        return recipe
    missed = unread(model, groups.prunable(_roles(chosen, groups)), batches)
    if not missed:
        return recipe
    log.warning("no linear layer reads the units of %s: scored by %s, without a refit", missed[0].name, LOSS)
    measured = chosen.allocation in ON_MODEL
    return replace(
        recipe,
        score=replace(
            recipe.score,
            criterion=LOSS if _by_readers(recipe.score.criterion) else recipe.score.criterion,
            score_tokens=recipe.score.score_tokens or SCORE_TOKENS,
        ),
        select=replace(chosen, allocation="knapsack" if measured else chosen.allocation, allocation_criterion=None),
        compensate=replace(
            how,
            compensation="none",
            compensation_criterion="none",
            compensation_scope="outputs",
            compensation_gains=False,
        ),
    )


def _by_readers(criterion: str | None) -> bool:
    """Whether a criterion reads what enters linear layers."""
    if criterion is None or criterion == "none":
        return False
    found = get_criterion(criterion)
    return found.inputs is not None or found.tokens


def tell(asked: PruneConfig, settled: PruneConfig) -> None:
    """Says what of a recipe the method has left out because the cut or the text does not allow it."""
    before, after = asked.compensate, settled.compensate
    for option in ("compensation", "compensation_criterion"):
        value, now = getattr(before, option), getattr(after, option)
        if value not in (AUTO, now):
            log.warning("%s %s does not go with what is cut: %s in its place", option, value, now)
    if before.compensation_scope != after.compensation_scope and after.compensation in REFITS:
        log.warning(
            "compensation_scope %s does not go with compensation_target %s: %s in its place",
            before.compensation_scope, after.compensation_target, after.compensation_scope,
        )  # fmt: skip
    if before.compensation_gains and not after.compensation_gains and after.compensation != "none":
        log.warning("compensation_gains is left out: there are not two samples to decide with")


def for_saving(recipe: PruneConfig, small: Any) -> PruneConfig:
    """The form that plain transformers open with ``trust_remote_code``, where a stock class cannot hold the widths of
    ``small``, the model that is saved."""
    save = recipe.save
    if save.profile is not None or save.output_dir is None:
        return recipe
    return replace(recipe, save=replace(save, profile=own_profile(small)))


def _can_measure(recipe: PruneConfig, cut: list[Group], samples: int) -> bool:
    """Whether widths can be measured on the model: with a refit, in one step, in memory that is there."""
    if recipe.compensate.compensation not in REFITS or recipe.select.iterative_steps != 1 or samples < LEAST_SAMPLES:
        return False
    return sum(_sums(g) for g in cut) <= MEASURED_UP_TO


def _sums(group: Group) -> int:
    """Bytes of half the products of what a matrix reads from the units: every expert's alone, all heads' together."""
    if group.role in FFN_ROLES:
        return 2 * group.outer * group.units**2
    return 2 * max(m.index.positions().size for m in group.members) ** 2


def _allocated(recipe: PruneConfig, allocation: str) -> PruneConfig:
    """With ``allocation`` where none is settled yet."""
    asked = recipe.select
    return recipe if asked.allocation != AUTO else replace(recipe, select=replace(asked, allocation=allocation))
