"""Whether a model may be swept block by block: tried on a few tokens, since nothing in a model's class says it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.importance.blocks import Call, NotSweepable, intercepted
from pyprune.importance.calibration import take
from pyprune.importance.collector import Collector
from pyprune.importance.losses import loss_and_seed, targets_of
from pyprune.importance.samples import NotTappable, SampleTaps
from pyprune.importance.steps import Forward, Step
from pyprune.importance.sweep import Layout, Sweep

log = logging.getLogger(__name__)

TOKENS = 8


def plan_sweep(
    model: nn.Module, forward: Forward, collector: Collector, batch: Mapping[str, Any], device: torch.device
) -> tuple[Layout, SampleTaps | None]:
    """The blocks to sweep over; and where the criterion reads curvatures, taps if the scored parameters allow them.

    The gradient of the stream that enters the first block must come out the same from a sweep as from one backward pass
    through the whole model. A path around the blocks (a layer that reads an earlier layer's keys, say) would change it.

    Raises:
        NotSweepable: the model has no blocks, or they are not all that lies between its embedding and its head.
    """
    layout = Layout.of(model, collector.parameters)
    step = _few_tokens(batch, device)
    taps = None
    try:
        expected = _entry_gradient(forward, layout, step)
        if collector.criterion.curvature and not layout.outer:
            try:
                taps = SampleTaps.of(model, collector.parameters)
                got = _swept_gradient(forward, layout, collector, step, taps)
            except NotTappable as reason:
                log.info("one backward pass for each sample: %s", reason)
                taps = None
        if taps is None:
            got = _swept_gradient(forward, layout, collector, step, None)
    except NotSweepable:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        raise NotSweepable(f"its blocks do not run one by one ({type(error).__name__}: {error})") from error
    off = float((got.float() - expected.float()).norm())
    # Sixteen-bit kernels may add in another order when a graph is cut; a missing path is off by much more.
    if not off <= (1e-3 if expected.dtype in (torch.float32, torch.float64) else 0.05) * float(expected.float().norm()):
        raise NotSweepable("gradients reach the first block by paths around the others")
    return layout, taps


def _swept_gradient(
    forward: Forward, layout: Layout, collector: Collector, step: Step, taps: SampleTaps | None
) -> Tensor:
    """The same gradient as :func:`_entry_gradient`, by a sweep."""
    sweep = Sweep(forward, layout, collector, activation_bytes=1 << 62, strict=True)
    if taps is None:
        return sweep.entry_gradient(step)
    taps.rows = step.rows
    with taps.installed():
        gradient = sweep.entry_gradient(step)
    taps.rows = None  # they do keep samples apart
    return gradient


def _few_tokens(batch: Mapping[str, Any], device: torch.device) -> Step:
    if "input_ids" in batch:
        ids = batch["input_ids"][0]
        mask = batch.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            ids = ids[mask[0] != 0]
        # Twice the same sample, so that a layer's input shows whether it keeps samples apart.
        small: dict[str, Any] = {"input_ids": ids[None, :TOKENS].repeat(2, 1)}
    else:
        small = take(batch, slice(0, 2))
    targets = targets_of(small).to(device)
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in small.items()}
    return Step(inputs, targets).unlabelled()


def _entry_gradient(forward: Forward, layout: Layout, step: Step) -> Tensor:
    """Gradient of the loss with respect to the stream that enters the first block, by one ordinary backward pass."""
    entry: list[Tensor] = []

    def handler(i: int, stream: Tensor, call: Call, rest: list[Any]) -> Any:
        if i == 0:
            stream = stream.detach().requires_grad_()
            entry.append(stream)
        return call(stream)

    with intercepted(layout.blocks, handler):
        logits = forward(step)
    if len(entry) != 1:
        raise NotSweepable("the model does not run its first block once")
    _, seed = loss_and_seed(logits, step.targets, 1.0)
    return torch.autograd.grad(logits, entry, seed)[0]
