"""From the dense model to the smaller one, stage by stage, each on what the one before it leaves.

Whole layers first, then widths in one step or several: score, choose, make up for what goes, slice. Gains come last.
Nothing here asks whether a request can be met: :mod:`pyprune.pipeline` has done so.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pyprune import layer_removal, preflight
from pyprune.basis import Rebased, change_basis
from pyprune.compensation.cache import LIMIT, Folder
from pyprune.compensation.checks import judged_roles
from pyprune.compensation.gains import Reference, fit_gains, reference
from pyprune.compensation.stage import Compensation, compensate
from pyprune.config import PruneConfig
from pyprune.discovery.groups import Groups
from pyprune.evaluation.stages import Stages
from pyprune.importance.cache import cached
from pyprune.importance.calibration import SCORE_LENGTH, Calibration, first_tokens
from pyprune.importance.scores import Scores
from pyprune.importance.scoring import score
from pyprune.opening import Opened, groups_of
from pyprune.schedule import search_file, search_options
from pyprune.search.plan import search_plan
from pyprune.selection.compose import compose
from pyprune.selection.plan import Plan
from pyprune.selection.searched import ON_MODEL
from pyprune.selection.select import select
from pyprune.stage_options import ScoreConfig
from pyprune.surgery.apply import apply
from pyprune.surgery.rebuild import rebuild
from pyprune.surgery.writable import check_writable


@dataclass
class Job:
    """What is to be cut: settled, and found to be possible.

    Attributes:
        recipe: every option; nothing in it is left to a method.
        groups: of the dense model.
        batches: calibration, or None where no stage reads it.
        ready: scores that are given in place of the first ones, or None.
        requests: arguments of :func:`pyprune.select`, one set for each step.
        roles: that may be cut.
        layers: to which the cuts keep, or None for all.
    """

    recipe: PruneConfig
    groups: Groups
    batches: Calibration | None
    ready: Scores | None
    requests: list[dict[str, Any]]
    roles: list[str]
    layers: list[int] | None


@dataclass
class Cut:
    """What comes of a :class:`Job`.

    Attributes:
        model: smaller.
        plan: over the dense model's groups, also when it was made in several steps.
        scores: the first ones of units (of what ``remove_layers`` leaves, where layers go); of whole layers where
            nothing else goes.
        depth: what the report says of whole layers, or None where none were asked to go.
        basis: what was written in another basis, or None.
        compensations: one for each step that had any.
    """

    model: Any
    plan: Plan
    scores: Scores
    depth: dict[str, Any] | None = None
    basis: Rebased | None = None
    compensations: list[Compensation] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """What basis and compensations have to say to the user."""
        return [*([] if self.basis is None else self.basis.notes), *(n for c in self.compensations for n in c.notes)]


def cut_down(job: Job, dense: Opened, stages: Stages, copy: bool = False) -> Cut:
    """The smaller model. ``dense`` loses its weights, unless ``copy`` is on."""
    work = _Cutting(job, dense, stages, copy)
    work.ask_dense()
    work.remove_layers()
    work.change_basis()
    for number, request in enumerate(work.requests, start=1):
        work.step(number, request)
    work.fit_gains()
    plan = Plan() if work.plan is None else work.plan
    plan.details |= work.removed
    assert work.scores is not None
    return Cut(work.model, plan, work.scores, work.depth, work.basis, work.made)


class _Cutting:
    """Args: as of :func:`cut_down`."""

    def __init__(self, job: Job, dense: Opened, stages: Stages, copy: bool) -> None:
        self.recipe, self.batches, self.stages = job.recipe, job.batches, stages
        self.dense_groups = self.groups = job.groups
        self.requests, self.roles, self.layers = job.requests, job.roles, job.layers
        self.ready = job.ready
        self.in_file, self.kept = dense.mine, copy  # the weights of `model` still lie in a file; are somebody's
        self.model = dense.hand_over()
        self.sums = None if self.recipe.score.cache is None else Folder(Path(self.recipe.score.cache))
        self.dense_says: Reference | None = None
        self.plan: Plan | None = None
        self.scores: Scores | None = None
        self.removed: dict[str, Any] = {}  # what the plan says of whole layers
        self.depth: dict[str, Any] | None = None
        self.basis: Rebased | None = None
        self.made: list[Compensation] = []

    def ask_dense(self) -> None:
        """Keep what the dense model says, to which gains are fitted in the end."""
        if self.batches is not None and self.recipe.compensate.compensation_gains:
            with self.stages("ask the dense model", bar=False):
                self.dense_says = reference(self.model, self.batches, self.sums, _limit(self.recipe))

    def remove_layers(self) -> None:
        if self.recipe.depth.remove_layers is None:
            return
        with self.stages("choose layers", bar=False):
            plan, self.scores = layer_removal.choose(self.model, self.groups, self.batches, self.recipe)
        self.removed = {k: plan.details[k] for k in ("layer_part", "removed_layers")}
        self.depth = layer_removal.summary(self.recipe.depth, plan)
        with self.stages("remove layers"):
            self._apply(plan)
            self.groups = groups_of(self.model)
            self.requests, self.roles, self.layers = layer_removal.requests_after(
                self.recipe.select, self.dense_groups, plan, self.groups
            )

    def change_basis(self) -> None:
        if self.recipe.basis.value_basis != "principal" or self.batches is None:
            return
        with self.stages("change basis", bar=False):
            self._own()
            chosen = self.groups.prunable(self.roles, self.layers)
            self.basis = change_basis(self.model, chosen, self.batches, token_weights=self.recipe.score.token_weights)

    def step(self, number: int, request: dict[str, Any]) -> None:
        """Score, choose, make up for what goes, and slice, once."""
        step = f" {number} of {len(self.requests)}" if len(self.requests) > 1 else ""
        if number > 1:
            with self.stages("discover" + step):
                self.groups = groups_of(self.model)
        with self.stages("score" + step, bar=False):
            scores = self._score(self.recipe.score) if self.ready is None else self.ready
        shares, worth = self._second_scores(step)
        order = scores
        if worth is not None:  # which units stand for a width, before compensation chooses them anew
            order, shares = scores.weighed(worth), scores if shares is None else shares
        plan = self._choose(step, request, order, shares)
        if number == len(self.requests) and self.recipe.save.is_folder:
            check_writable(rebuild(self.model, plan).model.config)  # before weights change
        if self.batches is not None and self.recipe.compensate.compensation != "none" and plan.cuts:
            with self.stages("compensate" + step, bar=False):
                self._own()
                self.made.append(self._compensate(plan, worth))
                plan = self.made[-1].plan
        with self.stages("apply" + step):
            self._apply(plan)
        self.scores = scores if number == 1 else self.scores

    def fit_gains(self) -> None:
        if self.dense_says is None or not self.made:
            return
        with self.stages("fit gains", bar=False):
            found = fit_gains(self.model, self.dense_says, self.sums, _limit(self.recipe))
        last = self.made[-1]
        last.gains = found
        last.notes += [] if found.note is None else [found.note]

    def _second_scores(self, step: str) -> tuple[Scores | None, Scores | None]:
        """By which layers share out what goes, and what else units are worth, where other criteria say so."""
        shares = worth = None
        costs, judge = second(self.recipe, self.recipe.select.allocation_criterion), judge_of(self.recipe)
        if costs is not None:
            with self.stages("score for allocation" + step, bar=False):
                shares = self._score(costs)
        if judge is not None:
            with self.stages("score for choice" + step, bar=False):
                heard = judged_roles(self.roles, judge.criterion)
                worth = shares if shares is not None and judge == costs else self._score(judge, heard)
                worth = worth.among(g.name for g in self.groups.prunable(heard, self.layers))
        return shares, worth

    def _choose(self, step: str, request: dict[str, Any], order: Scores, shares: Scores | None) -> Plan:
        allocation = self.recipe.select.allocation
        if allocation not in ON_MODEL:
            with self.stages("select" + step):
                return select(self.groups, order, **request, allocation_scores=shares)
        with self.stages("search" if allocation == "search" else "measure widths", bar=False):
            return search_plan(
                self.model, self.groups, order, self.batches, **search_options(self.recipe, request),
                allocation_scores=shares,
                file=search_file(self.recipe) if allocation == "search" else None,
            )  # fmt: skip

    def _compensate(self, plan: Plan, worth: Scores | None) -> Compensation:
        config = self.recipe.compensate
        assert self.batches is not None
        return compensate(
            self.model, plan, self.batches, config.compensation, token_weights=self.recipe.score.token_weights,
            target=config.compensation_target, scope=config.compensation_scope, worth=worth, cache=self.sums,
            cache_limit=_limit(self.recipe),
        )  # fmt: skip

    def _score(self, config: ScoreConfig, roles: list[str] | None = None) -> Scores:
        return scored(
            self.model, self.groups, self.batches, config, self.roles if roles is None else roles, self.layers,
            self.recipe.calibration.seed,
        )  # fmt: skip

    def _own(self) -> None:
        """Leaves the model that somebody keeps, before weights are changed in place."""
        if self.kept:
            self.model, self.kept = deepcopy(self.model), False

    def _apply(self, plan: Plan) -> None:
        self.model = apply(self.model, plan, copy=self.kept)
        self.plan = plan if self.plan is None else compose(self.dense_groups, self.plan, plan)
        self.kept = False
        if self.in_file:
            _leave_file(self.model)
            self.in_file = False


def scored(
    model: Any, groups: Groups, batches: Calibration | None, config: ScoreConfig, roles: list[str],
    layers: list[int] | None, seed: int,
) -> Scores:  # fmt: skip
    """Scores of the groups of some roles and layers: from the cache folder, if they are there."""
    options: dict[str, Any] = {
        "criterion": config.criterion, "aggregation": config.aggregation, "route": config.route, "seed": seed,
        "activation_memory": config.activation_memory, "token_weights": config.token_weights,
    }  # fmt: skip
    read = batches if preflight.needs_batches(config) else None
    if read is not None and config.score_tokens is not None:
        read = first_tokens(read, config.score_tokens, SCORE_LENGTH)
    asked = {**options, "groups": [g.to_dict() for g in groups.prunable(roles, layers)]}
    return cached(
        config.cache, model, read, asked, lambda: score(model, groups, read, roles=roles, layers=layers, **options)
    )


def second(recipe: PruneConfig, criterion: str | None) -> ScoreConfig | None:
    """How units are scored by a criterion beside the first; None without one."""
    if criterion is None:
        return None
    tokens = recipe.select.allocation_tokens or recipe.score.score_tokens
    return replace(recipe.score, criterion=criterion, route=None, score_tokens=tokens)


def judge_of(recipe: PruneConfig) -> ScoreConfig | None:
    """The criterion that has a say in which units ``obs`` keeps; None where none has."""
    how = recipe.compensate
    asked = how.compensation == "obs" and how.compensation_criterion != "none"
    return second(recipe, how.compensation_criterion) if asked else None


def _limit(recipe: PruneConfig) -> float:
    """GiB of sums in a cache folder."""
    return LIMIT if recipe.compensate.cache_limit is None else recipe.compensate.cache_limit


def _leave_file(model: Any) -> None:
    """Copy tensors on the CPU, one at a time. Those that were not cut still lie in the checkpoint file's mapping,
    which would keep the whole dense model resident."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()
