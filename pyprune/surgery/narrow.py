"""Linear layers that are narrower than the model around them believes.

Some cuts have no configuration: Llama has one head width for queries, keys and values, so a value dimension cannot go
by itself. The matrices still can. A narrow layer multiplies by the smaller matrix and puts its outputs where the wide
one would have had them, zeros elsewhere; or it picks from its input what its matrix still reads. The result equals the
masked model's; fewer weights are stored and multiplied, while attention itself and its cache keep their sizes.

``config.pyprune_narrow`` names the layers, so that :func:`pyprune.load` finds them again.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyprune.errors import PyPruneError

Spec = dict[str, dict[str, list[int]]]
"""Module path -> "in" and/or "out" -> [width that the model sees, width of the matrix]."""

FIELD = "pyprune_narrow"


def spec_of(config: Any) -> Spec:
    """The narrow layers that a configuration asks for; empty for most."""
    return getattr(config, FIELD, None) or {}


class _Narrow(nn.Module):
    """What both kinds share: positions of the matrix's inputs and outputs in the wide ones.

    Buffers ``kept_in`` int64 [in] and ``kept_out`` int64 [out] are there where that side is narrow.
    """

    kept_in: Tensor | None
    kept_out: Tensor | None
    wide_out: int

    def _set(self, sides: Mapping[str, list[int]]) -> None:
        for side in ("in", "out"):
            kept = torch.empty(sides[side][1], dtype=torch.int64) if side in sides else None
            self.register_buffer(f"kept_{side}", kept)
        self.wide_out = sides["out"][0] if "out" in sides else 0

    def _picked(self, inputs: Tensor) -> Tensor:
        return inputs if self.kept_in is None else inputs.index_select(-1, self.kept_in)

    def _spread(self, outputs: Tensor) -> Tensor:
        if self.kept_out is None:
            return outputs
        wide = outputs.new_zeros((*outputs.shape[:-1], self.wide_out))
        return wide.index_copy(-1, self.kept_out, outputs)


class NarrowLinear(_Narrow, nn.Linear):
    """``nn.Linear`` with a smaller matrix between wide inputs [..., wide_in] and wide outputs [..., wide_out]."""

    def forward(self, input: Tensor) -> Tensor:
        return self._spread(super().forward(self._picked(input)))


@cache
def _narrow_class(cls: Any) -> Any:
    """:class:`NarrowLinear` that computes as ``cls``, a kind of ``nn.Linear``, does."""
    return NarrowLinear if cls is nn.Linear else type(f"Narrow{cls.__name__}", (NarrowLinear, cls), {})


def _narrowed(layer: nn.Linear, sides: Mapping[str, list[int]]) -> nn.Module:
    """``layer`` itself, made narrow."""
    for side, name in (("in", "in_features"), ("out", "out_features")):
        if side in sides:
            setattr(layer, name, sides[side][1])
    layer.weight = nn.Parameter(layer.weight.new_empty((layer.out_features, layer.in_features)))
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.new_empty(layer.out_features))
    own: Any = type(layer)
    layer.__class__ = _narrow_class(own)
    layer._set(sides)  # type: ignore[operator]
    return layer


class NarrowConv1D(_Narrow):
    """Transformers' ``Conv1D`` (weight [in, out]) with a smaller matrix."""

    def __init__(self, like: Any, sides: Mapping[str, list[int]]) -> None:
        super().__init__()
        wide_in, wide_out = like.weight.shape
        inputs = sides["in"][1] if "in" in sides else wide_in
        outputs = sides["out"][1] if "out" in sides else wide_out
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs))
        self._set(sides)

    def forward(self, input: Tensor) -> Tensor:
        return self._spread(self._picked(input) @ self.weight + self.bias)


def install(model: nn.Module, spec: Spec) -> None:
    """Exchanges the named layers of ``model`` for narrow ones with new weights, in place.

    Raises:
        PyPruneError: when one of them is no linear layer or has another width than ``spec`` says.
    """
    for path, sides in spec.items():
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, name, _made(getattr(owner, name), sides, path))


def _made(layer: nn.Module, sides: Mapping[str, list[int]], path: str) -> nn.Module:
    dims = matrix_dims(layer)
    weight = getattr(layer, "weight", None)
    if dims is None or weight is None or any(weight.shape[dims[s]] != wide for s, (wide, _) in sides.items()):
        raise PyPruneError(FIELD, path, f"does not fit the model's {type(layer).__name__} there")
    return _narrowed(layer, sides) if isinstance(layer, nn.Linear) else NarrowConv1D(layer, sides)


def matrix_dims(layer: nn.Module) -> dict[str, int] | None:
    """Dimensions of the inputs and outputs in a layer's weight; None for layers that cannot be narrow."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(layer, nn.Linear):
        return {"in": 1, "out": 0}
    return {"in": 0, "out": 1} if type(layer) is Conv1D else None


def plan_spec(
    model: nn.Module,
    expressed: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    kept_expressed: Mapping[str, Mapping[int, np.ndarray]],
    kept: Mapping[str, Mapping[int, np.ndarray]],
) -> tuple[Spec, dict[str, np.ndarray]] | str:
    """The narrow layers that turn shapes ``expressed`` into ``wanted``.

    Args:
        model: with the layers in question (for their kinds only).
        expressed: shapes that the configuration gives.
        wanted: planned shapes.
        kept_expressed: positions that stay by the cuts that the configuration expresses.
        kept: positions that stay by all cuts.

    Returns:
        The specification and the values of the buffers by name, or the name of a parameter that no linear layer holds.
    """
    spec: Spec = {}
    buffers: dict[str, np.ndarray] = {}
    first_path = {id(module): path for path, module in reversed(list(model.named_modules(remove_duplicate=False)))}
    for name, shape in wanted.items():
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        if first_path[id(module)] != path:
            continue  # a module that stands in several places is one module
        dims = matrix_dims(module)
        for dim, (wide, width) in enumerate(zip(expressed[name], shape, strict=True)):
            if wide == width:
                continue
            if dims is None or last not in ("weight", "bias"):
                return name
            side = "out" if last == "bias" or dim == dims["out"] else "in"
            before = kept_expressed.get(name, {}).get(dim)
            positions = kept[name][dim] if before is None else np.searchsorted(before, kept[name][dim])
            entry, buffer = [wide, width], f"{path}.kept_{side}"
            same = spec.setdefault(path, {}).setdefault(side, entry) == entry
            if not same or not np.array_equal(buffers.setdefault(buffer, positions), positions):
                return name
    return spec, buffers
