"""The scoring stage: groups and calibration in, one number a unit out."""

from __future__ import annotations

import logging
import math
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyprune import progress as bars
from pyprune.discovery.groups import Group, Groups
from pyprune.errors import PyPruneError, unknown_name
from pyprune.importance import criteria  # noqa: F401 (registers them)
from pyprune.importance.aggregation import check_aggregation, group_scores, scored_members, to_float32
from pyprune.importance.blocks import NotSweepable
from pyprune.importance.calibration import Calibration, check_vocabulary, load_calibration
from pyprune.importance.collector import Collector
from pyprune.importance.expert_scores import score_experts
from pyprune.importance.input_scores import score_inputs
from pyprune.importance.losses import NotFinite
from pyprune.importance.memory import activation_budget, peak_memory, trim_heap
from pyprune.importance.modes import as_written, evaluating, in_memory
from pyprune.importance.plain import accumulate
from pyprune.importance.registry import Criterion, get_criterion
from pyprune.importance.rehearsal import plan_sweep, plan_whole
from pyprune.importance.scores import Scores
from pyprune.importance.steps import Forward, Step, make_steps
from pyprune.importance.sweep import Layout, Sweep
from pyprune.importance.taps import Taps, UsedAgain, experts_one_by_one
from pyprune.importance.token_scores import score_tokens
from pyprune.importance.walk import TOKEN_WEIGHTS

log = logging.getLogger(__name__)

Sums = dict[str, tuple[Tensor, Tensor]]

ROUTES = ("activations", "gradients")
STEP_TOKENS = 1024  # small batches are joined to this many tokens: matrix products on fewer rows are slower
ADDED_TOKENS = 128  # the same on a CPU where batches add up: more tokens at once save no time there, but cost memory
STREAM_BYTES = 64 << 20  # that streams at the borders of the blocks may take in any case

# Gradients of float16 weights below 6e-8 would vanish, so losses are scaled up for the backward pass, by less when that
# overflows. All sums are float32, where squares of such gradients have room.
FLOAT16_SCALES = (2.0**15, 2.0**10, 2.0**5, 1.0)


def score(
    model: nn.Module,
    groups: Groups,
    batches: Any = None,
    criterion: str = "param_first",
    aggregation: str = "sum",
    roles: Iterable[str] | None = None,
    layers: Iterable[int] | None = None,
    *,
    route: str | None = None,
    seed: int = 0,
    activation_memory: float | None = None,
    token_weights: str = "inverse",
    progress: bool | None = None,
) -> Scores:
    """Importance of every unit of the prunable groups.

    A member's score of a unit is the sum over the unit's positions of the salience of the slices there; ``aggregation``
    combines the members. With a gradient criterion the loss of a sample is the mean over its own tokens (padding and
    labels of -100 left out), and gradients are means over samples, whatever the batches are.

    Gradients are consumed while the backward pass runs, one decoder block at a time, so memory beyond that of the
    weights is one block's gradients, the residual stream at every block's border, and ``activation_memory``. Where the
    streams of a long calibration would take more than all gradients, a criterion that does not add up over batches
    (param_first, param_mix) keeps those instead. A model whose blocks cannot be run one by one is passed backward as a
    whole. ``details["engine"]`` says which it was, and why.

    The model is left as it was: training mode, ``requires_grad``, ``.grad`` and hooks.

    Args:
        model: a causal LM; any module whose forward pass returns logits [batch, length, vocabulary].
        groups: what :func:`pyprune.discover` found in it.
        batches: calibration: anything that :func:`load_calibration` reads without a tokenizer. Needed by criteria that
            read gradients.
        criterion: a registered name: random, l1, l2, vectorize, param_first (taylor), param_second (fisher), param_mix,
            group_fisher, token_fisher; wanda, flap, obs (forward passes alone), reap (of experts).
        aggregation: sum, mean, max, prod, first or last, over a group's members in their order. ``prod`` is scaled by a
            power of two for each role where float32 could not hold it (``details["prod_shift"]``).
        roles: only groups of these roles; None is all.
        layers: only groups of these decoder layers; None is all.
        route: ``"activations"``: salience comes from what went into a layer and the gradient that came back, and no
            gradient of a weight is ever made; ``"gradients"``: from the gradients that autograd makes. None takes
            activations for what can be had from them (``details["route"]`` says what it was).
        seed: of the criterion ``random``; each group draws its own numbers, whichever others are scored.
        activation_memory: MiB of saved activations that may stay alive in place of being recomputed: more is faster.
            None: as much as the model's weights take, but no more than a quarter of the free memory.
        token_weights: of the criteria that read inputs: ``"inverse"`` (each token counts 1 / mean(h^2), h its residual
            stream behind the block), ``"sink"`` (the same, the first token of each sequence as an eighth of its
            tokens) or ``"equal"``.
        progress: False silences the progress bar; None leaves it to :mod:`pyprune.progress`.

    Returns:
        Scores with ``details``: criterion, aggregation, seed, calibration, loss (mean over samples, nats per token),
        route, engine, recomputed_blocks, dtype, seconds, peak_memory (bytes: of the GPU, or the process's high-water
        mark).

    Raises:
        PyPruneError: an unknown criterion or aggregation, no groups, missing or unfit calibration, weights or gradients
            with NaN or infinity (the parameter is named).
    """
    start = time.perf_counter()
    model = in_memory(model)
    spec = get_criterion(criterion)
    check_aggregation(aggregation)
    check_route(route, spec)
    if token_weights not in TOKEN_WEIGHTS:
        raise unknown_name("token_weights", token_weights, TOKEN_WEIGHTS)
    chosen = [g for g in groups.prunable(roles, layers) if g.modules or scored_members(g)]
    if not chosen:
        raise PyPruneError(
            "roles", None, "leave no group to score", f"Groups found: {', '.join(groups.roles()) or 'none'}."
        )
    parameters = _scored_parameters(model, groups, chosen)
    device = next(iter(parameters.values())).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    details: dict[str, Any] = {"criterion": spec.name, "aggregation": aggregation, "seed": seed}
    values: dict[str, Tensor] = {}
    with bars.shown(progress is not False):
        if spec.draw is not None:
            _check_weights(parameters)
            for group in chosen:
                generator = torch.Generator().manual_seed(zlib.crc32(group.name.encode()) ^ seed)
                values[group.name] = spec.draw(group, generator)
        else:
            samples = None
            if spec.of_units:
                calibration = _calibration(batches, spec)
                check_vocabulary(calibration, model)
                details |= {"calibration": calibration.to_dict(), "token_weights": token_weights}
                _check_weights(parameters)
                if spec.tokens:
                    wide = score_tokens(model, chosen, parameters, calibration, aggregation, seed, details)
                elif spec.experts:
                    wide = score_experts(model, chosen, parameters, calibration, spec.name, details)
                    aggregation = "sum"  # one number an expert
                else:
                    wide = score_inputs(
                        model, spec, chosen, parameters, calibration, aggregation, token_weights, details
                    )  # fmt: skip
            elif not spec.backward:
                sums = _from_weights(spec, parameters)
            else:
                calibration = _calibration(batches, spec)
                check_vocabulary(calibration, model)
                details["calibration"] = calibration.to_dict()
                sums = _from_calibration(model, spec, parameters, calibration, route, activation_memory, details)
                samples = calibration.samples if spec.per_sample else None
            if not spec.of_units:
                wide = {g.name: group_scores(g, sums, groups.shapes, aggregation, spec.signed, samples) for g in chosen}
            values, shifts = to_float32(wide, {g.name: g.role for g in chosen}, aggregation)
            if shifts:
                details["prod_shift"] = shifts
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in parameters.values()})
    details |= {
        "dtype": ", ".join(dtypes), "seconds": time.perf_counter() - start, "peak_memory": peak_memory(device),
    }  # fmt: skip
    return Scores(values, spec.name, details)


def _calibration(batches: Any, spec: Criterion) -> Calibration:
    if batches is None:
        raise PyPruneError(
            "calibration",
            None,
            f"is needed by criterion {spec.name!r}",
            "Give text or batches, or use l1, l2 or random.",
        )
    if isinstance(batches, str):
        raise PyPruneError(
            "batches", batches, "is a name, not batches", "Read it with load_calibration and a tokenizer."
        )
    return load_calibration(batches)


def _scored_parameters(model: nn.Module, groups: Groups, chosen: list[Group]) -> dict[str, nn.Parameter]:
    """Name -> parameter for every tensor that the chosen groups score, in model order; tied ones once."""
    out: dict[str, nn.Parameter] = {}
    for name in scored_names(groups, chosen):
        try:
            p = model.get_parameter(name)
        except AttributeError:
            raise PyPruneError(
                "groups", name, "is not a parameter of this model", "Discover its groups again."
            ) from None
        if tuple(p.shape) != groups.shapes[name]:
            raise PyPruneError(
                "groups", name, f"has shape {list(p.shape)}, and the groups speak of {list(groups.shapes[name])}",
                "Discover its groups again.",
            )  # fmt: skip
        if not p.is_floating_point():
            raise PyPruneError(
                "model", name, f"has dtype {p.dtype}, which has no gradient", "Load the model without quantisation."
            )
        out[name] = p
    return out


def scored_names(groups: Groups, chosen: list[Group]) -> list[str]:
    """First names of every tensor that the chosen groups score, in model order.

    Raises:
        PyPruneError: the groups do not know a tensor's shape.
    """
    wanted = {m.tensor for g in chosen for m in scored_members(g)}
    prefixes = tuple(module + "." for g in chosen for module in g.modules)
    if prefixes:
        wanted |= {name for name in groups.parameters if name.startswith(prefixes)}
    missing = wanted - groups.shapes.keys()
    if missing:
        raise PyPruneError("groups", sorted(missing)[0], "has no shape in the groups", "Discover the groups again.")
    return [name for name in groups.shapes if name in wanted]


def _from_weights(spec: Criterion, parameters: Mapping[str, nn.Parameter]) -> Sums:
    rows, cols = spec.sums([p.detach() for p in parameters.values()], None, None)
    for name, r in zip(parameters, rows, strict=True):
        if not r.isfinite().all():
            _check_weights(parameters)
            hint = "Use l1, or load a checkpoint with weights of a usual size."
            raise PyPruneError("model", name, f"has weights whose {spec.name} score is beyond float32", hint)
    return dict(zip(parameters, zip(rows, cols, strict=True), strict=True))


def check_route(route: str | None, spec: Criterion) -> None:
    """Raises PyPruneError when there is no such route, or the criterion cannot take it."""
    if route is not None and route not in ROUTES:
        raise unknown_name("route", route, ROUTES)
    if route is not None and spec.of_units:
        problem = f"means nothing to criterion {spec.name!r}, which takes no gradient of a weight"
        raise PyPruneError("route", route, problem, "Leave it out.")
    if route == "activations" and spec.backward and spec.formula is None:
        raise PyPruneError(
            "route", route, f"cannot serve criterion {spec.name!r}, which needs whole gradients", "Use gradients."
        )


def _from_calibration(
    model: nn.Module,
    spec: Criterion,
    parameters: Mapping[str, nn.Parameter],
    calibration: Calibration,
    route: str | None,
    activation_memory: float | None,
    details: dict[str, Any],
) -> Sums:
    device = next(model.parameters()).device
    scales = FLOAT16_SCALES if any(p.dtype == torch.float16 for p in parameters.values()) else (1.0,)
    budget = activation_budget(activation_memory, model, device)
    with scoring_state(model, parameters), ExitStack() as stack:
        forward, layout = Forward(model), None
        taps = None if route == "gradients" or spec.formula is None else Taps(parameters, spec)
        if taps is not None:
            stack.enter_context(experts_one_by_one(model, parameters))
        try:
            layout = plan_sweep(model, forward, parameters, calibration.batches[0], device, taps)
        except NotSweepable as reason:
            log.info("scoring by whole backward passes: %s", reason)
            details["engine"] = f"whole backward passes: {reason}"
            try:
                if taps is not None:
                    plan_whole(forward, parameters, calibration.batches[0], device, taps)
            except NotSweepable:
                taps = None  # the real batches will tell what is wrong
        if taps is not None and not taps.seen:
            taps = None
        details["route"] = "gradients" if taps is None else "activations"
        # Samples whose gradients come from autograd are told apart by passing them backward one by one.
        single = spec.separate and (taps is None or not taps.apart or len(taps.seen) < len(parameters))
        steps = make_steps(calibration, device, single, _step_tokens(spec, layout, budget, device))
        if taps is not None:
            forward.around = taps.active
        total = len(steps) * (max(1, len(layout.blocks) // 2) + len(layout.blocks) if layout else 1)
        if taps is not None and len(steps) == 1:  # embedding and head come in pieces all the same
            taps.whole = frozenset(set(parameters) - set(layout.outer if layout is not None else ()))

        def attempt(scale: float) -> tuple[Collector, Tensor]:
            collector = Collector(spec, parameters, calibration.samples, scale)
            passed: Callable[[], None] = collector.next_samples
            for p in parameters.values():
                p.grad = None  # of an attempt that was broken off
            if taps is not None:
                taps.begin(collector)
                passed = taps.flush
            with bars.bar("scoring", total) as bar:
                if layout is None:
                    return collector, accumulate(forward, steps, collector, passed, bar)
                return collector, _sweep(forward, layout, collector, passed, budget, steps, bar, details)

        for scale in scales:
            try:
                try:
                    collector, losses = attempt(scale)
                except UsedAgain as piece:
                    log.info("scoring again, whole samples at a time: %s is used in pieces", piece)
                    assert taps is not None
                    taps.hold_all()
                    collector, losses = attempt(scale)
            except NotFinite as bad:
                if bad.parameter is not None and scale != scales[-1]:
                    continue
                raise not_finite(bad.parameter, dict(model.named_parameters())) from None
            break
    details["loss"] = float(losses.double().mean())
    if scales != (1.0,):
        details["loss_scale"] = scale
    return {name: collector.sums[name] for name in parameters}


def _step_tokens(spec: Criterion, layout: Layout | None, budget: int, device: torch.device) -> int:
    """Tokens in a step: no more, where batches add up, than leave nothing to recompute, and a quarter of the room for
    the holes that allocation leaves."""
    if layout is None:
        return 0
    tokens = STEP_TOKENS * (4 if device.type == "cuda" else 1)
    if not spec.additive:
        return tokens
    most = tokens if device.type == "cuda" else min(tokens, ADDED_TOKENS)
    return min(most, budget * 3 // 4 // max(1, layout.saved_bytes))


def _sweep(
    forward: Forward,
    layout: Layout,
    collector: Collector,
    passed: Callable[[], None],
    budget: int,
    steps: list[Step],
    bar: bars.Bar,
    details: dict[str, Any],
) -> Tensor:
    """One sweep over all steps; or several, so that streams at the borders take no more than all gradients would."""
    gradients = sum(
        p.numel() * torch.promote_types(p.dtype, torch.float32).itemsize for p in collector.parameters.values()
    )
    # Where batches add up there is nothing to be gained from having several in one sweep.
    tokens = max(gradients, STREAM_BYTES) // max(1, layout.stream_bytes * len(layout.blocks))
    parts = _parts(steps, 0 if collector.criterion.additive else tokens)
    losses, recomputed = [], 0
    for i, part in enumerate(parts):
        sweep = Sweep(forward, layout, collector, passed, budget)
        losses.append(sweep.run(part, bar, finish=collector.criterion.additive or i == len(parts) - 1))
        recomputed = max(recomputed, sweep.recomputed)
    # Once and not after each run: a run needs the same memory as the one before, and new pages take time.
    trim_heap(steps[0].targets.device)
    kept = len(parts) > 1 and not collector.criterion.additive
    details["engine"] = "block sweep, gradients kept" if kept else "block sweep"
    details["recomputed_blocks"] = recomputed
    return torch.cat(losses)


def _parts(steps: list[Step], tokens: int) -> list[list[Step]]:
    """The steps in as few runs as have no more than ``tokens`` tokens each (at least one step)."""
    parts: list[list[Step]] = []
    size = 0
    for step in steps:
        if not parts or size + step.targets.numel() > tokens:
            parts.append([])
            size = 0
        parts[-1].append(step)
        size += step.targets.numel()
    return parts


def _check_weights(parameters: Mapping[str, nn.Parameter]) -> None:
    for name, p in parameters.items():
        if not bool(torch.linalg.vector_norm(p.detach(), math.inf).isfinite()):
            raise not_finite(name, parameters)


def not_finite(where: str | None, parameters: Mapping[str, nn.Parameter]) -> PyPruneError:
    """The error for NaN or infinity: a weight that holds it, else the gradient ``where``, else the loss."""
    for name, p in parameters.items():
        if not bool(p.detach().isfinite().all()):
            return PyPruneError("model", name, "holds NaN or infinity", "Load a checkpoint with sound weights.")
    hint = "Load the model in float32 or bfloat16, and look at the calibration text."
    if where is None:
        return PyPruneError("calibration", None, "gives a loss that is NaN or infinite", hint)
    return PyPruneError("model", where, "has a gradient with NaN or infinity", hint)


@contextmanager
def _without_hooks(parameters: Sequence[Any]) -> Iterator[None]:
    """What somebody hung on the gradients of parameters (an optimizer's step, a scaling) is off within it."""
    hooks = [(p, p._backward_hooks, p._post_accumulate_grad_hooks) for p in parameters]
    try:
        for p, *held in hooks:
            if any(held):
                p._backward_hooks = p._post_accumulate_grad_hooks = None
        yield
    finally:
        for p, backward, accumulated in hooks:
            if backward or accumulated:
                p._backward_hooks, p._post_accumulate_grad_hooks = backward, accumulated


@contextmanager
def scoring_state(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Evaluation mode, gradients for the scored parameters only; everything back as it was afterwards."""
    wanted = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    scored = {id(p) for p in parameters.values()}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(evaluating(model))
        stack.enter_context(as_written())
        stack.enter_context(_without_hooks([p for p, _, _ in wanted]))
        try:
            for p, _, _ in wanted:
                p.grad = None
                p.requires_grad_(id(p) in scored)
            yield
        finally:
            for p, flag, grad in wanted:
                p.requires_grad_(flag)
                p.grad = grad
