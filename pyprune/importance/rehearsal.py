"""Whether a model may be swept block by block: tried on a few tokens, since nothing in a model's class says it.

One forward pass with markers at the borders of the blocks, and a walk through its autograd graph: what leaves a block
must depend on earlier blocks, and on parameters other than its own, through nothing but the stream that enters it; and
the logits on the blocks through nothing but the stream that leaves the last. A layer that reads an earlier layer's
keys, a skip connection around blocks or a scaling between them would give wrong gradients, and each is seen in the
graph. Nothing is passed backward.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from pyprune.importance.blocks import Call, NotSweepable, SavedBytes, intercepted, like, stream_of, with_new_stream
from pyprune.importance.calibration import take
from pyprune.importance.losses import targets_of
from pyprune.importance.steps import Forward, Step
from pyprune.importance.sweep import Layout, bypass
from pyprune.importance.taps import NotTappable, Taps, untapped

log = logging.getLogger(__name__)

TOKENS = 8


def plan_sweep(
    model: nn.Module,
    forward: Forward,
    parameters: Mapping[str, nn.Parameter],
    batch: Mapping[str, Any],
    device: torch.device,
    taps: Taps | None = None,
) -> Layout:
    """The blocks to sweep over.

    Args:
        parameters: the scored ones; they require gradients, and no others do.
        batch: the first of the calibration.
        taps: what the layers are to be tapped by; it learns what it can see.

    Raises:
        NotSweepable: the model has no blocks, or they are not all that lies between its embedding and its head.
    """
    layout = Layout.of(model, parameters)
    step = few_tokens(batch, device)
    _tried(taps, forward, parameters, step, lambda: _rehearse(forward, layout, parameters, step))
    return layout


def plan_whole(
    forward: Forward, parameters: Mapping[str, nn.Parameter], batch: Mapping[str, Any], device: torch.device, taps: Taps
) -> None:
    """Let ``taps`` learn what they see of a model that is passed backward as a whole.

    Raises:
        NotSweepable: the model does not run on a few tokens of the batch.
    """
    step = few_tokens(batch, device)
    _tried(taps, forward, parameters, step, lambda: forward(step))


def _tried(
    taps: Taps | None, forward: Forward, parameters: Mapping[str, nn.Parameter], step: Step, run: Callable[[], Tensor]
) -> None:
    try:
        if taps is None:
            run()
            return
        forward.around = taps.active
        try:
            with taps.rehearsal(step.rows):
                logits = run()
        except NotTappable as reason:
            log.info("one backward pass for each sample: %s", reason)
            taps.apart = False
            with taps.rehearsal(None):
                logits = run()
        taps.drop(untapped(logits, parameters))
    except (NotSweepable, torch.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        raise NotSweepable(f"its blocks do not run one by one ({type(error).__name__}: {error})") from error
    finally:
        forward.around = nullcontext


class _Border(torch.autograd.Function):
    """Identity, with a node of its own in the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Tensor:
        return dx


def _rehearse(forward: Forward, layout: Layout, parameters: Mapping[str, nn.Parameter], step: Step) -> Tensor:
    """One forward pass, and the checks; returns the logits. Raises NotSweepable."""
    n = len(layout.blocks)
    borders: list[Tensor] = []  # behind the marker in front of each block, and after the last
    leaving: list[Tensor] = []  # what leaves each block
    forms: dict[int, Any] = {}
    saved: list[int] = []

    def handler(i: int, stream: Tensor, call: Call, rest: list[Any]) -> Any:
        if i != len(leaving):
            raise NotSweepable("its blocks do not follow each other")
        if stream.dim() != 3 or stream.shape[0] != step.rows:
            raise NotSweepable(f"its residual stream has shape {list(stream.shape)} for {step.rows} samples")
        if i > 0 and stream is not leaving[-1]:
            raise NotSweepable("something happens to the residual stream between its blocks")
        layout.stream_bytes = max(layout.stream_bytes, stream.shape[2] * stream.element_size())
        if i == 0 and not stream.requires_grad:
            stream = stream.detach().requires_grad_()
        borders.append(_Border.apply(stream))
        counter = SavedBytes(layout.blocks[i])
        with counter.active():
            out = call(borders[-1])
        saved.append(counter.total)
        forms[i] = like(out)
        y = stream_of(out)
        if i == n - 1:
            borders.append(_Border.apply(y))
            y = borders[-1]
            out = with_new_stream(out, y)
        leaving.append(y)
        return out

    with intercepted(layout.blocks, handler):
        logits = forward(step)
    if len(leaving) != n:
        raise NotSweepable("it does not run all of its blocks")
    layout.saved_bytes = sum(saved) // step.targets.numel()

    marks = {border.grad_fn: i for i, border in enumerate(borders)}
    owners = {id(p): name for name, p in parameters.items()}
    for i in range(n):
        start = borders[n].grad_fn.next_functions[0][0] if i == n - 1 else leaving[i].grad_fn  # type: ignore[union-attr]
        _check_reach(start, marks, i, owners, layout.names[i])
    _check_reach(logits.grad_fn, marks, n, owners, layout.outer)
    if logits.is_meta:  # weights on disk have no values to compare with
        return logits

    with torch.no_grad():
        again, _ = bypass(forward, layout, forms, step, borders[n])
        off, size = float((again - logits).float().norm()), float(logits.float().norm())
    if not off <= 0.01 * size:
        raise NotSweepable("its head needs more of the blocks than the residual stream")
    return logits


def _check_reach(
    start: Node | None, marks: Mapping[Any, int], own: int, owners: Mapping[int, str], allowed: list[str]
) -> None:
    """Walk the graph back from ``start`` up to markers: only marker ``own`` and the allowed parameters may be met."""
    seen: set[Node] = set()
    met = False
    open_nodes = [start]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        mark = marks.get(node)
        if mark is not None:
            if mark != own:
                raise NotSweepable("gradients pass by its blocks")
            met = True
            continue
        name = owners.get(id(getattr(node, "variable", None))) or getattr(node, "parameter", None)
        if name is not None and name not in allowed:
            raise NotSweepable(f"{name} acts outside its block")
        open_nodes += [following for following, _ in node.next_functions]
    if not met:
        raise NotSweepable("its logits do not depend on all of its blocks")


def few_tokens(batch: Mapping[str, Any], device: torch.device) -> Step:
    """A step of two samples, so that a layer's input shows whether it keeps samples apart."""
    if "input_ids" in batch:
        ids = batch["input_ids"][0]
        mask = batch.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            ids = ids[mask[0] != 0]
        small: dict[str, Any] = {"input_ids": ids[None, :TOKENS].repeat(2, 1)}
    else:
        small = take(batch, slice(0, 2))
    targets = targets_of(small).to(device)
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in small.items()}
    return Step(inputs, targets).unlabelled()
