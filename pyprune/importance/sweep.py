"""Gradients block by block, so that no more than one block's are ever alive.

The criteria that take a magnitude need each gradient summed over all batches before it. Holding all gradients until the
last batch costs as much memory as the weights. The sweep turns the loops around:

1. Forward: each batch goes through the blocks; only the stream at every block's border is kept. Then loss and head,
   back to the stream that left the last block.
2. Backward: from the last block to the first, and for every batch: recompute the block from its input, push the
   gradient of its output back to its input, add up its parameters' gradients. Then turn these into sums and free them.

The criteria that add up over batches need only one batch at a time in this. The others do too, when so many tokens are
calibrated on that the streams at the borders would take more memory than all gradients: then those stay alive.

Recomputing stops at the last tensor that the block's backward pass needs (PyTorch's checkpoint does that), so a block's
final projection is not computed again. Blocks at the end of the model whose saved activations fit into
``activation_bytes`` are not recomputed at all. Embedding and head, where they are scored, come last, with the blocks
bypassed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.checkpoint import checkpoint

from pyprune.importance.blocks import (
    Call,
    NotSweepable,
    SavedBytes,
    cut,
    find_blocks,
    intercepted,
    like,
    stream_of,
)
from pyprune.importance.collector import Collector
from pyprune.importance.losses import check_losses, loss_and_seed
from pyprune.importance.memory import trim_heap
from pyprune.importance.steps import Forward, Step
from pyprune.progress import Bar

LOGIT_BYTES = 64 << 20  # of float32 logits in one pass through the head


class _LeftBlocks(Exception):
    """Thrown by the last block to end a forward pass there; carries the residual stream."""

    def __init__(self, stream: Tensor) -> None:
        super().__init__()
        self.stream = stream


@dataclass
class _Border:
    """One step at one block: the block's input, and where its output hangs in the graph."""

    x: Tensor
    y: GradientEdge


@dataclass
class Layout:
    """Which scored parameters belong to which block.

    Attributes:
        blocks: the decoder blocks, in order.
        names: for each block, its scored parameters.
        outer: scored parameters outside the blocks.
        stream_bytes: what one token takes in the residual stream, once seen.
        saved_bytes: about what one token's saved activations take in all blocks, once seen.
    """

    blocks: list[nn.Module]
    names: list[list[str]]
    outer: list[str]
    stream_bytes: int = 0
    saved_bytes: int = 0

    @classmethod
    def of(cls, model: nn.Module, scored: Mapping[str, nn.Parameter]) -> Layout:
        """Raises NotSweepable when there are no blocks, or when blocks share scored parameters."""
        blocks = find_blocks(model)
        homes: dict[int, set[int]] = {}
        inside: set[int] = set()
        for i, block in enumerate(blocks):
            inside.update(id(m) for m in block.modules())
            for p in block.parameters():
                homes.setdefault(id(p), set()).add(i)
        outside = {id(p) for m in model.modules() if id(m) not in inside for p in m.parameters(recurse=False)}
        names: list[list[str]] = [[] for _ in blocks]
        outer = []
        for name, p in scored.items():
            home = homes.get(id(p), set())
            if len(home) + (id(p) in outside) != 1:
                raise NotSweepable(f"{name} is shared between blocks")
            if home:
                names[next(iter(home))].append(name)
            else:
                outer.append(name)
        return cls(blocks, names, outer)


def bypass(
    forward: Forward, layout: Layout, forms: Mapping[int, Any], step: Step, stream: Tensor
) -> tuple[Tensor, Tensor]:
    """The logits, were ``stream`` what leaves the blocks, and the stream that enters them; no block is run.

    Args:
        forms: for each block, a function that puts a stream into the form in which it returns one.
    """
    entry: list[Tensor] = []

    def handler(i: int, given: Tensor, call: Call, rest: list[Any]) -> Any:
        if i == 0:
            entry.append(given)
        return forms[i](stream if i == len(layout.blocks) - 1 else given)

    with intercepted(layout.blocks, handler):
        return forward(step), entry[0]


@dataclass
class Sweep:
    """One sweep over the batches.

    Args:
        forward: calls the model.
        layout: its blocks.
        collector: where gradients go.
        passed: called after every backward pass that reaches scored parameters.
        activation_bytes: saved activations that may stay alive in place of being recomputed.

    Attributes:
        kept: blocks that were not recomputed.
        recomputed: blocks that were.
    """

    forward: Forward
    layout: Layout
    collector: Collector
    passed: Callable[[], None]
    activation_bytes: int = 0
    kept: int = 0
    recomputed: int = 0
    _total: int = 0  # tokens in all steps
    _rows: int = 0  # sequences in one pass through the head, once known
    _tape: list[list[_Border]] = field(default_factory=list)
    _forms: dict[int, Any] = field(default_factory=dict)  # how each block returns its stream
    _store: Tensor | None = None
    _lowest: int = 0
    _to_entry: bool = False
    _measured: int | None = None

    def run(self, steps: Sequence[Step], bar: Bar, finish: bool = True) -> Tensor:
        """Sweep; the collector holds the sums afterwards, or, without ``finish``, the gradients.

        Returns:
            Every sample's loss, float32 or wider.

        Raises:
            NotFinite: losses, weights or gradients hold NaN or infinity.
        """
        n = len(self.layout.blocks)
        self._total = sum(step.targets.numel() for step in steps)
        handles = self.collector.install()
        losses: list[Tensor] = []
        upstream: list[Tensor | None] = []
        try:
            # All that lives long is allocated before the first logits: freed between small allocations that stay, such
            # large ones would leave holes in the heap that the next ones do not fit into.
            leaving = []
            for step in steps:
                leaving.append(self._record(step))
                bar.advance(max(1, n // 2))
            with self._frozen_outer():
                for j, step in enumerate(steps):
                    # The gradient takes the place of the stream, unless embedding or head will need that again.
                    up = torch.empty_like(leaving[j]) if self.layout.outer else leaving[j]
                    losses.append(self._head(step, leaving[j], up))
                    upstream.append(up)
            all_losses = check_losses(losses)
            for i in range(n - 1, self._lowest - 1, -1):
                borders = self._tape.pop()
                for j in range(len(steps)):
                    upstream[j] = self._back(borders, j, upstream[j])
                    bar.advance()
                if finish:
                    self.collector.finish(self.layout.names[i])
                if (
                    self.recomputed and i >= n - self.kept and (n - i) % 4 == 0
                ):  # the activations of four blocks are gone
                    trim_heap(leaving[0].device)
            if self.layout.outer:
                for j, step in enumerate(steps):
                    self._outer(step, leaving[j], upstream[j])
                if finish:
                    self.collector.finish(self.layout.outer)
        finally:
            for handle in handles:
                handle.remove()
        return all_losses

    def _record(self, step: Step) -> Tensor:
        """Forward through the blocks; returns the stream that leaves the last one. Step 1 of the sweep."""
        self._store = None
        tokens = step.targets.numel()
        n = len(self.layout.blocks)

        def handler(i: int, stream: Tensor, call: Call, rest: list[Any]) -> Any:
            if i == 0:
                self._to_entry = stream.requires_grad
                scored = [k for k, names in enumerate(self.layout.names) if names]
                self._lowest = 0 if self._to_entry else min(scored, default=n)
                self._tape = self._tape or [[] for _ in range(n)]
            if i < self._lowest:  # nothing below is scored
                with torch.no_grad():
                    out = call(stream)
            else:
                x = self._keep_input(i, stream).requires_grad_(i > self._lowest or self._to_entry)
                out = self._run_block(i, x, call, tokens)
                self._tape[i].append(_Border(x, get_gradient_edge(stream_of(out))))
            self._forms[i] = like(out)
            out = cut(out)
            if i == n - 1:
                raise _LeftBlocks(stream_of(out))
            return out

        with intercepted(self.layout.blocks, handler):
            try:
                self.forward(step)
            except _LeftBlocks as left:
                return left.stream
        raise NotSweepable("the model does not run all of its blocks")

    def _run_block(self, i: int, x: Tensor, call: Call, tokens: int) -> Any:
        if self._measured is None:
            # The first block of the first step is kept, to see what a block saves.
            counter = SavedBytes(self.layout.blocks[i])
            with counter.active():
                out = call(x)
            self._measured = max(1, counter.total * self._total // tokens)
            room = max(0, self.activation_bytes - counter.total)
            swept = len(self.layout.blocks) - self._lowest
            self.kept = min(room // self._measured, swept)
            self.recomputed = swept - self.kept
            return out
        if i >= len(self.layout.blocks) - self.kept:
            out = call(x)
            if self.recomputed:  # what the recomputed blocks freed
                trim_heap(x.device)
            return out
        return checkpoint(
            self.forward.again(call), x, use_reentrant=False, preserve_rng_state=False, determinism_check="none"
        )

    def _keep_input(self, i: int, stream: Tensor) -> Tensor:
        """A copy of the stream, all of a step's copies in one allocation.

        Allocated one by one between the temporaries of the blocks, these small long-lived tensors would pin the heap's
        pages around them: 400 MiB on a model of 135M parameters with glibc.
        """
        stream = stream.detach()
        if self._store is None:
            self._store = stream.new_empty(len(self.layout.blocks) - self._lowest, *stream.shape)
        slot = self._store[i - self._lowest].data  # .data: a version counter of its own
        if slot.shape != stream.shape or slot.dtype != stream.dtype or slot.device != stream.device:
            return stream.clone()
        return slot.copy_(stream)

    def _back(self, borders: list[_Border], j: int, up: Tensor | None) -> Tensor | None:
        """Push one step's gradient through one block; returns the gradient of the block's input."""
        border, borders[j] = borders[j], None  # type: ignore[call-overload]
        torch.autograd.backward(border.y, up)
        self.passed()
        return border.x.grad

    def _head(self, step: Step, stream: Tensor, up: Tensor) -> Tensor:
        """Losses; ``up`` becomes the gradient of ``stream``, which left the blocks. In pieces, for logits are large."""
        losses = []
        for here, piece in self._pieces(step):
            part = stream[here].clone().requires_grad_()
            logits, _ = bypass(self.forward, self.layout, self._forms, piece, part)
            node = get_gradient_edge(logits)  # taken first: the logits may be overwritten
            loss, seed = loss_and_seed(logits, piece.targets, self.collector.factor, overwrite=True)
            self._rows = max(1, LOGIT_BYTES // (4 * seed[0].numel()))
            torch.autograd.backward(node, seed)
            del logits, seed
            up[here] = part.grad  # type: ignore[assignment]
            losses.append(loss)
        return torch.cat(losses)

    def _pieces(self, step: Step) -> Iterator[tuple[slice, Step]]:
        """The step in pieces whose logits are small; a single sequence at first, while their size is not known."""
        start = 0
        while start < step.rows:
            here = slice(start, min(start + max(1, self._rows), step.rows))
            yield here, step if step.rows == 1 else step.part(here)
            start = here.stop

    def _outer(self, step: Step, stream: Tensor, up: Tensor | None) -> None:
        """Gradients of embedding and head for one step, both in one backward pass: tied weights are in both."""
        for here, piece in self._pieces(step):
            logits, entry = bypass(self.forward, self.layout, self._forms, piece, stream[here])
            _, seed = loss_and_seed(logits, piece.targets, self.collector.factor)
            roots, seeds = [], []
            if logits.requires_grad:
                roots.append(logits)
                seeds.append(seed)
            if up is not None and entry.requires_grad:
                roots.append(entry)
                seeds.append(up[here])
            torch.autograd.backward(roots, seeds)
            self.passed()

    def _frozen_outer(self) -> Any:
        return _frozen([self.collector.parameters[name] for name in self.layout.outer])


class _frozen:
    """Parameters that need no gradient for a while."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters

    def __enter__(self) -> None:
        for p in self._parameters:
            p.requires_grad_(False)

    def __exit__(self, *exc: object) -> None:
        for p in self._parameters:
            p.requires_grad_(True)
