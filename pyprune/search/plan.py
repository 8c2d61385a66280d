"""From a request to a plan whose widths were searched for."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pyprune import progress as bars
from pyprune.compensation.checks import MODES
from pyprune.discovery.groups import Group, Groups
from pyprune.errors import PyPruneError, unknown_name
from pyprune.importance.calibration import (
    Calibration,
    batch_tokens,
    check_vocabulary,
    evenly,
    load_calibration,
    single_rows,
)
from pyprune.importance.modes import as_written, evaluating, in_memory
from pyprune.importance.steps import Step, make_steps
from pyprune.importance.walk import TOKEN_WEIGHTS, Walk, walking
from pyprune.search.curves import BROKEN, allocate_by_curves, measure_curves
from pyprune.search.descent import descend
from pyprune.search.evolution import Evolution, Limit, Measure
from pyprune.search.fitness import WORDS, Fitness, check_finite, figure
from pyprune.search.masking import Masking
from pyprune.search.measurements import Remembered
from pyprune.search.moves import Moves, Widths
from pyprune.search.refits import PENALTY, Refits
from pyprune.search.sites import Sites, find_sites
from pyprune.search.state import State, fingerprint_of_search, load_state
from pyprune.selection.allocation import ALLOCATIONS, Allocation, Budget
from pyprune.selection.plan import Plan
from pyprune.selection.quantities import Quantity
from pyprune.selection.requests import Amount, LayerSpec
from pyprune.selection.searched import ON_MODEL
from pyprune.selection.select import select
from pyprune.selection.units import checked_scores, removal_order

log = logging.getLogger(__name__)

STEPS = 40  # generations when no limit is given
HELD_OUT = 4  # at most one in so many samples measures candidates
HELD_TOKENS = 4096  # and at most so many tokens
FIT_TOKENS = 16384  # at most so many of the others make the refits of candidates
STEP_TOKENS = 512
LEAST_SAMPLES = 4
CANNOT = {  # role -> why its units cannot be masked
    "experts": "a masked expert would still be chosen by its router",
    "hidden": "a normalisation runs over them",
    "layers": "whole layers are no widths",
    "vocab": "they are not read inside layers",
}


def search_plan(
    model: nn.Module,
    groups: Groups,
    scores: Mapping[str, Any],
    batches: Any,
    ratio: float | None = None,
    *,
    target_params: int | str | None = None,
    widths: Mapping[str, Amount] | None = None,
    roles: Any = None,
    layers: LayerSpec | None = None,
    round_to: int | Mapping[str, int] | None = None,
    count_embeddings: bool = True,
    min_keep: Amount | Mapping[str, Amount] | None = None,
    allocation_scores: Mapping[str, Any] | None = None,
    budget: Quantity | str = "parameters",
    allocation: str = "search",
    compensation: str = "least-squares",
    token_weights: str = "inverse",
    steps: int | None = None,
    minutes: float | None = None,
    seed: int = 0,
    file: str | Path | None = None,
    cache: str | Path | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Plan:
    """A plan in which how many units each group keeps was searched for; which units, ``scores`` say.

    Or, with ``allocation="divergence"``, every group is measured alone at several widths, and the widths of least total
    divergence are taken (:mod:`pyprune.search.curves`); with ``allocation="descent"``, the best plain allocation,
    bettered along measured slopes (:mod:`pyprune.search.descent`). The measure is the Kullback-Leibler divergence of
    the dense model's next-token distributions from the candidate's, on calibration samples that nothing is fitted on.
    The weights of ``model`` are never changed.

    Args:
        model: a causal LM, dense.
        groups: its groups.
        scores: group name -> [outer, units]; higher stays longer.
        batches: calibration, as :func:`pyprune.importance.calibration.load_calibration` takes it; 4 samples or more.
            A quarter of the samples, at most 4,096 tokens, measures candidates.
        ratio, target_params, widths, roles, layers, round_to, count_embeddings, min_keep, budget: as in
            :func:`pyprune.select`.
        allocation_scores: what the score-driven first candidates read in place of ``scores``.
        allocation: ``"search"``, or ``"divergence"`` or ``"descent"``, which take no ``steps``, ``minutes`` and
            ``file``.
        compensation: what the plan will be applied with: candidates are measured so. ``least-squares``, ``obs``
            (measured as least squares), ``bias`` or ``none``.
        token_weights: of the refits, as in :func:`pyprune.compensation.compensate`.
        steps: generations; of 8 children each. None: no limit but ``minutes``, and 40 without any.
        minutes: time, of all runs of the same search together.
        seed: of the moves. With a limit in steps alone the plan is the same whenever the seed is.
        file: JSON file that keeps the search's state; where it holds one of the same search, that goes on.
        cache: folder that keeps what a descent measured; a killed one goes on, and the same one again measures nothing.
        overwrite: begin anew where ``file`` holds something else.
        progress: False silences the progress bar.

    Returns:
        The plan; ``plan.details["search"]`` (or ``["divergence"]``, ``["descent"]``) says what was tried and found.

    Raises:
        PyPruneError: what :func:`pyprune.select` refuses; roles whose units cannot be masked; too little calibration;
            limits that are none; a ``file`` with another search; a model that gives NaN or infinity however it is cut.
    """
    check_limits(steps, minutes)
    for name, value in (("search_steps", steps), ("search_minutes", minutes), ("search_file", file)):
        if allocation != "search" and value is not None:
            raise PyPruneError(name, str(value), "is for allocation search", "Leave it out.")
    for option, value, known in (
        ("compensation", compensation, MODES),
        ("token_weights", token_weights, TOKEN_WEIGHTS),
        ("allocation", allocation, ON_MODEL),
    ):
        if value not in known:
            raise unknown_name(option, value, known)
    model = in_memory(model)
    calibration = load_calibration(batches)
    check_samples(calibration)
    check_vocabulary(calibration, model)
    searcher = _Searcher(
        model, groups, scores, calibration, compensation, token_weights, Limit(steps, minutes), seed,
        None if file is None else Path(file), overwrite, None if cache is None else Path(cache),
    )  # fmt: skip
    ways = {"search": searcher.allocate, "divergence": searcher.by_divergence, "descent": searcher.by_descent}
    chosen = Allocation(allocation, ways[allocation], by_layer=True, min_keep=ALLOCATIONS[allocation].min_keep)
    with bars.shown(progress is not False):
        plan = select(
            groups, scores, ratio, target_params=target_params, widths=widths, allocation=chosen, roles=roles,
            layers=layers, round_to=round_to, count_embeddings=count_embeddings, min_keep=min_keep,
            allocation_scores=allocation_scores, budget=budget,
        )  # fmt: skip
    plan.details[allocation] = searcher.reports[0] if len(searcher.reports) == 1 else searcher.reports
    return plan


def check_limits(steps: Any, minutes: Any) -> None:
    """Raises PyPruneError unless each is None or a number above zero, a whole one for ``steps``."""
    if steps is not None and (not isinstance(steps, Integral) or isinstance(steps, bool) or steps < 1):
        raise PyPruneError("search_steps", steps, "is no number of generations", "Give a whole number, as 40.")
    number = isinstance(minutes, (int, float)) and not isinstance(minutes, bool) and 0 < minutes < math.inf
    if minutes is not None and not number:
        raise PyPruneError("search_minutes", minutes, "must be a number above 0", "Give minutes, as 30.")


def check_samples(calibration: Calibration) -> None:
    """Raises PyPruneError when too few samples are there to measure candidates on some of them."""
    if calibration.samples < LEAST_SAMPLES:
        problem = "are too few for an allocation that measures on samples that nothing is fitted on"
        raise PyPruneError("samples", calibration.samples, problem, f"Give at least {LEAST_SAMPLES}.")


def check_roles(roles: Sequence[str]) -> None:
    """Raises PyPruneError for roles whose units cannot be masked in a dense model."""
    for role in roles:
        if role in CANNOT:
            hint = "Search over kv_heads, query_heads, ffn and expert_ffn, or choose another allocation."
            raise PyPruneError("roles", role, f"cannot be searched over: {CANNOT[role]}", hint)


class _Searcher:
    """An allocation with a model in its hands."""

    def __init__(
        self, model: nn.Module, groups: Groups, scores: Mapping[str, Any], calibration: Calibration, mode: str,
        weighting: str, limit: Limit, seed: int, file: Path | None, overwrite: bool, cache: Path | None,
    ) -> None:  # fmt: skip
        self.model, self.groups, self.scores, self.calibration = model, groups, scores, calibration
        self.mode, self.weighting, self.seed = mode, weighting, seed
        self.limit = limit if (limit.steps, limit.minutes) != (None, None) else Limit(STEPS, None)
        self.file, self.overwrite, self.cache = file, overwrite, cache
        self.reports: list[dict[str, Any]] = []

    def allocate(self, groups: Sequence[Group], costs: Mapping[str, np.ndarray], budget: Budget) -> Widths:
        """Widths of ``groups``; see :data:`pyprune.selection.allocation.Allocate`."""
        started = time.monotonic()
        every, orders = self._orders(groups, budget)
        moves = Moves(groups, budget)
        starts = moves.starts(costs)
        file = self.file
        if file is not None and self.reports:  # a second search, when widths name several roles
            file = file.with_name(f"{file.name}.{len(self.reports) + 1}")
        settings = self._settings(groups, orders, budget, starts)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
        state = load_state(file, fingerprint_of_search(self.model, settings), self.overwrite)
        with self._measuring(every, orders) as (fitness, refits, masking, sites, fit):
            measure = _Measure(fitness, refits, masking, fit, self.weighting, budget.kept)
            search = Evolution(moves, measure, state, self.seed, file, started)
            search.start(starts, _anchor(starts))
            search.run(self.limit)
        best = dict(zip([g.name for g in groups], state.best, strict=True))
        self.reports.append(self._report(state, fitness, sites, fit))
        log.info("search: divergence %.4f after %d generations", state.kl, state.generation)
        return best

    def by_divergence(self, groups: Sequence[Group], costs: Mapping[str, np.ndarray], budget: Budget) -> Widths:
        """Widths of ``groups`` by how far each of them alone, at several widths, takes the model from the dense one."""
        started = time.monotonic()
        every, orders = self._orders(groups, budget)
        with self._measuring(every, orders) as (fitness, refits, masking, _, fit):
            refits.collect(fit, masking, self.weighting, dict(budget.kept))
            curves = measure_curves(groups, budget, fitness)
            best = allocate_by_curves(groups, curves, budget)
            last = (len(fitness.tokens) + 1) // 2
            divergence = fitness.total({**budget.kept, **best}, 0, last) / sum(fitness.tokens[:last])
            check_finite(divergence)
        self.reports.append({
            "divergence": divergence,
            "curves": {
                name: [[width, kl if kl < BROKEN else None] for width, kl in curve] for name, curve in curves.items()
            },
            "evaluations": sum(map(len, curves.values())),
            "seconds": round(time.monotonic() - started, 1),
            "compensation": self.mode,
            "penalty": PENALTY if self.mode in ("least-squares", "obs") else None,
            "held_out_tokens": sum(fitness.tokens[:last]),
            "fitted_tokens": sum(s.targets.numel() for s in fit) if self.mode != "none" else 0,
            "vocabulary": fitness.words,
        })  # fmt: skip
        return best

    def by_descent(self, groups: Sequence[Group], costs: Mapping[str, np.ndarray], budget: Budget) -> Widths:
        """Widths of ``groups`` from the best plain allocation along measured slopes."""
        every, orders = self._orders(groups, budget)
        moves = Moves(groups, budget)
        starts = moves.starts(costs)
        with self._measuring(every, orders) as (fitness, refits, masking, sites, fit):
            measure: Measure = _Measure(fitness, refits, masking, fit, self.weighting, budget.kept)
            if self.cache is not None:
                of = fingerprint_of_search(self.model, self._settings(groups, orders, budget, starts))
                measure = Remembered(measure, self.cache / f"measured-{of[:32]}.json", of)
            best, found = descend(moves, measure, starts, _anchor(starts))
        self.reports.append({**found, **self._protocol(fitness, sites, fit)})
        log.info("descent: divergence %.4f after %d rounds", found["divergence"], len(found["rounds"]) - 1)
        return best

    def _settings(
        self, groups: Sequence[Group], orders: Mapping[str, np.ndarray], budget: Budget, starts: Mapping[str, Widths]
    ) -> list[Any]:
        """All that a measurement depends on beside the model."""
        return [
            {n: torch.from_numpy(o.copy()) for n, o in orders.items()}, {n: vars(v) for n, v in budget.limits.items()},
            [g.name for g in groups], dict(budget.kept), budget.target, dict(budget.cost), starts,
            list(self.calibration.batches), self.mode, self.weighting, self.seed, WORDS,
        ]  # fmt: skip

    def _orders(self, groups: Sequence[Group], budget: Budget) -> tuple[list[Group], dict[str, np.ndarray]]:
        """``groups`` and those whose widths are settled already, and the order in which the units of each go."""
        every = [*groups, *(self.groups[name] for name in budget.kept)]
        check_roles([g.role for g in every])
        return every, {name: removal_order(values) for name, values in checked_scores(every, self.scores).items()}

    @contextmanager
    def _measuring(
        self, groups: Sequence[Group], orders: Mapping[str, np.ndarray]
    ) -> Iterator[tuple[Fitness, Refits, Masking, Sites, list[Step]]]:
        """The dense model, ready to be run with any widths of ``groups``; the steps that refits are made on."""
        fit, held = split(self.calibration, next(self.model.parameters()).device)
        with evaluating(self.model), as_written():
            walk = Walk(self.model, fit[:1])
            sites = find_sites(self.model, walk.blocks, groups, orders, [*held, *fit])
        parameters = dict(self.model.named_parameters())
        masking = Masking({n: parameters[n] for n in {**sites.read, **sites.made}})
        refits = Refits(self.model, sites, self.mode)
        try:
            with walking(self.model, masking.watched):
                blocks = walk.blocks if walk.whole is None else None
                yield Fitness(self.model, blocks, refits, masking, held), refits, masking, sites, fit
        finally:
            refits.clear()  # the largest of what would else wait for the garbage collector

    def _report(self, state: State, fitness: Fitness, sites: Sites, fit: Sequence[Step]) -> dict[str, Any]:
        return {
            "divergence": state.kl,
            "starts": [
                {**s, "screening": figure(s["screening"]), "divergence": figure(s["divergence"])} for s in state.starts
            ],
            "generations": state.generation,
            "evaluations": state.evaluations,
            "seconds": round(state.seconds, 1),
            "seed": self.seed,
            **self._protocol(fitness, sites, fit),
            "history": [{**h, "divergence": figure(h["divergence"])} for h in state.history],
        }

    def _protocol(self, fitness: Fitness, sites: Sites, fit: Sequence[Step]) -> dict[str, Any]:
        """How candidates were measured."""
        return {
            "compensation": self.mode,
            "penalty": PENALTY if self.mode in ("least-squares", "obs") else None,
            "held_out_tokens": sum(fitness.tokens),
            "screening_tokens": sum(fitness.tokens[: (len(fitness.tokens) + 1) // 2]),
            "fitted_tokens": sum(s.targets.numel() for s in fit) if self.mode != "none" else 0,
            "masked_matrices": len(sites.read) + len(sites.made),
            "vocabulary": fitness.words,
        }


class _Measure:
    """Fitness of some groups' widths beside those of others (``kept``), which stay."""

    def __init__(
        self, fitness: Fitness, refits: Refits, masking: Masking, fit: Sequence[Step], weighting: str,
        kept: Mapping[str, int],
    ) -> None:  # fmt: skip
        self._fitness, self._refits, self._masking = fitness, refits, masking
        self._fit, self._weighting, self._kept = fit, weighting, dict(kept)
        self.steps, self.tokens = fitness.steps, fitness.tokens

    def total(self, widths: Mapping[str, int], first: int, last: int) -> float:
        return self._fitness.total({**self._kept, **widths}, first, last)

    def rebase(self, widths: Mapping[str, int]) -> None:
        self._fitness.rebase({**self._kept, **widths})

    def anchor(self, widths: Mapping[str, int]) -> bool:
        if self._refits.mode == "none":
            return False
        self._fitness.forget()
        self._refits.collect(self._fit, self._masking, self._weighting, {**self._kept, **widths})
        return True


def split(calibration: Calibration, device: torch.device) -> tuple[list[Step], list[Step]]:
    """Steps to fit on, and steps to measure on: evenly over the calibration, one sample in :data:`HELD_OUT` as long
    as these have no more than :data:`HELD_TOKENS` tokens together, at least two samples; the rest, up to
    :data:`FIT_TOKENS`, to fit on."""
    rows = single_rows(calibration)
    longest = max(batch_tokens(r) for r in rows)
    count = max(2, min(len(rows) // HELD_OUT, HELD_TOKENS // longest))
    chosen = evenly(count, len(rows))
    fit = [r for k, r in enumerate(rows) if k not in chosen][: max(1, FIT_TOKENS // longest)]
    held = [r for k, r in enumerate(rows) if k in chosen]
    return make_steps(fit, device, tokens=8 * STEP_TOKENS), make_steps(held, device, tokens=STEP_TOKENS)


def _anchor(starts: Mapping[str, Widths]) -> Widths:
    """The widths that the refits' inputs are collected at: the first of the starts that falls with depth."""
    return next((starts[n] for n in ("log_depth", "linear") if n in starts), next(iter(starts.values())))
