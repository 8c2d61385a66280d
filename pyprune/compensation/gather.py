"""What one matrix's inputs come to over the calibration: sums for the fit, and for the choice of its penalty."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.compensation.refit import Sums
from pyprune.importance.calibration import Calibration, evenly, single_rows
from pyprune.importance.inputs import Use
from pyprune.importance.steps import Step, make_steps
from pyprune.importance.taps import Key
from pyprune.importance.walk import weigh_tokens, weights_for

STEP_TOKENS = 2048  # in one pass through a block: what its backward pass holds is in memory besides all that is kept
HELD_OUT = 5  # one in so many calibration samples chooses the penalty


@dataclass
class Gathered:
    """Sums of one parameter: of the matrix, or of every expert that tokens reached.

    Attributes:
        train: of the samples that fit, by matrix.
        held: of those that choose, with the same keys.
        biases: the part of a parameter that is added to a matrix's product, where there is one: then the sums have a
            last input that is always one.
        transposed: the parameter is stored [inputs, outputs].
    """

    train: dict[Key, Sums] = field(default_factory=dict)
    held: dict[Key, Sums] = field(default_factory=dict)
    biases: dict[Key, Tensor] = field(default_factory=dict)
    transposed: bool = False


def split_rows(calibration: Calibration) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Samples that fit, and those that are held out: one in :data:`HELD_OUT`, evenly over the calibration."""
    rows = single_rows(calibration)
    chosen = evenly(max(1, len(rows) // HELD_OUT), len(rows))
    return [r for k, r in enumerate(rows) if k not in chosen], [r for k, r in enumerate(rows) if k in chosen]


def split_steps(calibration: Calibration, device: torch.device, mode: str) -> tuple[list[Step], list[bool]]:
    """Steps, and which of them are held out: none of them in mode ``bias``."""
    fit, out = split_rows(calibration)
    if mode == "bias":
        fit, out = single_rows(calibration), []
    steps = [make_steps(part, device, tokens=STEP_TOKENS) if part else [] for part in (fit, out)]
    return [*steps[0], *steps[1]], [False] * len(steps[0]) + [True] * len(steps[1])


def gather(
    p: nn.Parameter, passes: Iterable[tuple[int, Sequence[Use], Tensor | None]], steps: Sequence[Step],
    held: Sequence[bool], weighting: str, bias_of: Callable[[Use], Tensor | None],
    wanted: Callable[[int], Tensor] | None = None,
) -> Gathered:  # fmt: skip
    """Run through ``passes`` and sum up what enters ``p``.

    Args:
        passes: (step's number, uses of ``p`` in it, the stream that leaves the block), as of
            :meth:`pyprune.importance.walk.Walk.run`.
        held: which steps choose and do not fit.
        weighting: what a token counts, as in :func:`pyprune.importance.walk.weigh_tokens`.
        bias_of: the bias of a use, where it can be written to.
        wanted: the dense model's stream at a step; then the target is the product plus what the stream lacks to it.
    """
    found = Gathered()
    for number, uses, stream in passes:
        weights = weigh_tokens(steps[number], stream, weighting)
        for use in uses:
            found.transposed = use.transposed
            x, target = use.x, None
            bias = bias_of(use)
            if bias is not None:
                found.biases[use.key] = bias
                x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
            if wanted is not None and stream is not None:
                target = _target(use, p, wanted(number), stream)
            for sums in (found.train, found.held):
                if use.key not in sums:
                    wide = torch.promote_types(x.dtype, torch.float32)
                    sums[use.key] = Sums(x.new_zeros(x.shape[1], x.shape[1], dtype=wide))
            part = found.held if held[number] else found.train
            part[use.key].add(x, weights_for(x, weights, use.tokens), target)
    return found


def _target(use: Use, p: nn.Parameter, wanted: Tensor, stream: Tensor) -> Tensor:
    """Own output plus what the stream lacks, [rows, outputs]."""
    matrix = p if use.key.expert is None else p[use.key.expert]
    own = use.x @ (matrix if use.transposed else matrix.t())
    if use.bias is not None:
        own = own + use.bias
    return own + (wanted - stream).reshape(own.shape)
