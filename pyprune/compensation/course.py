"""The walk of the compensation over a model's blocks, which runs nothing before its result is asked for.

While the sums of matrices are found on the disk, blocks are left behind without running them. The first matrix whose
sums are not there needs the stream that enters its block: then the blocks that were left behind are run, one after the
other, with the weights that they had when their turn was, so that every bit is that of a walk which ran them in time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import linear

from pyprune.importance.inputs import Use
from pyprune.importance.steps import Step
from pyprune.importance.walk import Walk


@dataclass(frozen=True)
class LastChange:
    """What a block's last matrix was, where the change of it is added to the stream behind the block as it is.

    Attributes:
        name: of the parameter ``p``, [outputs, inputs] or, ``transposed``, [inputs, outputs].
        before: a copy of it.
        bias: what is added to its product, where that is a parameter, and ``bias_before`` a copy.
    """

    name: str
    p: nn.Parameter
    before: Tensor
    transposed: bool
    bias: Tensor | None
    bias_before: Tensor | None

    def change(self) -> tuple[Tensor, Tensor | None]:
        """By how much the matrix [outputs, inputs] and its bias differ from before."""
        matrix = self.p.t() - self.before.t() if self.transposed else self.p - self.before
        offset = None if self.bias is None or self.bias_before is None else self.bias - self.bias_before
        return matrix, offset

    @property
    def originals(self) -> list[tuple[Tensor, Tensor]]:
        """(what is in the model, what was there)."""
        out: list[tuple[Tensor, Tensor]] = [(self.p, self.before)]
        return out if self.bias is None or self.bias_before is None else [*out, (self.bias, self.bias_before)]


class Course:
    """The compensated model's walk and, where it is wanted, the dense model's beside it.

    Args:
        model: being compensated; its weights change as the course goes on.
        steps: the batches.
        beside: the dense model's streams are wanted too.
        known: as in :class:`Walk`.

    Attributes:
        blocks: the decoder blocks in order, or the model itself.
        whole: why the model counts as one block, or None.
        weighting: as of :class:`Walk`.
        beside: the dense model's streams can be had.
    """

    def __init__(
        self, model: nn.Module, steps: Sequence[Step], beside: bool, known: Sequence[str | None] | None = None
    ) -> None:
        self._walk = Walk(model, steps, known)
        self.blocks, self.whole, self.steps = self._walk.blocks, self._walk.whole, self._walk.steps
        self.weighting = self._walk.weighting
        self.beside = beside and self.whole is None
        self._dense = Walk(model, steps, (None,)) if self.beside else None
        self._at = 0  # the walk's streams enter this block
        self._dense_at = 0  # the dense model's streams have left all blocks before this one
        self._last: dict[int, LastChange | None] = {}  # of blocks that were left without running them
        self._originals: dict[int, list[tuple[Tensor, Tensor]]] = {}
        owners = [{id(p) for p in block.parameters()} for block in self.blocks]
        self._shared = sum(map(len, owners)) > len(set().union(*owners))  # weights change again after their turn

    def enter(self, i: int) -> None:
        """Block ``i`` is next."""
        if self._shared:
            self._reach(i)

    def once(self, i: int, parameters: Mapping[str, nn.Parameter]) -> list[Use]:
        """As :meth:`Walk.once`."""
        self._reach(i)
        return self._walk.once(i, parameters)

    def is_added(self, i: int, p: nn.Parameter) -> bool:
        """As :meth:`Walk.is_added`."""
        self._reach(i)
        return self._walk.is_added(i, p)

    def run(self, i: int, name: str, p: nn.Parameter, inputs: list[Tensor] | None = None) -> Iterator[
        tuple[int, list[Use], Tensor | None]
    ]:  # fmt: skip
        """As :meth:`Walk.run`. With ``inputs``, what enters ``p`` at every step is added to that list, and the walk's
        streams go behind the block; :meth:`leave` must follow."""
        self._reach(i)
        for number, uses, stream in self._walk.run(i, {name: p}):
            yield number, uses, stream
            if inputs is not None:
                inputs.append(uses[0].x)
                self._walk.leave(number, stream)
            del uses, stream  # before the next step makes its own

    def dense_stream(self, number: int) -> Tensor:
        """The dense model's stream behind the block that was run last."""
        assert self._dense is not None
        return self._dense.stream(number)

    def before_change(self, i: int, tensor: Tensor) -> None:
        """A tensor of block ``i`` is going to be changed in place."""
        if self._dense is not None and self._dense_at <= i:
            self._originals.setdefault(i, []).append((tensor, tensor.detach().clone()))

    def leave(self, i: int, last: LastChange | None = None, inputs: Sequence[Tensor] | None = None) -> None:
        """Block ``i`` is as it stays.

        Args:
            last: the change of its last matrix, where that is to be added to the stream.
            inputs: what :meth:`run` put into its list.
        """
        if inputs is not None and last is not None:
            change = last.change()
            for number, x in enumerate(inputs):
                _add(change, x, self._walk.stream(number))
            self._at = i + 1
            return
        self._last[i] = last

    def _reach(self, i: int) -> None:
        """Run what was left behind, so that the streams enter block ``i``."""
        while self._at < i:
            self._run_dense(self._at)
            self._run_late(self._at, self._last.pop(self._at))
            self._at += 1
        self._run_dense(i)

    def _run_dense(self, i: int) -> None:
        if self._dense is None or self._dense_at > i:
            return
        with _as_before(self._originals.pop(i, [])):
            for number, _, out in self._dense.run(i, {}):
                self._dense.leave(number, out)
        self._dense_at = i + 1

    def _run_late(self, i: int, last: LastChange | None) -> None:
        if last is None:
            self._walk.advance(i)
            return
        change = last.change()
        with _as_before(last.originals):
            for number, uses, stream in self._walk.run(i, {last.name: last.p}):
                self._walk.leave(number, stream)
                _add(change, uses[0].x, self._walk.stream(number))


def _add(change: tuple[Tensor, Tensor | None], x: Tensor, stream: Tensor) -> None:
    """Add to a stream [batch, length, hidden] what a change gives on inputs [rows, inputs]."""
    stream += linear(x, *change).reshape(stream.shape)


@contextmanager
def _as_before(originals: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Within it the tensors are as they were."""
    now = [tensor.detach().clone() for tensor, _ in originals]
    try:
        for tensor, before in reversed(originals):
            tensor.copy_(before)
        yield
    finally:
        for (tensor, _), value in zip(originals, now, strict=True):
            tensor.copy_(value)
