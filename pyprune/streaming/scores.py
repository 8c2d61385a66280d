"""Scores of a model on disk: the numbers of :func:`pyprune.importance.scoring.score`, from one block at a time."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pyprune import progress as bars
from pyprune.discovery.groups import Groups
from pyprune.errors import PyPruneError
from pyprune.importance.aggregation import check_aggregation, group_scores, scored_members, to_float32
from pyprune.importance.blocks import NotSweepable
from pyprune.importance.calibration import Calibration, check_vocabulary
from pyprune.importance.collector import Collector
from pyprune.importance.losses import NotFinite
from pyprune.importance.memory import peak_memory
from pyprune.importance.registry import Criterion, get_criterion
from pyprune.importance.scores import Scores
from pyprune.importance.scoring import (
    FLOAT16_SCALES,
    STEP_TOKENS,
    Sums,
    check_route,
    not_finite,
    scored_names,
    scoring_state,
)
from pyprune.importance.steps import Forward, make_steps
from pyprune.importance.taps import Taps, UsedAgain
from pyprune.streaming.disk import DiskModel
from pyprune.streaming.sweep import DiskSweep, pack_sums, rehearse, sweep_scales, unpack_sums
from pyprune.streaming.workspace import Workspace

SCORES = "scores"


def score_from_disk(
    disk: DiskModel,
    groups: Groups,
    calibration: Calibration | None,
    space: Workspace,
    criterion: str = "param_first",
    aggregation: str = "sum",
    roles: Iterable[str] | None = None,
    layers: Iterable[int] | None = None,
    *,
    route: str | None = None,
    seed: int = 0,
) -> Scores:
    """Importance of every unit, with at most one decoder block's weights and gradients in memory.

    Arguments, formulas and result are those of :func:`pyprune.importance.scoring.score`. What is finished is kept in
    ``space``; a later call with the same space goes on behind it.

    Raises:
        PyPruneError: as there; or the criterion reads gradients and the model cannot be taken block by block.
    """
    if space.has(SCORES):
        return Scores.load(space.file(SCORES))
    start = time.perf_counter()
    spec = get_criterion(criterion)
    check_aggregation(aggregation)
    check_route(route, spec)
    chosen = [g for g in groups.prunable(roles, layers) if g.modules or scored_members(g)]
    if not chosen:
        raise PyPruneError(
            "roles", None, "leave no group to score", f"Groups found: {', '.join(groups.roles()) or 'none'}."
        )
    names = scored_names(groups, chosen)
    details: dict[str, Any] = {"criterion": spec.name, "aggregation": aggregation, "seed": seed}
    values: dict[str, Tensor] = {}
    if spec.draw is not None:
        for group in chosen:
            generator = torch.Generator().manual_seed(zlib.crc32(group.name.encode()) ^ seed)
            values[group.name] = spec.draw(group, generator)
    else:
        samples = None
        if not spec.backward:
            sums = _from_weights(disk, spec, names, space)
        else:
            assert calibration is not None
            check_vocabulary(calibration, disk.model)
            details["calibration"] = calibration.to_dict()
            sums = _from_calibration(disk, spec, names, calibration, route, space, details)
            samples = calibration.samples if spec.per_sample else None
        wide = {g.name: group_scores(g, sums, groups.shapes, aggregation, spec.signed, samples) for g in chosen}
        values, shifts = to_float32(wide, {g.name: g.role for g in chosen}, aggregation)
        if shifts:
            details["prod_shift"] = shifts
    dtypes = sorted({str(disk.model.get_parameter(name).dtype).removeprefix("torch.") for name in names})
    details |= {
        "dtype": ", ".join(dtypes), "seconds": time.perf_counter() - start, "peak_memory": peak_memory(disk.device),
    }  # fmt: skip
    out = Scores(values, spec.name, details)
    _keep(out, space)
    space.drop("streams", "ups", "losses", "sums", "forward")
    return out


def _keep(scores: Scores, space: Workspace) -> None:
    import json

    space.save(SCORES, scores.by_group, {"criterion": scores.criterion, "details": json.dumps(scores.details)})


def _from_weights(disk: DiskModel, spec: Criterion, names: list[str], space: Workspace) -> Sums:
    """Sums of each tensor on its own; every tensor's are kept as they are made."""
    out: Sums = {}
    for k, name in enumerate(bars.track(names, "scoring")):
        file = f"sums/{k:06d}"
        if not space.has(file):
            rows, cols = spec.sums([disk.read(name, disk.device)], None, None)
            if not rows[0].isfinite().all():
                raise not_finite(name, {})
            space.save(file, pack_sums({name: (rows[0], cols[0])}))
        out |= unpack_sums(space.load(file))
    return {name: out[name] for name in names}


def _from_calibration(
    disk: DiskModel,
    spec: Criterion,
    names: list[str],
    calibration: Calibration,
    route: str | None,
    space: Workspace,
    details: dict[str, Any],
) -> Sums:
    model = disk.model
    parameters = {name: model.get_parameter(name) for name in names}
    half = any(p.dtype == torch.float16 for p in parameters.values())
    scales = FLOAT16_SCALES if half else (1.0,)
    with scoring_state(model, parameters):
        forward = Forward(model)
        taps = None if route == "gradients" or spec.formula is None else Taps(parameters, spec)
        try:
            blocks = rehearse(disk, forward, names, calibration.batches[0], taps)
        except NotSweepable as reason:
            problem = f"reads gradients, and this model cannot be taken block by block: {reason}"
            hint = "Use l1, l2 or random, or leave stream out."
            raise PyPruneError("criterion", spec.name, problem, hint) from None
        if taps is not None and not taps.seen:
            taps = None
        details["route"] = "gradients" if taps is None else "activations"
        single = spec.separate and (taps is None or not taps.apart or len(taps.seen) < len(parameters))
        steps = make_steps(calibration, disk.device, single, STEP_TOKENS)

        def make(scale: float) -> DiskSweep:
            collector = Collector(spec, {}, calibration.samples, scale)
            sweep = DiskSweep(forward, blocks.layout, collector, collector.next_samples)
            return sweep.prepare(disk, blocks, space, taps, keep_streams=half)

        swept = len(blocks.layout.blocks) - blocks.lowest
        with bars.bar("scoring", len(steps) * (len(blocks.layout.blocks) + 1 + swept)) as bar:
            try:
                sums, losses, scale = sweep_scales(make, scales, steps, bar, space)
            except NotFinite as bad:
                raise not_finite(bad.parameter, {}) from None
            except UsedAgain as piece:
                problem = f"takes {piece} whole, and the model uses it in pieces"
                raise PyPruneError("route", "activations", problem, "Use route gradients.") from None
    details |= {"engine": "block sweep from disk", "recomputed_blocks": swept, "loss": float(losses.double().mean())}
    if half:
        details["loss_scale"] = scale
    return {name: sums[name] for name in names}
