"""Moving weights from the old model to the smaller one, one decoder layer at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pyprune import ops
from pyprune.errors import PyPruneError
from pyprune.surgery.names import LayerNames, Tensors

Kept = Mapping[str, Mapping[int, np.ndarray]]


class Place(NamedTuple):
    """Where a module holds a tensor."""

    module: nn.Module
    name: str
    parameter: bool

    def put(self, tensor: Tensor) -> None:
        held: dict[str, Any] = self.module._parameters if self.parameter else self.module._buffers
        held[self.name] = tensor


def transfer(old: nn.Module, new: nn.Module, names: LayerNames, tensors: Tensors, kept: Kept, *, copy: bool) -> None:
    """Fills ``new`` (meta tensors) with the kept slices of ``old``'s tensors, tied where ``old``'s are tied.

    A decoder layer, or a module outside them, is live twice at any time: its slices are made by one
    :func:`pyprune.ops.gather`, then their sources go. Tensors that lose nothing are handed over, not copied. So are
    tensors that modules hold as plain attributes.

    Args:
        names: how names of ``new`` relate to those of ``old``.
        tensors: of ``old``.
        kept: old name -> dim -> positions that stay.
        copy: leave ``old`` as it is; otherwise its tensors are on the meta device afterwards.
    """
    sources: dict[str, list[Place]] = {}
    for path, place in _places(old):
        sources.setdefault(tensors.first[path], []).append(place)
    moved: dict[str, Tensor] = {}
    for batch in _batches(new, names, tensors.first):
        fresh = [first for first in dict.fromkeys(tensors.first[path] for path, _ in batch) if first not in moved]
        moved.update(_made(sources, fresh, kept, copy))
        for path, place in batch:
            place.put(moved[tensors.first[path]])
        if not copy:
            for first in fresh:
                _release(sources.pop(first))
    _plain_tensors(old, new, names, copy)


def _places(module: nn.Module) -> Iterator[tuple[str, Place]]:
    for path, child in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name, parameter in child._parameters.items():
            if parameter is not None:
                yield prefix + name, Place(child, name, True)
        for name, buffer in child._buffers.items():
            if buffer is not None:
                yield prefix + name, Place(child, name, False)


def _batches(new: nn.Module, names: LayerNames, known: Mapping[str, str]) -> Iterator[list[tuple[str, Place]]]:
    """Places of ``new`` whose tensors ``old`` has, by old names: one decoder layer, or one other module, at a time."""
    batches: dict[str, list[tuple[str, Place]]] = {}
    prefix = f"{names.path}."
    for path, place in _places(new):
        if names.old(path) not in known:
            continue
        inside = names.path and path.startswith(prefix)
        unit = prefix + path[len(prefix) :].split(".", 1)[0] if inside else path.rpartition(".")[0]
        batches.setdefault(unit, []).append((names.old(path), place))
    yield from batches.values()


def _made(sources: Mapping[str, list[Place]], firsts: list[str], kept: Kept, copy: bool) -> dict[str, Tensor]:
    """New tensors for these names; parameters keep ``requires_grad``."""
    held = {f: _get(sources[f][0]) for f in firsts}
    cut = [f for f in firsts if f in kept]
    with torch.no_grad():
        cut_ones = dict(zip(cut, slices([held[f] for f in cut], [kept[f] for f in cut]), strict=True))
        out: dict[str, Tensor] = {}
        for first, source in held.items():
            tensor = cut_ones[first] if first in cut_ones else source.detach().clone() if copy else source.detach()
            is_parameter = sources[first][0].parameter
            out[first] = nn.Parameter(tensor, requires_grad=source.requires_grad) if is_parameter else tensor
    return out


def _get(place: Place) -> Tensor:
    tensor = (place.module._parameters if place.parameter else place.module._buffers)[place.name]
    assert tensor is not None
    return tensor


def slices(tensors: list[Tensor], kept: list[Mapping[int, np.ndarray]]) -> list[Tensor]:
    """Kept positions of each tensor, in one call for all that the kernel takes."""
    out: list[Tensor | None] = [None] * len(tensors)
    direct = [i for i, t in enumerate(tensors) if 1 <= t.dim() <= 3 and not t.is_meta]
    results = ops.gather([tensors[i].detach() for i in direct], [kept[i] for i in direct]) if direct else []
    for i, result in zip(direct, results, strict=True):
        out[i] = result
    for i, tensor in enumerate(tensors):
        if out[i] is None:
            result = tensor.detach()
            for dim, positions in kept[i].items():
                result = result.index_select(dim, torch.from_numpy(positions).to(tensor.device))
            out[i] = result
    return [t for t in out if t is not None]


def _release(places: list[Place]) -> None:
    """Old modules keep the shape and lose the values."""
    source = _get(places[0])
    empty = torch.empty_like(source, device="meta")
    if places[0].parameter:
        empty = nn.Parameter(empty, requires_grad=source.requires_grad)
    for place in places:
        place.put(empty)


def _plain_tensors(old: nn.Module, new: nn.Module, names: LayerNames, copy: bool) -> None:
    """Tensors that modules hold as plain attributes were built on the meta device: takes the old model's."""
    for path, child in new.named_modules():
        for name, value in list(vars(child).items()):
            if not isinstance(value, Tensor) or not value.is_meta:
                continue
            where = names.old(path)
            source = vars(old.get_submodule(where)).get(name)
            if not isinstance(source, Tensor) or source.shape != value.shape:
                raise PyPruneError(
                    "plan", f"{where}.{name}", "a tensor that is neither parameter nor buffer depends on the cut sizes"
                )
            setattr(child, name, source.clone() if copy else source)
