"""The inner refit: after a projection, the matrices that feed it.

An FFN whose down projection was refitted still has what is left of its gate and up projections as they were. A
Gauss-Newton step (:mod:`pyprune.compensation.gauss_newton`) changes them so that the FFN comes nearer to what it gave
whole, on the same inputs; then the projection is refitted once more. The held-out error decides whether both stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyprune import ops
from pyprune.compensation.cache import SumsCache
from pyprune.compensation.course import Course
from pyprune.compensation.feeders import Rows, SlopeTaps
from pyprune.compensation.gauss_newton import Feeder, step
from pyprune.compensation.refit import Refit, Sums, refit
from pyprune.importance.memory import trim_heap
from pyprune.importance.steps import Step
from pyprune.importance.walk import token_weights

TOKENS = 65536  # that a step is fitted to, at most
BYTES = 400 * 2**20  # of what is kept of them
PENALTY = 0.1
ITERATIONS = 6


@dataclass
class Projection:
    """A projection whose outputs were refitted, and what feeds it.

    Attributes:
        name: the parameter's.
        matrix: [outputs, inputs], a view of it, refitted.
        bias: [outputs] or None, refitted.
        dense: copies of both as they were.
        inputs: int64 [channels], the inputs that stay.
        feeders: rows in that order.
        error: the held-out error now, as a fraction of the output's power.
    """

    name: str
    matrix: Tensor
    bias: Tensor | None
    dense: tuple[Tensor, Tensor | None]
    inputs: Tensor
    feeders: Sequence[Rows]
    error: float


@dataclass
class _Looked:
    """What the walk showed.

    Attributes:
        targets: the whole FFN's output at every step, [rows, outputs], of the dtype of products.
        chosen: numbers of the steps that the rest is of.
        residual: what is left of the outputs after the projection's refit, [tokens, outputs].
        weights: what tokens count, float32 [tokens], 1 on average.
        slopes: of every feeder, [tokens, channels].
        inputs: of every feeder, [tokens, inputs]; one tensor where feeders read the same.
    """

    targets: Sequence[Tensor]
    chosen: set[int]
    residual: Tensor
    weights: Tensor
    slopes: list[Tensor]
    inputs: list[Tensor] = field(default_factory=list)

    def inputs_of(self, k: int, seen: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
        """Where the inputs of feeder ``k`` go, given those of one step."""
        if k == len(self.inputs):
            places = [seen[n].data_ptr() for n in names]
            first = places.index(places[k])
            shape = (len(self.residual), seen[names[k]].shape[1])
            self.inputs.append(self.inputs[first] if first < k else self.residual.new_empty(shape))
        return self.inputs[k]


class InnerRefit:
    """Refits what feeds one projection after another.

    Args:
        course: the walk of the compensation.
        parameters: all of the model's, by name; changed in place.
        held: which steps choose and do not fit.
        weighting: as in :func:`token_weights`.
        penalties: that the second refit of the projection tries.
        cache: where what was found stays.
    """

    def __init__(
        self, course: Course, parameters: Mapping[str, nn.Parameter], held: Sequence[bool], weighting: str,
        penalties: Sequence[float], cache: SumsCache,
    ) -> None:  # fmt: skip
        self.course, self.parameters, self.held, self.cache = course, parameters, held, cache
        self.steps: Sequence[Step] = course.steps
        self.weighting, self.penalties = weighting, penalties

    def run(self, i: int, projection: Projection, written: Mapping[str, Tensor]) -> dict[str, Any]:
        """Refit what feeds ``projection`` of block ``i``, and the projection again, or read what another run found.

        Args:
            written: all that may change, under names of the caller's.

        Returns:
            ``penalty`` and ``after`` as in :class:`Refit`, or nothing where nothing changed.
        """
        name = f"{projection.name}, {list(self.penalties)}"
        kept = self.cache.weights(name)
        if kept is None:
            again = self._found(i, projection)
            about = {} if again is None else {"penalty": again.penalty, "after": again.after}
            self.cache.keep_weights(name, about, written if about else {})
            return about
        for key, tensor in kept[1].items():
            written[key].copy_(tensor)
        return kept[0]

    def _found(self, i: int, projection: Projection) -> Refit | None:
        trim_heap(projection.matrix.device)
        looked = self._look(i, projection)
        if looked is None:
            return None
        targets = looked.targets
        trim_heap(projection.matrix.device)
        feeders = [Feeder(x, slope) for x, slope in zip(looked.inputs, looked.slopes, strict=True)]
        kept = projection.matrix[:, projection.inputs]
        changes = step(feeders, looked.residual, looked.weights, kept, PENALTY, ITERATIONS)
        del looked, feeders
        trim_heap(projection.matrix.device)
        if not all(bool(c.isfinite().all()) for c in changes):
            return None
        before = self._add(projection.feeders, changes)
        again = self._refit(i, projection, targets)
        del targets
        trim_heap(projection.matrix.device)
        if again is None or not again.after < projection.error:
            for p, value in before:
                p.copy_(value)
            return None
        inputs = projection.matrix.shape[1]
        projection.matrix.copy_(again.weight[:, :inputs])
        if projection.bias is not None:
            projection.bias.copy_(again.weight[:, inputs])
        return again

    def _look(self, i: int, projection: Projection) -> _Looked | None:
        """The whole FFN's outputs on all tokens, and what the feeders do on some of those that fit; None where the
        projection does not read what they give, token by token."""
        p, (matrix, bias) = self.parameters[projection.name], projection.dense
        kept = projection.matrix[:, projection.inputs]
        rows = [torch.from_numpy(r.positions).to(p.device) for r in projection.feeders]
        names = [r.tensor for r in projection.feeders]
        looked = self._room(projection)
        at = 0
        with SlopeTaps(projection.name, names, self.parameters) as taps:
            for number, uses, stream in self.course.run(i, projection.name, p):
                seen, x = taps.take(), uses[0].x if len(uses) == 1 else None
                if seen is None or x is None or len(x) != self.steps[number].targets.numel():
                    return None
                trim_heap(p.device)  # steps would leave holes behind, as large as what is kept of them
                target = _outputs(x, matrix, bias)
                looked.targets[number].copy_(target)
                if number in looked.chosen:
                    part = slice(at, at := at + len(x))
                    target -= _outputs(x[:, projection.inputs], kept, projection.bias)
                    looked.residual[part] = target
                    looked.weights[part] = token_weights(self.steps[number], stream, self.weighting)
                    for k, (name, which) in enumerate(zip(names, rows, strict=True)):
                        looked.slopes[k][part] = seen.slopes[name][:, which]
                        looked.inputs_of(k, seen.inputs, names)[part] = seen.inputs[name]
                del seen, x, uses, stream, target  # before the next step makes its own
        looked.weights /= looked.weights.mean()
        return looked

    def _room(self, projection: Projection) -> _Looked:
        """Memory for all of it at once: pieces that come and go in between would leave holes."""
        p, outputs, channels = self.parameters[projection.name], projection.matrix.shape[0], len(projection.inputs)
        dtype = product_dtype(p)
        chosen = self._chosen(projection, dtype)
        tokens = sum(self.steps[n].targets.numel() for n in chosen)
        counts = [s.targets.numel() for s in self.steps]
        targets = p.new_empty(sum(counts), outputs, dtype=dtype).split(counts)
        return _Looked(
            targets, chosen, p.new_empty(tokens, outputs, dtype=dtype), p.new_empty(tokens, dtype=torch.float32),
            [p.new_empty(tokens, channels, dtype=dtype) for _ in projection.feeders],
        )  # fmt: skip

    def _chosen(self, projection: Projection, dtype: torch.dtype) -> set[int]:
        """Numbers of the steps that a step of the feeders is fitted to: evenly over those that fit."""
        channels, outputs = len(projection.inputs), projection.matrix.shape[0]
        inputs = {
            r.tensor: self.parameters[r.tensor].numel() // self.parameters[r.tensor].shape[r.dim]
            for r in projection.feeders
        }
        each = (outputs + sum(inputs.values()) + channels * len(projection.feeders)) * dtype.itemsize
        fit = [n for n, h in enumerate(self.held) if not h]
        tokens = sum(self.steps[n].targets.numel() for n in fit)
        room = min(TOKENS, BYTES // each, tokens)
        count = max(1, round(len(fit) * room / tokens))
        return {fit[len(fit) * (2 * k + 1) // (2 * count)] for k in range(count)}

    def _add(self, feeders: Sequence[Rows], changes: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Change the rows; the parameters as they were."""
        names = dict.fromkeys(r.tensor for r in feeders)
        before: list[tuple[Tensor, Tensor]] = [(self.parameters[n], self.parameters[n].detach().clone()) for n in names]
        for r, change in zip(feeders, changes, strict=True):
            p = self.parameters[r.tensor]
            p.index_add_(
                r.dim, torch.from_numpy(r.positions).to(p.device), (change if r.dim == 0 else change.t()).to(p.dtype)
            )
        return before

    def _refit(self, i: int, projection: Projection, targets: Sequence[Tensor]) -> Refit | None:
        """The projection's refit towards the outputs that the whole gave, with a ridge towards its original columns:
        the held-out samples have a part in what it is now."""
        p, (matrix, bias) = self.parameters[projection.name], projection.dense
        wide = matrix.double()
        kept = projection.inputs
        if bias is not None:
            wide = torch.cat([wide, bias.double()[:, None]], dim=1)
            kept = torch.cat([kept, kept.new_tensor([wide.shape[1] - 1])])
        size, dtype = wide.shape[1], torch.promote_types(p.dtype, torch.float32)
        train, held = (Sums(torch.zeros(size, size, dtype=dtype, device=p.device)) for _ in range(2))
        for number, uses, stream in self.course.run(i, projection.name, p):
            x = uses[0].x
            if bias is not None:
                x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
            weights = token_weights(self.steps[number], stream, self.weighting)
            (held if self.held[number] else train).add(x, weights, targets[number])
        if not bool(train.gram.isfinite().all() and held.gram.isfinite().all()):
            return None
        return refit(wide, kept, train, held, self.penalties, (1.0,))


def product_dtype(matrix: Tensor) -> torch.dtype:
    """What the steps' products are made in: bfloat16 where the processor multiplies it faster, else float32."""
    if matrix.device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    able = torch.cpu.get_capabilities()
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32


def _outputs(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """What a projection gives, in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    outputs = ops.product(x.to(wide), matrix.to(wide))
    return outputs if bias is None else outputs + bias
