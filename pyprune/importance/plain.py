"""Gradients by whole backward passes: for models whose blocks cannot be taken one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyprune.importance.collector import Collector
from pyprune.importance.losses import check_losses, loss_and_seed
from pyprune.importance.steps import Forward, Step
from pyprune.progress import Bar


def accumulate(
    forward: Forward, steps: Sequence[Step], collector: Collector, passed: Callable[[], None], bar: Bar
) -> Tensor:
    """Run every step forward and backward; the collector holds the sums afterwards.

    With one step, or a criterion that adds up over batches, a gradient is turned into sums and freed the moment it is
    complete. Otherwise the gradients of the scored parameters are added up until the last batch.

    Args:
        passed: called after every backward pass.

    Returns:
        Every sample's loss, float32 or wider.

    Raises:
        NotFinite: losses, weights or gradients hold NaN or infinity.
    """
    at_once = len(steps) == 1 or collector.criterion.additive
    handles = collector.install(after=(lambda name: collector.finish([name])) if at_once else None)
    losses = []
    try:
        for step in steps:
            logits = forward(step)
            loss, seed = loss_and_seed(logits, step.targets, collector.factor)
            losses.append(check_losses([loss]))
            if logits.requires_grad:
                torch.autograd.backward(logits, seed)
                passed()
            del logits, seed
            bar.advance()
    finally:
        for handle in handles:
            handle.remove()
    # Parameters that no loss reached (an expert without tokens) are worth nothing; what is finished is looked at again.
    collector.finish(collector.parameters)
    return torch.cat(losses)
