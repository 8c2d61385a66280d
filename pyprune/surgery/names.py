"""Names and shapes of a model's tensors, tied ones under every name, and what a plan makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from pyprune.selection.plan import Cut, Plan
from pyprune.surgery.decoder import structure

Shapes = dict[str, tuple[int, ...]]


def first_names(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter and buffer -> the first name of that tensor, which plans use."""
    first: dict[int, str] = {}
    out = {}
    for tensors in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in tensors:
            out[name] = first.setdefault(id(tensor), name)
    return out


def uniform_buffers(model: nn.Module) -> frozenset[str]:
    """Names of buffers with more than one element that are all equal; none of those on the meta device."""
    return frozenset(
        name
        for name, tensor in model.named_buffers(remove_duplicate=False)
        if tensor.numel() > 1 and not tensor.is_meta and bool((tensor == tensor.flatten()[0]).all())
    )


@dataclass(frozen=True)
class Tensors:
    """What a model's tensors are called and how large they are.

    Attributes:
        shapes: by name, tied tensors under every name.
        first: every name -> the name that plans use.
        buffers: the names that are no parameters.
        uniform: buffers that no cut names and that hold one number throughout (a norm's fixed ones): of any size they
            are the same, so that their shapes follow the constructor.
    """

    shapes: Shapes
    first: dict[str, str]
    buffers: frozenset[str]
    uniform: frozenset[str] = frozenset()

    @classmethod
    def of(cls, model: nn.Module) -> Tensors:
        buffers = frozenset(name for name, _ in model.named_buffers(remove_duplicate=False))
        return cls(structure(model), first_names(model), buffers)

    def after(self, cuts: Iterable[Cut]) -> Shapes:
        """Shapes after ``cuts``, tied tensors following the one that is cut.

        Tensors of removed layers are absent, and so are uniform buffers.
        """
        plan = Plan(tuple(cuts))
        new = plan.new_shapes(self.shapes)
        return {name: new[self.first[name]] for name in self.shapes if name in new and name not in self.uniform}

    def kept(self, plan: Plan) -> dict[str, dict[int, np.ndarray]]:
        """Every name -> dim -> positions that stay, for the dimensions that lose any."""
        by_first = plan.kept_positions(self.shapes)
        return {name: by_first[first] for name, first in self.first.items() if first in by_first}


@dataclass(frozen=True)
class LayerNames:
    """Names before and after decoder layers were removed.

    Attributes:
        path: of the decoder layers; "" when the model has none.
        kept: for every decoder layer of the new model, its index in the old one.
    """

    path: str
    kept: tuple[int, ...]

    def old(self, name: str) -> str:
        """The old model's name of a tensor or module of the new one."""
        prefix = f"{self.path}."
        if not self.path or not name.startswith(prefix):
            return name
        index, dot, rest = name[len(prefix) :].partition(".")
        return f"{prefix}{self.kept[int(index)]}{dot}{rest}" if index.isdigit() else name

    def new(self, names: Sequence[str]) -> dict[str, str]:
        """The new names of those old names that are still there."""
        position = {old: new for new, old in enumerate(self.kept)}
        prefix = f"{self.path}."
        out = {}
        for name in names:
            if not self.path or not name.startswith(prefix):
                out[name] = name
                continue
            index, dot, rest = name[len(prefix) :].partition(".")
            if int(index) in position:
                out[name] = f"{prefix}{position[int(index)]}{dot}{rest}"
        return out
