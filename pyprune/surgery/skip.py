"""Decoder layers without their attention, or without their FFN.

No stock configuration has such a layer, but most layers add up what their sub-blocks give, so that one which gives
zeros is one that is not there; :func:`forms` refuses those that carry the residual stream themselves. The module stays
in its place with the numbers that other code reads off it (a window, an index); its parameters, buffers and children
go, and its class becomes one that gives zeros.

``config.pyprune_skipped`` records module -> values that it returns: 0 for a tensor, else the length of the tuple, of
which all but the first are None.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.errors import PyPruneError
from pyprune.importance.blocks import Call, NotSweepable, intercepted, stream_of
from pyprune.importance.depth import silenced

Spec = dict[str, int]

FIELD = "pyprune_skipped"


def spec_of(config: Any) -> Spec:
    """The skipped modules that a configuration asks for; empty for most."""
    return getattr(config, FIELD, None) or {}


def install(model: nn.Module, spec: Spec) -> None:
    """Empties the named modules of ``model``, in place.

    Raises:
        PyPruneError: the model has no such module.
    """
    for path, values in spec.items():
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise PyPruneError(FIELD, path, "is no module of the model") from None
        for held in (module._modules, module._parameters, module._buffers):
            held.clear()
        own: Any = type(module)
        module.__class__ = _skipping(own, values)


@cache
def _skipping(own: Any, values: int) -> Any:
    """No subclass of ``own``: initialisers ask for the class, and fill in matrices that are not there."""

    def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        x = arguments[0] if arguments else named["hidden_states"]
        zeros = torch.zeros_like(x)
        return (zeros, *[None] * (values - 1)) if values else zeros

    return type(own.__name__, (nn.Module,), {"forward": forward, "__module__": own.__module__})


def forms(model: nn.Module, paths: Sequence[str], run: Any) -> Spec:
    """What the modules return, seen in one forward pass.

    Args:
        run: makes the pass.

    Raises:
        PyPruneError: a module is called with, or returns, something else than the residual stream's shape, or is not
            called at all; or zeros in its place would erase the residual stream.
    """
    seen: Spec = {}
    hint = "Remove whole layers, or cut widths."

    def look(path: str) -> Any:
        def hook(module: nn.Module, arguments: Any, named: Any, out: Any) -> None:
            x = arguments[0] if arguments else named.get("hidden_states")
            first = out[0] if isinstance(out, tuple) and out else out
            tensors = isinstance(x, Tensor) and isinstance(first, Tensor)
            if tensors and (first.shape, first.dtype) == (x.shape, x.dtype):
                seen[path] = len(out) if isinstance(out, tuple) else 0

        return hook

    hooks = [model.get_submodule(p).register_forward_hook(look(p), with_kwargs=True) for p in paths]
    try:
        run()
    finally:
        for handle in hooks:
            handle.remove()
    for path in paths:
        if path not in seen:
            problem = f"{path} does not give back a tensor of the shape that it takes, so that nothing can stand for it"
            raise PyPruneError("layer_part", None, problem, hint)
    homes: dict[str, list[str]] = {}
    for path in paths:
        homes.setdefault(path.rpartition(".")[0], []).append(path)
    inside = list(homes.values())

    def listen(j: int, given: Tensor, call: Call, rest: list[Any]) -> Any:
        with silenced([model.get_submodule(path) for path in inside[j]]):
            deaf = not given.is_meta and torch.equal(stream_of(call(given)), stream_of(call(-given)))
        if deaf:
            problem = f"{inside[j][0]} carries the residual stream itself: without it the layer ignores what enters it"
            raise PyPruneError("layer_part", None, problem, hint)
        return call(given)

    try:
        with intercepted([model.get_submodule(home) for home in homes], listen):
            run()
    except NotSweepable as reason:
        raise PyPruneError("layer_part", None, f"cannot be tried on this model: {reason}", hint) from None
    return seen
