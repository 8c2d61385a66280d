"""Modules of other sizes than their constructor gives them, where no configuration says what a cut needs.

Many classes make a head ``hidden_size // heads`` wide, so no configuration has fewer heads of the same width; others
make the FFN four times as wide as the residual stream. What such a module needs is not more than smaller matrices and
the right counts (``num_heads``), and its own constructor knows the counts: built for as many heads and a residual
stream narrower by the same share, the heads keep their width, and every number in the attention module is the one that
the cut needs (:mod:`pyprune.surgery.counts` finds them). The matrices get the planned shapes.

``config.pyprune_resized`` records shapes and numbers by module, so that :func:`pyprune.load` builds the same again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from pyprune.errors import PyPruneError

Shapes = Mapping[str, tuple[int, ...]]

Spec = dict[str, dict[str, Any]]
"""Module path -> name -> a parameter's shape (a list), or a plain number."""

FIELD = "pyprune_resized"


def spec_of(config: Any) -> Spec:
    """The resized modules that a configuration asks for; empty for most."""
    return getattr(config, FIELD, None) or {}


def install(model: nn.Module, spec: Spec) -> None:
    """Gives the named modules of ``model`` new parameters of the recorded shapes, and the recorded numbers, in place.

    Raises:
        PyPruneError: when the model has no such module, parameter or number.
    """
    for path, values in spec.items():
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise PyPruneError(FIELD, path, "is no module of the model") from None
        for name, value in values.items():
            old = module._parameters.get(name) if isinstance(value, list) else vars(module).get(name)
            if not isinstance(old, (nn.Parameter, int)):
                raise PyPruneError(FIELD, f"{path}.{name}", f"is nothing that {type(module).__name__} has there")
            if isinstance(old, nn.Parameter):
                module._parameters[name] = nn.Parameter(old.new_empty(value), requires_grad=old.requires_grad)
            else:
                setattr(module, name, value)
        _tell_sizes(module)


def _tell_sizes(module: nn.Module) -> None:
    """Torch's and transformers' own layers hold their sizes beside the weight."""
    weight = module._parameters.get("weight")
    if weight is None:
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        module.normalized_shape = tuple(weight.shape)
    elif _is_conv1d(module):
        module.nx, module.nf = weight.shape  # type: ignore[assignment]


def _is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def states_own_sizes(module: nn.Module) -> bool:
    """Whether a module's numbers follow from its weight's shape (:func:`install` sees to them)."""
    return isinstance(module, (nn.Linear, nn.LayerNorm, nn.RMSNorm)) or _is_conv1d(module)


def shapes_spec(before: Shapes, after: Shapes) -> Spec:
    """The parameters that change from ``before`` to ``after``, by module."""
    spec: Spec = {}
    for name, shape in after.items():
        if before[name] != shape:
            path, _, last = name.rpartition(".")
            spec.setdefault(path, {})[last] = list(shape)
    return spec


def merged(*specs: Mapping[str, Mapping[str, Any]]) -> Spec:
    """All of them together, later values first."""
    out: Spec = {}
    for spec in specs:
        for path, values in spec.items():
            out.setdefault(path, {}).update(values)
    return out
