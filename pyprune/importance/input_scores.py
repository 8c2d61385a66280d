"""Scores from forward passes alone: what the inputs of a layer and its weights say about its input channels.

Only members that a linear layer reads *as inputs* have a score here (the output projection of attention, the down
projection of an FFN); the rest of a unit goes with them. One block's statistics are alive at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyprune import ops
from pyprune import progress as bars
from pyprune.discovery.groups import Group
from pyprune.errors import PyPruneError
from pyprune.importance.aggregation import AGGREGATIONS, scored_members
from pyprune.importance.calibration import Calibration
from pyprune.importance.inputs import InputTaps, Use
from pyprune.importance.registry import Criterion
from pyprune.importance.steps import Forward, make_steps
from pyprune.importance.taps import Key
from pyprune.importance.walk import SAMPLES, Walk, walking, weigh_tokens, weights_for

STEP_TOKENS = 4096


@dataclass
class InputStatistics:
    """Weighted sums over the inputs x_t of one matrix, the weights being those of :func:`weigh_tokens`.

    Attributes:
        transposed: the matrix is stored [inputs, outputs].
        rows: inputs that count (w_t > 0). Mean values are sums over it, so that with inverse weights a layer's score
            is the share of the residual stream's power that is lost, and layers can be compared.
        count: sum of the weights w_t.
        sums: sum of w_t x_t, [inputs].
        squares: sum of w_t x_t^2, [inputs].
        gram: sum of w_t x_t x_t^T, [inputs, inputs], where it was asked for.
    """

    transposed: bool
    rows: int
    count: float
    sums: Tensor
    squares: Tensor
    gram: Tensor | None

    @classmethod
    def empty(cls, use: Use, gram: bool) -> InputStatistics:
        """Without any input yet."""
        zeros = torch.zeros(use.x.shape[1], device=use.x.device, dtype=torch.promote_types(use.x.dtype, torch.float32))
        size = len(zeros)
        return cls(use.transposed, 0, 0.0, zeros, zeros.clone(), zeros.new_zeros(size, size) if gram else None)

    def add(self, x: Tensor, weights: Tensor) -> None:
        """Add the inputs ``x`` [rows, inputs] with weights [rows]."""
        x, w = x.to(self.sums.dtype), weights.to(self.sums.dtype)
        scaled = x * w.sqrt()[:, None]
        self.rows += int((weights > 0).sum())
        self.count += float(w.double().sum())
        self.sums += w @ x
        if self.gram is None:
            self.squares += ops.channel_moments(scaled)[1]
        else:
            ops.gram(scaled, self.gram)
            self.squares = self.gram.diagonal()


def score_inputs(
    model: nn.Module, criterion: Criterion, groups: Sequence[Group], parameters: Mapping[str, nn.Parameter],
    calibration: Calibration, aggregation: str, weighting: str, details: dict[str, Any],
) -> dict[str, Tensor]:  # fmt: skip
    """Group name -> float64 scores [outer, units] by a criterion that reads inputs.

    Raises:
        PyPruneError: a group that no linear layer in a block reads as inputs, or activations with NaN or infinity.
    """
    assert criterion.inputs is not None
    matrices = {n: p for n, p in parameters.items() if p.dim() in (2, 3)}
    wanted = {(m.tensor, m.dim) for g in groups for m in scored_members(g)}
    device = next(model.parameters()).device
    with walking(model, matrices), torch.no_grad():
        walk = Walk(model, make_steps(calibration, device, tokens=STEP_TOKENS))
        details["engine"] = "one block at a time" if walk.whole is None else f"the model as a whole: {walk.whole}"
        details["token_weights"] = weighting = walk.weighting(weighting)
        parts: dict[str, dict[int, Tensor]] = {g.name: {} for g in groups}
        with bars.bar("scoring", len(walk.blocks) * len(walk.steps)) as bar:
            for i, block in enumerate(walk.blocks):
                inside = {id(p) for p in block.parameters()}
                here = {n: p for n, p in matrices.items() if id(p) in inside}
                found = _statistics(walk, i, here, wanted, criterion, weighting, bar)
                for group in groups:
                    _score_members(group, criterion, found, matrices, parts[group.name])
    combine = AGGREGATIONS[aggregation]
    out = {}
    for group in groups:
        if not parts[group.name]:
            problem = (
                f"reads what enters linear layers, and no layer in a block is entered by the units of {group.name}"
            )
            raise PyPruneError("criterion", criterion.name, problem, "Choose among the roles kv_heads and ffn.")
        out[group.name] = combine(torch.stack([v for _, v in sorted(parts[group.name].items())]))
    return out


def unread(model: nn.Module, groups: Sequence[Group], calibration: Calibration) -> list[Group]:
    """Those of ``groups`` that no linear layer in a block reads as inputs, seen on a few samples: they have no score
    here, and no refit."""
    tensors = {m.tensor for g in groups for m in g.members}
    matrices = {n: p for n, p in model.named_parameters() if n in tensors and p.dim() in (2, 3)}
    with walking(model, matrices), torch.no_grad():
        walk = Walk(model, make_steps(list(calibration)[:SAMPLES], next(model.parameters()).device))
        inside = {id(p) for block in walk.blocks for p in block.parameters()}
        left = list(groups)
        for step in walk.steps[:SAMPLES]:
            with InputTaps(matrices) as taps:
                Forward(model)(step.part(slice(0, 1)))
            read = {(u.key.name, u.input_dim(matrices[u.key.name].dim())) for u in taps.uses}
            read = {(name, dim) for name, dim in read if id(matrices[name]) in inside}
            left = [g for g in left if not any((m.tensor, m.dim) in read for m in g.members)]
            if not left:
                break
    return left


def _statistics(
    walk: Walk, i: int, matrices: Mapping[str, nn.Parameter], wanted: Set[tuple[str, int]], criterion: Criterion,
    weighting: str, bar: bars.Bar,
) -> dict[Key, InputStatistics]:  # fmt: skip
    found: dict[Key, InputStatistics] = {}
    for number, uses, stream in walk.run(i, matrices):
        weights = weigh_tokens(walk.steps[number], stream, weighting)
        for use in uses:
            if (use.key.name, use.input_dim(matrices[use.key.name].dim())) not in wanted:
                continue
            if use.key not in found:
                found[use.key] = InputStatistics.empty(use, criterion.inputs == "gram")
            found[use.key].add(use.x, weights_for(use.x, weights, use.tokens))
        walk.leave(number, stream)
        bar.advance()
    for key, statistics in found.items():
        if not bool(statistics.squares.isfinite().all()):
            hint = "Load the model in float32 or bfloat16, and look at the calibration text."
            raise PyPruneError("model", key.name, "is given inputs with NaN or infinity", hint)
    return found


def _score_members(
    group: Group,
    criterion: Criterion,
    found: Mapping[Key, InputStatistics],
    matrices: Mapping[str, nn.Parameter],
    into: dict[int, Tensor],
) -> None:
    """Unit scores of the group's members that these matrices read as inputs, by the member's number."""
    assert criterion.units is not None
    for number, member in enumerate(scored_members(group)):
        for key, statistics in found.items():
            if key.name != member.tensor:
                continue
            p = matrices[key.name]
            if member.dim != (p.dim() - 2 if statistics.transposed else p.dim() - 1):
                continue
            weight = (p if key.expert is None else p[key.expert]).detach().double()
            positions = torch.from_numpy(member.index.positions().copy())
            value = criterion.units(weight.t() if statistics.transposed else weight, statistics, positions).cpu()
            into[number] = into[number] + value if number in into else value
