"""The inner refit: after a projection, the matrices that feed it.

An FFN whose down projection was refitted still has what is left of its gate and up projections as they were. They and
the down projection are fitted together to what the FFN gave whole, on the same inputs
(:mod:`pyprune.compensation.reconstruction`); then the projection is refitted once more. The held-out error decides
whether all of it stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyprune import ops
from pyprune.compensation.cache import SumsCache
from pyprune.compensation.course import Course
from pyprune.compensation.feeders import FeederTaps, Given, Program, Rows
from pyprune.compensation.reconstruction import Feeder, reconstruct
from pyprune.compensation.refit import Refit, Sums, fits, refit
from pyprune.importance.calibration import evenly
from pyprune.importance.memory import trim_heap
from pyprune.importance.steps import Step
from pyprune.importance.walk import weigh_tokens
from pyprune.ops.product import fast_bf16

BYTES = 512 * 2**20  # of the inputs and outputs of the tokens that a reconstruction sees, at most
CLOSE = 1e-3  # how far what a program gives may be from what the block gave, as a fraction


@dataclass
class Projection:
    """A projection whose outputs were refitted, and what feeds it.

    Attributes:
        name: the parameter's.
        matrix: [outputs, inputs], a view of it, refitted.
        bias: [outputs] or None, refitted.
        dense: copies of both as they were.
        inputs: int64 [channels], the inputs that stay.
        fitted: float64 [outputs, channels], and the bias where there is one: what held-out tokens have no part in.
        feeders: rows in the order of ``inputs``.
        error: the held-out error now, as a fraction of the output's power.
    """

    name: str
    matrix: Tensor
    bias: Tensor | None
    dense: tuple[Tensor, Tensor | None]
    inputs: Tensor
    fitted: Tensor
    feeders: Sequence[Rows]
    error: float


@dataclass
class _Feeding:
    """One of the matrices that feed a projection.

    Attributes:
        dim: the dimension along which its rows lie.
        rows: int64, those that stay, in order.
        bias: of these rows, or None.
    """

    dim: int
    rows: Tensor
    bias: Tensor | None = None


@dataclass
class _Looked:
    """What the walk showed.

    Attributes:
        targets: the whole FFN's output at every step, [rows, outputs], of the dtype of products.
        chosen: numbers of the steps that the reconstruction sees, in order.
        weights: what their tokens count, float32 [tokens].
        matrices: that feed the projection, by name.
        inputs: of each matrix, [tokens, inputs]; one tensor where they read the same.
        program: what is done to what they give.
    """

    targets: Sequence[Tensor]
    chosen: Sequence[int]
    weights: Tensor
    matrices: dict[str, _Feeding]
    inputs: dict[str, Tensor] = field(default_factory=dict)
    program: Program = field(default_factory=Program)


class InnerRefit:
    """Refits what feeds one projection after another.

    Args:
        course: the walk of the compensation.
        parameters: all of the model's, by name; changed in place.
        held: which steps choose and do not fit.
        weighting: as in :func:`weigh_tokens`.
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
        name = f"reconstructed {projection.name}, {list(self.penalties)}, {product_dtype(projection.matrix)}"
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
        inputs = projection.matrix.shape[1]
        bias = None if projection.bias is None else projection.fitted[:, -1].float()
        trim_heap(projection.matrix.device)
        looked = self._look(i, projection)
        if looked is None:
            return None
        trim_heap(projection.matrix.device)
        reader = projection.fitted[:, : len(projection.inputs)].float()
        found, reader = reconstruct(
            looked.program, self._feeders(looked), reader, bias, torch.cat([looked.targets[n] for n in looked.chosen]),
            looked.weights, projection.error,
        )  # fmt: skip
        targets, matrices = looked.targets, looked.matrices
        del looked
        trim_heap(projection.matrix.device)
        if not all(fits(c, projection.matrix.dtype) for c in (*found.values(), reader)):
            return None
        before = [(p, p.detach().clone()) for p in (projection.matrix, *(self.parameters[n] for n in found))]
        projection.matrix[:, projection.inputs] = reader.to(projection.matrix.dtype)
        for name, m in matrices.items():
            value = found[name] if m.dim == 0 else found[name].t()
            self.parameters[name].index_copy_(m.dim, m.rows, value.to(projection.matrix.dtype))
        again = self._refit(i, projection, targets, bias)
        del targets
        trim_heap(projection.matrix.device)
        if again is None or not again.after < projection.error:
            for p, value in before:
                p.copy_(value)
            return None
        projection.matrix.copy_(again.weight[:, :inputs])
        if projection.bias is not None:
            projection.bias.copy_(again.weight[:, inputs])
        return again

    def _feeders(self, looked: _Looked) -> dict[str, Feeder]:
        def kept(name: str, m: _Feeding) -> Tensor:
            rows = self.parameters[name].index_select(m.dim, m.rows)
            return (rows if m.dim == 0 else rows.t()).float()

        return {n: Feeder(looked.inputs[n], kept(n, m), m.bias) for n, m in looked.matrices.items()}

    def _look(self, i: int, projection: Projection) -> _Looked | None:
        """The whole FFN's outputs on all tokens, and what enters the feeders on those that fit; None where what lies
        between the feeders and the projection cannot be done again for some channels of some tokens."""
        p, (matrix, bias) = self.parameters[projection.name], projection.dense
        looked = self._room(projection)
        at, tried = 0, False
        with FeederTaps(projection.name, looked.matrices, self.parameters) as taps:
            for number, uses, stream in self.course.run(i, projection.name, p):
                given, x = taps.take(), uses[0].x if len(uses) == 1 else None
                if given is None or x is None or len(x) != self.steps[number].targets.numel():
                    return None
                trim_heap(p.device)  # steps would leave holes behind, as large as what is kept of them
                looked.targets[number].copy_(_outputs(x, matrix, bias))
                if not tried:
                    tried, looked.program = True, taps.program
                    if not self._is_right(looked, given, x[:, projection.inputs]):
                        return None
                if number in looked.chosen:
                    part = slice(at, at := at + len(x))
                    looked.weights[part] = weigh_tokens(self.steps[number], stream, self.weighting)
                    self._keep(looked, given, part)
                del given, x, uses, stream  # before the next step makes its own
        return looked

    def _is_right(self, looked: _Looked, given: Mapping[str, Given], wanted: Tensor) -> bool:
        """Whether the program gives what the projection read, on the channels that stay alone.

        Notes the biases that were seen, which the reconstruction needs too.
        """
        # Other tokens than those that it was seen on, which a number for each of them would show.
        some = torch.arange(len(wanted) - 1, -1, -2, device=wanted.device)
        products, wanted = {}, wanted[some]
        for name, m in looked.matrices.items():
            rows = self.parameters[name].index_select(m.dim, m.rows)
            bias = given[name].bias
            if bias is not None:
                m.bias = bias.detach()[m.rows].float()
            products[name] = _outputs(given[name].x[some], rows if m.dim == 0 else rows.t(), m.bias)
        try:
            found = looked.program(products)
        except (RuntimeError, LookupError, ValueError, TypeError):  # sizes of the whole stand in it, or a matrix twice
            return False
        close = 30 * CLOSE if wanted.dtype in (torch.bfloat16, torch.float16) else CLOSE
        return found.shape == wanted.shape and float((found - wanted).norm()) <= close * float(wanted.norm())

    def _keep(self, looked: _Looked, given: Mapping[str, Given], part: slice) -> None:
        """Keep what enters the feeders, once where they read the same."""
        for name, g in given.items():
            first = next(n for n, other in given.items() if other.x.data_ptr() == g.x.data_ptr())
            if name not in looked.inputs:
                shape = (len(looked.weights), g.x.shape[1])
                looked.inputs[name] = looked.inputs[first] if first != name else looked.targets[0].new_empty(shape)
            if first == name:
                looked.inputs[name][part] = g.x

    def _room(self, projection: Projection) -> _Looked:
        """Memory for all of it at once: pieces that come and go in between would leave holes."""
        p, outputs = self.parameters[projection.name], projection.matrix.shape[0]
        rows: dict[str, list[Rows]] = {}
        for r in projection.feeders:
            rows.setdefault(r.tensor, []).append(r)
        positions = {n: np.unique(np.concatenate([r.positions for r in all_])) for n, all_ in rows.items()}
        matrices = {n: _Feeding(rows[n][0].dim, torch.from_numpy(k).to(p.device)) for n, k in positions.items()}
        dtype = product_dtype(p)
        chosen = self._chosen(matrices, outputs, dtype)
        counts = [s.targets.numel() for s in self.steps]
        targets = p.new_empty(sum(counts), outputs, dtype=dtype).split(counts)
        tokens = sum(counts[n] for n in chosen)
        return _Looked(targets, chosen, p.new_empty(tokens, dtype=torch.float32), matrices)

    def _chosen(self, matrices: Mapping[str, _Feeding], outputs: int, dtype: torch.dtype) -> list[int]:
        """Numbers of the steps that a reconstruction sees: evenly over those that fit."""
        inputs = {n: self.parameters[n].shape[1 - m.dim] for n, m in matrices.items()}
        each = (outputs + sum(inputs.values())) * dtype.itemsize
        fit = [n for n, h in enumerate(self.held) if not h]
        tokens = sum(self.steps[n].targets.numel() for n in fit)
        count = max(1, round(len(fit) * min(BYTES // each, tokens) / tokens))
        return [fit[k] for k in sorted(evenly(count, len(fit)))]

    def _refit(self, i: int, projection: Projection, targets: Sequence[Tensor], bias: Tensor | None) -> Refit | None:
        """The projection's refit towards the outputs that the whole gave, with a ridge towards what it is now."""
        p, wide, kept = self.parameters[projection.name], projection.matrix.double(), projection.inputs
        if bias is not None:
            wide = torch.cat([wide, bias.double()[:, None]], dim=1)
            kept = torch.cat([kept, kept.new_tensor([wide.shape[1] - 1])])
        size, dtype = wide.shape[1], torch.promote_types(p.dtype, torch.float32)
        train, held = (Sums(torch.zeros(size, size, dtype=dtype, device=p.device)) for _ in range(2))
        for number, uses, stream in self.course.run(i, projection.name, p):
            x = uses[0].x
            if bias is not None:
                x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
            weights = weigh_tokens(self.steps[number], stream, self.weighting)
            (held if self.held[number] else train).add(x, weights, targets[number])
        if not bool(train.gram.isfinite().all() and held.gram.isfinite().all()):
            return None
        return refit(wide, kept, train, held, self.penalties, (1.0,), projection.matrix.dtype)


def product_dtype(matrix: Tensor) -> torch.dtype:
    """What products of a reconstruction are made in: bfloat16 where the processor multiplies it faster."""
    return torch.bfloat16 if fast_bf16(matrix.device) else torch.float32


def _outputs(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """What a projection gives, in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    outputs = ops.product(x.to(wide), matrix.to(wide))
    return outputs if bias is None else outputs + bias
