"""From a plan to the smaller model without weights: its configuration, its modules, and where its tensors come from.

What :func:`rebuild` returns has been checked: every parameter and buffer of the new model has the planned shape, no
scale, rate or epsilon in a module differs from the old model's, buffers that the class computes keep their values, and
so do numbers in ``forward`` where masking would not show them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from pyprune import families
from pyprune.errors import PyPruneError
from pyprune.selection.plan import Cut, Plan
from pyprune.surgery import buffers, check, narrow, resize, skeleton, skip
from pyprune.surgery.counts import resizable
from pyprune.surgery.decoder import layers_path, scalars, shorten, structure, text_config
from pyprune.surgery.layers import solve_layers, solve_model
from pyprune.surgery.names import LayerNames, Shapes, Tensors, uniform_buffers
from pyprune.surgery.numbers import check_numbers
from pyprune.surgery.transfer import Kept, slices

Config = Any


@dataclass
class Rebuilt:
    """The smaller model and how it relates to the old one.

    Attributes:
        model: all tensors on the meta device, nothing tied.
        names: its names and the old ones.
        kept: old name -> dim -> positions that stay.
        positions: values of the buffers that narrow layers and kept tables have, by new name.
        resized: names of the groups that no configuration expresses, cut by resized modules.
        narrowed: names of the groups that those cannot cut either, cut by narrow layers.
    """

    model: Any
    names: LayerNames
    kept: dict[str, dict[int, np.ndarray]]
    positions: dict[str, np.ndarray] = field(default_factory=dict)
    resized: tuple[str, ...] = ()
    narrowed: tuple[str, ...] = ()


def rebuild(model: Any, plan: Plan, stock_only: bool = False) -> Rebuilt:
    """The smaller model that ``plan`` makes of ``model``, without weights. ``model`` is not changed.

    Args:
        stock_only: refuse cuts that no configuration of the model's class expresses, rather than resize its modules.

    Raises:
        PyPruneError: when the model cannot have the planned shapes, naming a tensor that shows it.
    """
    stock = skeleton.build(type(model), copy.deepcopy(model.config))
    tensors = _checked(Tensors.of(model), stock, plan)
    tensors = replace(tensors, uniform=uniform_buffers(model) - _cut_names(tensors, plan))
    path = layers_path(model) or ""
    count = len(model.get_submodule(path)) if path else 0
    names = LayerNames(path, _kept_layers(plan, path, count))
    config = copy.deepcopy(model.config)
    if len(names.kept) < count:
        config = shorten(config, list(names.kept))
    _refuse_narrow_again(model.config, plan)
    for kind in (resize, narrow, skip):
        if kind.spec_of(config):
            setattr(config, kind.FIELD, _renamed(kind.spec_of(config), names))

    skipped = plan.removed_modules("sublayers")
    spec = skip.forms(model, skipped, lambda: check.logits(model)) if skipped else {}

    failed = [c for c in plan.cuts if c.group.table and c.group.role not in _tables(config)]
    across, inside = _placed([c for c in plan.cuts if c not in failed], path, tensors)
    config = solve_model(type(model), config, tensors, names, across, failed)
    done = [c for c in across if c not in failed]
    config = solve_layers(stock, config, tensors, names, done, inside, failed)
    failed = _unmet(failed, plan, stock, config, names, tensors) if failed else []
    if failed and stock_only:
        raise _inexpressible(stock, tensors, plan, failed)
    if spec:
        setattr(config, skip.FIELD, {**skip.spec_of(config), **_renamed(spec, names)})
    return _assembled(stock, config, names, tensors, plan, failed)


def _cut_names(tensors: Tensors, plan: Plan) -> set[str]:
    cut = {tensors.first[m.tensor] for c in plan.cuts for m in c.group.members}
    return {name for name, first in tensors.first.items() if first in cut}


def _renamed(spec: Mapping[str, Any], names: LayerNames) -> dict[str, Any]:
    new = names.new(list(spec))
    return {new[path]: values for path, values in spec.items() if path in new}


def _tables(config: Config) -> tuple[str, ...]:
    """Roles whose units keep, in the family's modules, the values that the model computes for their positions."""
    family = families.find(text_config(config))
    return () if family is None else family.tables


def _assembled(
    stock: Any, config: Config, names: LayerNames, tensors: Tensors, plan: Plan, failed: Sequence[Cut]
) -> Rebuilt:
    """The model for ``config``, with resized modules and narrow layers for what it does not express; checked."""
    done = [c for c in plan.cuts if c not in failed]
    resized, spec = resizable(stock, config, names, tensors, done, failed) if failed else ([], {})
    if resized:
        setattr(config, resize.FIELD, spec)
    narrowed = [c for c in failed if c not in resized]
    expressed = Plan(tuple(c for c in plan.cuts if c not in narrowed))
    kept_expressed, kept = tensors.kept(expressed), tensors.kept(plan)
    kept = {n: dims for n, dims in kept.items() if n not in tensors.buffers}
    kept.update({n: dims for n, dims in kept_expressed.items() if n in tensors.buffers})
    planned, before = tensors.after(plan.cuts), tensors.after(expressed.cuts)
    planned.update({n: before[n] for n in before if n in tensors.buffers})

    positions: dict[str, np.ndarray] = {}
    if narrowed:
        parameters = {n: s for n, s in planned.items() if n not in tensors.buffers}
        answer = narrow.plan_spec(stock, before, parameters, kept_expressed, kept)
        if isinstance(answer, str):
            raise _inexpressible(stock, tensors, plan, narrowed, answer)
        added, values = answer
        setattr(config, narrow.FIELD, {**narrow.spec_of(config), **_renamed(added, names)})
        positions = {names.new([name])[name]: value for name, value in values.items()}
    model = skeleton.build(type(stock), config)
    positions |= _kept_units(model, names, tensors, done)
    for name, shape in structure(model).items():
        if (old := names.old(name)) in tensors.uniform:
            planned[old], sizes = shape, zip(shape, tensors.shapes[old], strict=True)
            kept[old] = {dim: np.arange(new) for dim, (new, size) in enumerate(sizes) if new < size}
    _verify(model, stock, names, planned, positions)
    _verify_buffers(model, stock, names, kept)
    if not all(c.group.exact or c.group.modules for c in plan.cuts):
        check_numbers(stock, model, plan)
    return Rebuilt(
        model, names, kept, positions, tuple(c.group.name for c in resized), tuple(c.group.name for c in narrowed)
    )


def _kept_units(model: Any, names: LayerNames, tensors: Tensors, cuts: Sequence[Cut]) -> dict[str, np.ndarray]:
    """Values of the buffers in which a family's modules hold the units that stayed (:data:`pyprune.families.KEPT`)."""
    out: dict[str, np.ndarray] = {}
    for name, _ in model.named_buffers():
        path, _, last = names.old(name).rpartition(".")
        if last != families.KEPT or names.old(name) in tensors.shapes:
            continue
        cut = next((c for c in cuts if c.group.module == path and c.group.role in _tables(model.config)), None)
        if cut is None:
            problem = "the rebuilt model takes some of its heads' rows of a table, and the plan cuts none of them"
            raise PyPruneError("plan", path, problem, "Leave the groups inside its heads whole.")
        out[name] = np.array(cut.kept[0], dtype=np.int64)
    return out


def _checked(tensors: Tensors, stock: nn.Module, plan: Plan) -> Tensors:
    """The class must create the very tensors that the model has, or a smaller one would not be the same model.

    Buffers that the plan leaves alone may have grown since (tables of positions): their shapes are taken as created.
    """
    made = structure(stock)
    cls, config = type(stock).__name__, type(getattr(stock, "config", None)).__name__
    odd = sorted(tensors.shapes.keys() ^ made.keys())
    if odd:
        whose = (
            "the model has it and its class does not create it" if odd[0] in tensors.shapes else "the model lacks it"
        )
        raise PyPruneError("model", odd[0], f"{whose} ({cls})", "Merge adapters and undo changes to modules first.")
    cut = {m.tensor for c in plan.cuts for m in c.group.members}
    for name, shape in tensors.shapes.items():
        if shape != made[name] and (name not in tensors.buffers or tensors.first[name] in cut):
            raise PyPruneError(
                "model",
                name,
                f"has shape {list(shape)} where {cls} with the model's {config} creates {list(made[name])}",
                "The configuration must describe the model.",
            )
    return replace(tensors, shapes=made)


def _kept_layers(plan: Plan, path: str, count: int) -> tuple[int, ...]:
    gone = set()
    for module in plan.removed_modules("layers"):
        head, _, index = module.rpartition(".")
        if head != path or not index.isdigit() or int(index) >= count:
            raise PyPruneError("plan", module, "is not one of the model's decoder layers")
        gone.add(int(index))
    return tuple(i for i in range(count) if i not in gone)


def _refuse_narrow_again(config: Config, plan: Plan) -> None:
    narrowed = narrow.spec_of(config)
    for cut in plan.cuts:
        for member in cut.group.members:
            if member.tensor.rpartition(".")[0] in narrowed:
                raise PyPruneError(
                    "plan",
                    cut.group.name,
                    f"cuts {member.tensor}, which an earlier cut made a narrow layer",
                    "Make one plan for both from the dense model.",
                )


def _placed(cuts: Sequence[Cut], path: str, tensors: Tensors) -> tuple[list[Cut], dict[int, list[Cut]]]:
    """Cuts across the model, and cuts that one decoder layer holds, by its index. Removed modules are no cuts here.

    A cut of a module that several layers share is in each of them.
    """
    across: list[Cut] = []
    inside: dict[int, list[Cut]] = {}
    prefix = f"{path}."
    layers: dict[str, set[int]] = {}
    for name, first in tensors.first.items():
        inner = path and name.startswith(prefix)
        layers.setdefault(first, set()).add(int(name[len(prefix) :].split(".", 1)[0]) if inner else -1)
    for cut in cuts:
        if not cut.group.members:
            continue
        places = [layers[tensors.first[m.tensor]] for m in cut.group.members]
        if -1 in places[0] or any(other != places[0] for other in places):
            across.append(cut)
            continue
        for layer in sorted(places[0]):
            inside.setdefault(layer, []).append(cut)
    return across, inside


def _unmet(
    failed: Sequence[Cut], plan: Plan, stock: Any, config: Config, names: LayerNames, tensors: Tensors
) -> list[Cut]:
    """Those of ``failed``, once each, that ``config`` does not express after all: other cuts may have changed it so."""
    made = structure(skeleton.build(type(stock), config))
    planned = tensors.after(plan.cuts)
    new = names.new(list(planned))
    out: list[Cut] = []
    for cut in failed:
        dims = {(name, m.dim) for m in cut.group.members for name in planned if tensors.first[name] == m.tensor}
        met = not cut.group.table and all(made[new[name]][dim] == planned[name][dim] for name, dim in dims)
        if not met and cut not in out:
            out.append(cut)
    return out


def _inexpressible(
    stock: Any, tensors: Tensors, plan: Plan, failed: Sequence[Cut], tensor: str | None = None
) -> PyPruneError:
    """Names a tensor that the class cannot have, and the cuts to leave out."""
    name = tensor or failed[0].group.members[0].tensor
    cuts = [c for c in failed if any(tensors.first[m.tensor] == tensors.first[name] for m in c.group.members)] or failed
    roles = ", ".join(dict.fromkeys(c.group.role for c in cuts))
    fine = ", ".join(dict.fromkeys(c.group.role for c in plan.cuts if c not in failed))
    return PyPruneError(
        "plan",
        name,
        f"no {type(stock.config).__name__} gives it the planned shape {list(tensors.after(plan.cuts)[name])} "
        f"(now {list(tensors.shapes[name])})",
        f"Leave {roles} whole{f'; {fine} can be cut' if fine else ', or keep another number of units'}.",
    )


def _verify(model: Any, stock: Any, names: LayerNames, planned: Shapes, own: Mapping[str, Any]) -> None:
    """The new model's shapes are the planned ones, and its modules compute with the same numbers."""
    made = {n: s for n, s in structure(model).items() if n not in own}
    cls = type(model).__name__
    for name, shape in made.items():
        old = names.old(name)
        if planned.get(old) != shape:
            says = list(planned[old]) if old in planned else "nothing of it"
            problem = f"the rebuilt {cls} has shape {list(shape)}, the plan says {says}"
            raise PyPruneError("plan", old, problem, "Leave the groups that cut it whole.")
    have = {names.old(n) for n in made}
    missing = have ^ planned.keys()
    if names.path and len(names.kept) < len(stock.get_submodule(names.path)):
        # A table that only removed layers read (the rotary one of a kind of layer) is not made any more.
        missing -= planned.keys() - have - stock.state_dict().keys()
    if missing:
        raise PyPruneError("plan", min(missing), f"the rebuilt {cls} does not have this tensor")
    before = scalars(stock)
    for name, value in scalars(model).items():
        old = names.old(name)
        if isinstance(value, float) and before.get(old, value) != value:
            raise PyPruneError(
                "plan",
                old,
                f"would change from {before[old]} to {value}, and the model with it",
                "This class computes it from sizes or from a layer's position; leave those groups whole.",
            )


def _verify_buffers(model: Any, stock: Any, names: LayerNames, kept: Kept) -> None:
    """Buffers that the class computes whenever the model is opened will have the values that they have now."""
    after = buffers.computed(model)
    before = buffers.computed(stock) if after else {}
    for name, value in after.items():
        old = names.old(name)
        if old not in before:
            continue
        [source] = slices([before[old]], [kept[old]]) if kept.get(old) else [before[old]]
        if torch.equal(source, value) or (value.is_floating_point() and torch.allclose(source, value)):
            continue
        raise PyPruneError(
            "plan",
            old,
            f"would change, and the model with it: no checkpoint holds this buffer, and {type(model).__name__} "
            "computes it anew when the smaller model is opened",
            "This class computes it from sizes or from a layer's position; leave those groups whole.",
        )
