"""Cuts that no configuration expresses, made by resized modules: their shapes, and the counts their modules need."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations, product
from typing import Any

from torch import nn

from pyprune.discovery.roles import HEADS
from pyprune.discovery.run import trace
from pyprune.errors import PyPruneError
from pyprune.selection.plan import Cut
from pyprune.surgery import resize, skeleton
from pyprune.surgery.attributes import HEAD_SIZE, Attribute, Built, Scope, candidates
from pyprune.surgery.decoder import layer_overrides, text_config
from pyprune.surgery.names import LayerNames, Shapes, Tensors
from pyprune.surgery.resize import Spec
from pyprune.surgery.solve import ratios

Config = Any

STEPS = (HEADS, ("ffn", "expert_ffn"))
"""Roles whose cuts are made this way, in this order. A width inside heads changes what a head is: narrow layers."""

_MOST_TOGETHER = 4


def resizable(
    stock: Any, config: Config, names: LayerNames, tensors: Tensors, done: Sequence[Cut], failed: Sequence[Cut]
) -> tuple[list[Cut], Spec]:
    """Those of ``failed`` that resized modules make, and the modules. A run on tensors without data proves the sizes.

    Args:
        stock: the model's class at its present size.
        config: for the new model; it has the cuts ``done`` in it.
        failed: cuts that no configuration expresses.
    """
    made: list[Cut] = []
    spec: Spec = resize.spec_of(config)
    for roles in STEPS:
        step = [c for c in failed if c.group.role in roles and _inside_a_layer(c, names, tensors)]
        if not step:
            continue
        before, after = tensors.after([*done, *made]), tensors.after([*done, *made, *step])
        added = resize.shapes_spec(_renamed(before, names, tensors), _renamed(after, names, tensors))
        if roles is HEADS:
            numbers = _numbers(stock, config, names, tensors, [*done, *made], step)
            if numbers is None:
                continue
            added = resize.merged(added, numbers)
        trial = copy.copy(config)
        setattr(trial, resize.FIELD, resize.merged(spec, added))
        if runs(skeleton.build(type(stock), trial)):
            spec = resize.merged(spec, added)
            made += step
    return made, spec


def _inside_a_layer(cut: Cut, names: LayerNames, tensors: Tensors) -> bool:
    """One decoder layer holds all members, which are parameters, and positions along the axis mean nothing."""
    prefix = f"{names.path}."
    members = [m.tensor for m in cut.group.members]
    layers = {m[len(prefix) :].split(".", 1)[0] if names.path and m.startswith(prefix) else "" for m in members}
    return not cut.group.table and len(layers) == 1 and "" not in layers and tensors.buffers.isdisjoint(members)


def _renamed(shapes: Shapes, names: LayerNames, tensors: Tensors) -> Shapes:
    new = names.new(list(shapes))
    return {new[n]: shape for n, shape in shapes.items() if n in new and n not in tensors.buffers}


def _numbers(
    stock: Any, config: Config, names: LayerNames, tensors: Tensors, done: Sequence[Cut], cuts: Sequence[Cut]
) -> Spec | None:
    """What :func:`_counts` says of every layer with cuts, under the new model's names."""
    cls, text, layers = type(stock), text_config(config), stock.get_submodule(names.path)
    overrides = layer_overrides(text)
    spec: Spec = {}
    memory: dict[Any, Spec | None] = {}
    for new, old in enumerate(names.kept):
        prefix = f"{names.path}.{old}."
        here = [c for c in cuts if c.group.members[0].tensor.startswith(prefix)]
        if not here:
            continue
        layer_class, own = type(layers[old]), overrides.get(new, {})
        shapes = tensors.after([*done, *here])
        wanted = {n[len(prefix) :]: s for n, s in shapes.items() if n.startswith(prefix) and n not in tensors.buffers}
        shares = tuple((c.group.module.removeprefix(prefix), c.group.units, c.width) for c in here)
        task = (layer_class, repr(sorted(own.items())), tuple(sorted(wanted.items())), shares)
        if task not in memory:

            def construct(t: Config, layer_class: Any = layer_class, index: int = new) -> nn.Module:
                return skeleton.build_layer(cls, names.path, layer_class, skeleton.with_text(config, t), index)

            scope = Scope(skeleton.with_overrides(text, own), construct)
            memory[task] = _counts(scope, layers[old], here, prefix, wanted)
        found = memory[task]
        if found is None:
            return None
        spec.update({f"{names.path}.{new}.{path}": values for path, values in found.items()})
    return spec


def _counts(scope: Scope, layer: nn.Module, cuts: Sequence[Cut], prefix: str, wanted: Shapes) -> Spec | None:
    """Numbers that the layer's modules must have with fewer heads, by module; None when its constructor shows none.

    Args:
        scope: the layer's constructor.
        layer: as constructed, for the kinds of its modules.
        cuts: of heads, all inside the layer. Where the constructor shows nothing and the modules hold no count of
            heads, none of their numbers changes.
        prefix: of the layer's names in the model, with the dot.
        wanted: shapes of the layer's parameters after the cuts. Dimensions that the cuts leave alone may come out
            narrower from the constructor, since the residual stream does: only numbers are taken from there.
    """
    base = scope.build({})
    if base is None:
        return None
    cut_dims = [
        (name, dim)
        for name, shape in wanted.items()
        for dim, size in enumerate(shape)
        if name in base.shapes and base.shapes[name][dim] != size
    ]
    owners = tuple(c.group.module.removeprefix(prefix) + "." for c in cuts)
    units = {c.group.units for c in cuts} | {c.group.units * c.group.outer for c in cuts}
    shares = ratios(cuts)
    options: dict[Attribute, list[int]] = {}
    for attribute in candidates(scope.config):
        now = attribute.get(scope.config)
        if now is not None and not attribute.head_size:
            values = [now * kept // of for kept, of in shares if now * kept % of == 0]
            if values and (now in units or scope.moves({}, attribute, now)):
                options[attribute] = values
    for count in range(1, min(_MOST_TOGETHER, len(options)) + 1):
        for chosen in combinations(options, count):
            if not any(a.get(scope.config) in units for a in chosen):
                continue  # as many heads, each narrower
            for numbers in product(*(options[a] for a in chosen)):
                built = scope.build(dict(zip(chosen, numbers, strict=True)))
                if built is None or built.shapes.keys() != base.shapes.keys():
                    continue
                if all(built.shapes[n][d] == wanted[n][d] for n, d in cut_dims) and _same_heads(base, built, owners):
                    return _changed_numbers(base, built, layer, owners)
    whole = all(c.group.role == "kv_heads" for c in cuts)
    return {} if whole and _uncounted(base, layer, owners, units) else None


def _uncounted(base: Built, layer: nn.Module, owners: tuple[str, ...], units: set[int]) -> bool:
    """Whether the modules that are cut hold the width of a head and no count of heads: smaller matrices will do.

    Query heads go with their keys, so that as many share one as before.
    """
    widths = set()
    for name, value in base.numbers.items():
        path, _, last = name.rpartition(".")
        if not name.startswith(owners) or resize.states_own_sizes(layer.get_submodule(path)):
            continue
        if last in HEAD_SIZE:
            widths.add(path + ".")
        elif type(value) is int and value in units and not last.endswith(("groups", "_idx", "window")):
            return False
    return widths == set(owners)


def _same_heads(base: Built, built: Built, owners: tuple[str, ...]) -> bool:
    """In the modules that are cut, no scale, rate or epsilon and no width of a head differs."""
    for name, value in base.numbers.items():
        if name.startswith(owners) and (isinstance(value, float) or name.rsplit(".", 1)[-1] in HEAD_SIZE):
            if built.numbers.get(name) != value:
                return False
    return True


def _changed_numbers(base: Built, built: Built, layer: nn.Module, owners: tuple[str, ...]) -> Spec:
    spec: Spec = {}
    for name, value in built.numbers.items():
        if name.startswith(owners) and base.numbers.get(name) != value:
            path, _, last = name.rpartition(".")
            if not resize.states_own_sizes(layer.get_submodule(path)):
                spec.setdefault(path, {})[last] = value
    return spec


def runs(model: Any) -> bool:
    """Whether ``model``'s sizes fit together: a forward pass on tensors without data."""
    try:
        with _failures_unlogged():
            trace(model)
    except PyPruneError:  # also where it needs values: then nothing is known
        return False
    return True


@contextmanager
def _failures_unlogged() -> Iterator[None]:
    """Torch logs every op that fails on tensors without data; here that is an answer."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
