"""The decoder blocks of a model, found by structure, and forward passes that stop at their borders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

Call = Callable[[Tensor], Any]  # runs a block on a stream, its other arguments bound
Handler = Callable[
    [int, Tensor, Call, list[Any]], Any
]  # (block, stream, call, other arguments) -> what the block returns


class NotSweepable(Exception):
    """Why this model's blocks cannot be taken one by one."""


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules whose repetition carries the residual stream: the outermost ModuleList with most parameters.

    Raises:
        NotSweepable: no list of two or more modules.
    """
    lists = [
        (name, list(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({id(m) for m in module}) == len(module) >= 2
    ]
    names = [name for name, _ in lists]
    outermost = [(n, blocks) for n, blocks in lists if not any(n.startswith(other + ".") for other in names)]
    if not outermost:
        raise NotSweepable("the model has no list of blocks")
    return max(outermost, key=lambda item: sum(p.numel() for block in item[1] for p in block.parameters()))[1]


@contextmanager
def intercepted(blocks: list[nn.Module], handler: Handler) -> Iterator[None]:
    """Within it every call of a block's ``forward`` goes to ``handler``."""
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for i, block in enumerate(blocks):
            block.forward = partial(_dispatch, handler, i, block.forward)
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            if own is not None:
                block.forward = own
            else:
                block.__dict__.pop("forward", None)  # the class's own again


def _dispatch(handler: Handler, i: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Split the arguments into the residual stream (the first one, or ``hidden_states``) and the rest."""
    if args and isinstance(args[0], Tensor):
        return handler(i, args[0], lambda x: original(x, *args[1:], **kwargs), tree_leaves((args[1:], kwargs)))
    if isinstance(kwargs.get("hidden_states"), Tensor):
        rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
        return handler(
            i, kwargs["hidden_states"], lambda x: original(*args, hidden_states=x, **rest), tree_leaves((args, rest))
        )
    raise NotSweepable("a block is called without a residual stream")


def stream_of(out: Any) -> Tensor:
    """The residual stream in what a block returns."""
    y = out[0] if isinstance(out, (tuple, list)) and out else out
    if not isinstance(y, Tensor):
        raise NotSweepable("a block returns no residual stream")
    return y


def with_new_stream(out: Any, y: Tensor) -> Any:
    """What a block returned, with another residual stream."""
    return y if isinstance(out, Tensor) else type(out)([y, *out[1:]])


def cut(out: Any) -> Any:
    """What a block returned, cut off from the graph."""
    return tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, out)


def like(out: Any) -> Callable[[Tensor], Any]:
    """A function that puts a residual stream into the form in which a block returned one; holds no tensor."""
    if isinstance(out, Tensor):
        return lambda y: y
    kind, others = type(out), len(out) - 1
    return lambda y: kind([y, *[None] * others])


class SavedBytes:
    """Counts the bytes that autograd saves while it is active, each storage once, without the given parameters."""

    def __init__(self, block: nn.Module) -> None:
        self._skip = {p.untyped_storage().data_ptr() for p in block.parameters()}
        self._seen: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._skip:
            self._seen[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # with its graph, an operation that saves what it returns would hold itself

    def active(self) -> Any:
        """A context manager."""
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda t: t)

    @property
    def total(self) -> int:
        return sum(self._seen.values())
