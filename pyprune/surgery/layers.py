"""New configuration values for a plan: for the whole model, and for single decoder layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pyprune.selection.plan import Cut
from pyprune.surgery import skeleton
from pyprune.surgery.attributes import Attribute, Scope, candidates, with_values
from pyprune.surgery.decoder import layer_overrides, set_overrides, text_config
from pyprune.surgery.names import LayerNames, Shapes, Tensors
from pyprune.surgery.solve import STEPS, Values, solve
from pyprune.surgery.writable import can_be_saved

Config = Any


def solve_model(
    cls: type, config: Config, tensors: Tensors, names: LayerNames, cuts: Sequence[Cut], failed: list[Cut]
) -> Config:
    """``config`` with other values of attributes that shape the whole model.

    Args:
        cuts: that no single decoder layer holds.
        failed: receives those of them that no values express.
    """
    if not cuts:
        return config
    text = text_config(config)
    scope = Scope(text, lambda t: skeleton.build(cls, skeleton.with_text(config, t)))
    renamed = names.new(list(tensors.shapes))

    def wanted(done: Sequence[Cut]) -> Shapes:
        return {renamed[n]: shape for n, shape in tensors.after(done).items() if n in renamed}

    values, lost = _stepwise(scope, cuts, wanted, None)
    failed += lost
    return skeleton.with_text(config, with_values(text, values))


def solve_layers(
    stock: Any,
    config: Config,
    tensors: Tensors,
    names: LayerNames,
    across: Sequence[Cut],
    inside: Mapping[int, Sequence[Cut]],
    failed: list[Cut],
) -> Config:
    """``config`` with other values for decoder layers; common ones where all layers agree.

    Args:
        across: cuts that ``config`` has in it already.
        inside: cuts of single layers, by the layer's old index.
        failed: receives those of them that no values express.
    """
    if not inside:
        return config
    cls, path, text = type(stock), names.path, text_config(config)
    layers = stock.get_submodule(path)
    overrides, beforehand = layer_overrides(text), tensors.after(across)
    solved: list[_Layer] = []
    lists = any(a.position is not None for a in candidates(text, 0))
    scopes: dict[Any, Scope] = {}
    memory: dict[Any, _Layer] = {}
    for new, old in enumerate(names.kept):
        prefix, layer_class, cuts = f"{path}.{old}.", type(layers[old]), inside.get(old, ())
        before, own = _inner(beforehand, prefix), overrides.get(new, {})
        kind = (layer_class, _key(before), _key(own), new if lists else None)
        task = (kind, _signature(cuts, prefix))
        if kind not in scopes:

            def construct(t: Config, layer_class: Any = layer_class, index: int = new) -> nn.Module:
                return skeleton.build_layer(cls, path, layer_class, skeleton.with_text(config, t), index)

            scopes[kind] = Scope(skeleton.with_overrides(text, own), construct)
        if task not in memory:

            def wanted(done: Sequence[Cut], prefix: str = prefix) -> Shapes:
                return _inner(tensors.after([*across, *done]), prefix)

            memory[task] = _Layer(scopes[kind], *_stepwise(scopes[kind], cuts, wanted, new))
        known = memory[task]
        roles = {c.group.role for c in known.failed}
        failed += [c for c in cuts if c.group.role in roles]
        solved.append(known)
    out = skeleton.with_text(config, _combined(text, solved, share=True))
    return out if can_be_saved(out) else skeleton.with_text(config, _combined(text, solved, share=False))


@dataclass
class _Layer:
    """What one decoder layer needs: its constructor, its values, and the cuts that no values express."""

    scope: Scope
    values: Values
    failed: list[Cut]


def _stepwise(scope: Scope, cuts: Sequence[Cut], wanted: Any, layer: int | None) -> tuple[Values, list[Cut]]:
    values: Values = {}
    done: list[Cut] = []
    failed: list[Cut] = []
    for roles in STEPS:
        step = [c for c in cuts if c.group.role in roles]
        if not step:
            continue
        answer = solve(scope, values, step, wanted([*done, *step]), layer)
        if answer is None:
            failed += step
        else:
            values = answer
            done += step
    return values, failed


def _combined(text: Config, solved: Sequence[_Layer], share: bool) -> Config:
    """One configuration from the values of every decoder layer.

    An attribute becomes common to all when every layer that it shapes agrees on it (and ``share`` is on); otherwise
    the configuration keeps its value and the layers override it.
    """
    overrides = layer_overrides(text)
    common: Values = {}
    for attribute in dict.fromkeys(a for layer in solved for a in layer.values):
        if attribute.position is not None:
            common[attribute] = next(layer.values[attribute] for layer in solved if attribute in layer.values)
            continue
        wanted = {i: layer.values[attribute] for i, layer in enumerate(solved) if attribute in layer.values}
        first = next(iter(wanted.values()))
        others = [i for i in range(len(solved)) if i not in wanted]
        for own in overrides.values():
            own.pop(attribute.name, None)
        agreed = len(set(wanted.values())) == 1 and all(_indifferent(solved[i].scope, attribute, first) for i in others)
        if agreed and (share or attribute.get(text) is None):
            common[attribute] = first
            continue
        for i, value in wanted.items():
            overrides.setdefault(i, {})[attribute.name] = value
        for i in others:
            overrides.setdefault(i, {})[attribute.name] = attribute.get(solved[i].scope.config)
    out = with_values(text, common)
    set_overrides(out, overrides)
    return out


def _indifferent(scope: Scope, attribute: Attribute, value: int) -> bool:
    """Whether a layer is the same with this value as it is."""
    return scope.build({attribute: value}) == scope.build({})


def _inner(shapes: Shapes, prefix: str) -> Shapes:
    return {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}


def _key(mapping: Mapping[str, Any]) -> Any:
    return tuple(sorted((name, repr(value)) for name, value in mapping.items()))


def _signature(cuts: Sequence[Cut], prefix: str) -> Any:
    def members(cut: Cut) -> Any:
        return tuple((m.tensor.removeprefix(prefix), m.dim, m.index) for m in cut.group.members)

    return tuple((c.group.role, c.group.units, c.group.outer, c.width, members(c)) for c in cuts)
