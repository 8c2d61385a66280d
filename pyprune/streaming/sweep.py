"""Gradients block by block with the weights on disk: a block is in memory while it computes, and at no other time.

The same turns as :mod:`pyprune.importance.sweep`, with the loops the other way round in the forward pass too:

1. Every batch's embeddings, then block by block: load it, run every batch through it, write the stream that leaves it.
2. Head and losses of every batch; the gradient of the stream that left the last block is written.
3. From the last block to the first: load it, and for every batch compute it once more from the stream that entered it
   and push the gradient back. Row and column sums of the block are written, and the streams that made them go.
4. Embedding and head, where they are scored.

Whatever is finished lies in a :class:`pyprune.streaming.workspace.Workspace`, and a run that finds it there goes on
behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyprune.discovery.valueless import ValuelessOps
from pyprune.importance.blocks import Call, NotSweepable, intercepted, like, stream_of
from pyprune.importance.collector import Collector
from pyprune.importance.losses import NotFinite, check_losses
from pyprune.importance.memory import trim_heap
from pyprune.importance.rehearsal import plan_sweep
from pyprune.importance.steps import Forward, Step
from pyprune.importance.sweep import Layout, Sweep
from pyprune.importance.taps import Taps
from pyprune.progress import Bar
from pyprune.streaming.disk import DiskModel
from pyprune.streaming.workspace import Workspace


class _Left(Exception):
    """Ends a forward pass behind a block; carries what is wanted of it."""

    def __init__(self, stream: Tensor) -> None:
        super().__init__()
        self.stream = stream


class _Valueless(TorchDispatchMode):
    """Runs ops on shapes where weights have no values, and really where masks and positions are made."""

    def __init__(self) -> None:
        super().__init__()
        self._ops = ValuelessOps()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._ops(func, args, kwargs or {})


@dataclass
class Blocks:
    """What a rehearsal without weights shows of a model's blocks.

    Attributes:
        layout: the blocks, and which scored parameters are whose.
        forms: for each block, a function that puts a stream into the form in which it returns one.
        to_entry: whether scored parameters act before the first block.
    """

    layout: Layout
    forms: dict[int, Any]
    to_entry: bool

    @property
    def lowest(self) -> int:
        """The first block that gradients must reach."""
        scored = (i for i, names in enumerate(self.layout.names) if names)
        return 0 if self.to_entry else min(scored, default=len(self.layout.blocks))


def rehearse(
    disk: DiskModel, forward: Forward, scored: Sequence[str], batch: Mapping[str, Any], taps: Taps | None
) -> Blocks:
    """The blocks of a model whose scored parameters require gradients and whose weights are on the meta device.

    Raises:
        NotSweepable: its blocks cannot be taken one by one, or what it computes depends on values.
    """
    parameters = {name: disk.model.get_parameter(name) for name in scored}
    forms: dict[int, Any] = {}
    entry: list[bool] = []

    def handler(i: int, stream: Tensor, call: Call, rest: list[Any]) -> Any:
        entry.append(stream.requires_grad)
        out = call(stream)
        forms[i] = like(out)
        return out

    with _Valueless():
        layout = plan_sweep(disk.model, forward, parameters, batch, disk.device, taps)
        ids = {k: v[:1].to(disk.device) for k, v in batch.items() if isinstance(v, Tensor) and k != "labels"}
        with intercepted(layout.blocks, handler):
            forward(Step(ids, next(iter(ids.values()))))
    return Blocks(layout, forms, entry[0])


class DiskSweep(Sweep):
    """A sweep over blocks that are loaded one at a time. Made as its base is, then :meth:`prepare`."""

    def prepare(
        self, disk: DiskModel, blocks: Blocks, space: Workspace, taps: Taps | None, keep_streams: bool = False
    ) -> DiskSweep:
        """What it works on; returns itself.

        Args:
            disk: the model.
            blocks: its blocks.
            space: where streams, gradients and sums go.
            taps: as rehearsed; None takes all gradients from autograd.
            keep_streams: a second backward pass may follow, so that the streams must stay.
        """
        self.disk, self.blocks, self.space, self.taps, self.keep_streams = disk, blocks, space, taps, keep_streams
        paths = {id(module): path for path, module in disk.model.named_modules()}
        self._inside = [disk.under(f"{paths[id(block)]}.") for block in self.layout.blocks]
        within = {name for names in self._inside for name in names}
        self._outside = [name for name in disk.names if name not in within]
        self._forms, self._lowest = blocks.forms, blocks.lowest
        return self

    def run_from_disk(self, steps: Sequence[Step], bar: Bar) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
        """Sweep.

        Returns:
            The sums of every scored parameter, and every sample's loss.

        Raises:
            NotFinite: losses or gradients hold NaN or infinity.
        """
        n = len(self.layout.blocks)
        self._forward_pass(steps, bar)
        if not self.space.noted("head"):
            with self.disk.loaded(self._outside):
                for j, step in enumerate(steps):
                    stream = self._load("streams", n, j)
                    up = torch.empty_like(stream)
                    loss = self._head(step, stream, up)
                    self._save("ups", n, j, up)
                    self.space.save(f"losses/{j:06d}", {"loss": loss})
                    bar.advance()
            trim_heap(self.disk.device)
            check_losses(self._losses(steps))
            self.space.note("head")
        losses = check_losses(self._losses(steps))
        rest = self._rest()
        for i in range(n - 1, self._lowest - 1, -1):
            if not self.space.has(f"sums/{i:04d}"):
                with self.disk.loaded(rest), _no_embedding(self.disk.model):
                    self._backward(i, steps, bar)
            else:
                bar.advance(len(steps))
            if not self.keep_streams and (i + 1 < n or not self.layout.outer):
                self.space.drop(f"streams/{i + 1:04d}")
            self.space.drop(f"ups/{i + 1:04d}")
            trim_heap(self.disk.device)
        if self.layout.outer and not self.space.has("sums/outer"):
            with self.disk.loaded(self._outside, self.layout.outer) as held, self._collecting(self.layout.outer, held):
                for j, step in enumerate(steps):
                    up_in = self._load("ups", self._lowest, j) if self.blocks.to_entry else None
                    self._outer(step, self._load("streams", n, j), up_in)
                self._finish(self.layout.outer, "sums/outer")
        sums: dict[str, tuple[Tensor, Tensor]] = {}
        for i in range(self._lowest, n):
            sums |= unpack_sums(self.space.load(f"sums/{i:04d}"))
        if self.layout.outer:
            sums |= unpack_sums(self.space.load("sums/outer"))
        return sums, losses

    def _forward_pass(self, steps: Sequence[Step], bar: Bar) -> None:
        n = len(self.layout.blocks)
        rest = self._rest()
        if not self.space.noted("forward/embedded"):
            with self.disk.loaded(self._outside), torch.no_grad():
                for j, step in enumerate(steps):
                    self._save("streams", 0, j, self._through(-1, step, None))
            self.space.note("forward/embedded")
        for i in range(n):
            if self.space.noted(f"forward/{i:04d}"):
                bar.advance(len(steps))
                continue
            with self.disk.loaded([*rest, *self._inside[i]]), _no_embedding(self.disk.model), torch.no_grad():
                for j, step in enumerate(steps):
                    self._save("streams", i + 1, j, self._through(i, step, self._load("streams", i, j)))
                    bar.advance()
            self.space.note(f"forward/{i:04d}")
            if i < self._lowest:  # no gradient is wanted there
                self.space.drop(f"streams/{i:04d}")
            trim_heap(self.disk.device)

    def _backward(self, i: int, steps: Sequence[Step], bar: Bar) -> None:
        names, further = self.layout.names[i], i > self._lowest or self.blocks.to_entry
        with self.disk.loaded(self._inside[i], names) as held, self._collecting(names, held, len(steps) == 1):
            for j, step in enumerate(steps):
                x = self._load("streams", i, j).requires_grad_(further)
                torch.autograd.backward(self._through(i, step, x), self._load("ups", i + 1, j))
                self.passed()
                if further:
                    assert x.grad is not None
                    self._save("ups", i, j, x.grad)
                bar.advance()
            self._finish(names, f"sums/{i:04d}")

    def _finish(self, names: list[str], file: str) -> None:
        self.collector.finish(names)
        # An empty file is not one: what says that a block without scored parameters is done holds a number.
        self.space.save(file, pack_sums({name: self.collector.sums[name] for name in names}) or {"-": torch.zeros(1)})

    def _through(self, i: int, step: Step, x: Tensor | None) -> Tensor:
        """The stream that leaves block ``i`` when ``x`` enters it; for -1, the one that enters the first."""

        def handler(k: int, stream: Tensor, call: Call, rest: list[Any]) -> Any:
            if i < 0:
                raise _Left(stream.detach())
            if k < i:
                return self._forms[k](stream)
            raise _Left(stream_of(call(x)))  # type: ignore[arg-type]

        with intercepted(self.layout.blocks, handler):
            try:
                self.forward(step)
            except _Left as left:
                return left.stream
        raise NotSweepable("the model does not run all of its blocks")

    def _rest(self) -> list[str]:
        """Tensors outside the blocks that a block's other arguments may depend on: all but the two large tables."""
        tables = (self.disk.model.get_input_embeddings(), self.disk.model.get_output_embeddings())
        own = {id(p) for table in tables if table is not None for p in table.parameters()}
        large = {name for name, p in self.disk.model.named_parameters() if id(p) in own}
        return [name for name in self._outside if name not in large]

    @contextmanager
    def _collecting(self, names: list[str], held: Mapping[str, Tensor], whole: bool = False) -> Iterator[None]:
        """Within it the gradients of these parameters, which are loaded, go into a collector of their own."""
        parameters: dict[str, Any] = {name: held[name] for name in names}
        before = self.collector
        self.collector = Collector(before.criterion, parameters, before.samples, before.scale)
        self.passed = self.collector.next_samples
        if self.taps is not None:
            seen = {name: p for name, p in parameters.items() if name in self.taps.seen}
            taps = Taps(seen, before.criterion)
            taps.uses, taps.apart, taps.collector = self.taps.uses, self.taps.apart, self.collector
            taps.whole = frozenset(parameters if whole else ())
            self.forward.around, self.passed = taps.active, taps.flush
        handles = self.collector.install()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.collector, self.forward.around = before, nullcontext

    def _save(self, kind: str, border: int, j: int, stream: Tensor) -> None:
        self.space.save(f"{kind}/{border:04d}/{j:06d}", {"x": stream})

    def _load(self, kind: str, border: int, j: int) -> Tensor:
        return self.space.load(f"{kind}/{border:04d}/{j:06d}")["x"].to(self.disk.device)

    def _losses(self, steps: Sequence[Step]) -> list[Tensor]:
        return [self.space.load(f"losses/{j:06d}")["loss"] for j in range(len(steps))]


def pack_sums(sums: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Row and column sums as one file holds them."""
    out = {}
    for name, (rows, cols) in sums.items():
        out[f"rows {name}"], out[f"cols {name}"] = rows, cols.clone()
    return out


def unpack_sums(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """What :func:`pack_sums` packed."""
    names = [key.removeprefix("rows ") for key in tensors if key.startswith("rows ")]
    return {name: (tensors[f"rows {name}"], tensors[f"cols {name}"]) for name in names}


def sweep_scales(
    make: Callable[[float], DiskSweep], scales: Sequence[float], steps: Sequence[Step], bar: Bar, space: Workspace
) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor, float]:
    """Sweep with the first of ``scales`` at which no gradient overflows; returns sums, losses and that scale.

    Raises:
        NotFinite: none of them will do, or losses are not finite.
    """
    for k, scale in enumerate(scales):
        if space.noted(f"overflow/{k}"):
            continue
        try:
            sums, losses = make(scale).run_from_disk(steps, bar)
            return sums, losses, scale
        except NotFinite as bad:
            if bad.parameter is None or scale == scales[-1]:
                raise
            space.forget("head")
            space.drop("ups", "sums", "losses")
            space.note(f"overflow/{k}")
    raise NotFinite


@contextmanager
def _no_embedding(model: Any) -> Iterator[None]:
    """Within it the embedding gives zeros, whose shape alone enters what is computed; its table stays on disk."""
    table = model.get_input_embeddings()
    if table is None:
        yield
        return
    width, dtype = table.weight.shape[-1], table.weight.dtype

    def zeros(ids: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.zeros((*ids.shape, width), dtype=dtype, device=ids.device)

    table.forward = zeros
    try:
        yield
    finally:
        del table.forward
