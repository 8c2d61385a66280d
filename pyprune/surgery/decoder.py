"""Where a model's decoder layers are, and how one of them is built alone."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import nn

Config = Any

_INDEX_NAMES = ("layer_idx", "layer_id", "layer_number", "layer_index", "idx", "i")


def text_config(config: Config) -> Config:
    """The part of a configuration that describes the decoder: ``config`` itself, or what it nests."""
    find = getattr(config, "get_text_config", None)
    return config if find is None else find(decoder=True)


def layers_path(model: nn.Module) -> str | None:
    """Dotted path of the ``ModuleList`` of decoder layers, or None when the model has none.

    It is the list of ``config.num_hidden_layers`` modules that holds the most parameters; one whose modules refer to
    the decoder's configuration comes before those of other towers.
    """
    text = text_config(getattr(model, "config", None))
    count = getattr(text, "num_hidden_layers", None)
    best: tuple[bool, int, str] | None = None
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and path:
            refers = any(vars(child).get("config") is text for child in module.modules())
            size = sum(p.numel() for p in module.parameters())
            if best is None or (refers, size) > best[:2]:
                best = (refers, size, path)
    return None if best is None else best[2]


def structure(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters and buffers, tied ones under every name."""
    out = {name: tuple(p.shape) for name, p in module.named_parameters(remove_duplicate=False)}
    out.update({name: tuple(b.shape) for name, b in module.named_buffers(remove_duplicate=False)})
    return out


def scalars(module: nn.Module) -> dict[str, int | float | bool]:
    """Plain numbers that the modules hold (sizes, scales, dropout rates), by dotted name."""
    out: dict[str, int | float | bool] = {}
    for path, child in module.named_modules():
        for name, value in vars(child).items():
            if isinstance(value, (bool, int, float)) and name != "training":
                out[f"{path}.{name}" if path else name] = value
    return out


def same_make(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules are built alike: classes, shapes and plain numbers."""
    classes_a = [(path, type(m)) for path, m in a.named_modules()]
    classes_b = [(path, type(m)) for path, m in b.named_modules()]
    return classes_a == classes_b and structure(a) == structure(b) and scalars(a) == scalars(b)


def construct_layer(layer_class: type[nn.Module], config: Config, index: int) -> nn.Module | None:
    """One decoder layer from its own constructor, or None when it takes more than ``config`` and an index.

    Also when the rest has defaults: a model of several kinds of layers says there which kind it wants.
    """
    arguments: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(layer_class.__init__).parameters.items())[1:]:
        if name == "config":
            arguments[name] = config
        elif name in _INDEX_NAMES:
            arguments[name] = index
        elif parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            return None
    if "config" not in arguments:
        return None
    return layer_class(**arguments)


def shorten(config: Config, keep: list[int]) -> Config:
    """A copy of ``config`` for the decoder layers ``keep`` only: the count, and every list with one entry a layer."""
    out = copy.deepcopy(config)
    text = text_config(out)
    count = text.num_hidden_layers
    overrides = layer_overrides(text)
    drop_overrides(text)
    text.num_hidden_layers = len(keep)
    for name, value in list(vars(text).items()):
        if isinstance(value, (list, tuple)) and len(value) == count and name not in ("architectures",):
            setattr(text, name, type(value)(value[i] for i in keep))
    set_overrides(text, {new: overrides[old] for new, old in enumerate(keep) if old in overrides})
    return out


def layer_overrides(config: Config) -> dict[int, dict[str, Any]]:
    """Layer index -> attributes that differ there (transformers' ``per_layer_config``); a copy."""
    spec = vars(config).get("_heterogeneity_spec")
    return {} if spec is None else copy.deepcopy(spec.per_layer_overrides)


def drop_overrides(config: Config) -> None:
    """Makes ``config`` one for layers that are all alike, in place."""
    config.__dict__.pop("_heterogeneity_spec", None)
    config.__dict__.pop("allow_global_per_layer_attribute_access", None)


def set_overrides(config: Config, overrides: dict[int, dict[str, Any]]) -> None:
    """Writes ``per_layer_config``, in place. Reading an overridden attribute on ``config`` gives the common value.

    Without that permission transformers refuses to open the saved folder's configuration at all, since configuration
    classes read such attributes while they validate themselves.
    """
    drop_overrides(config)
    overrides = {i: dict(values) for i, values in overrides.items() if values}
    if overrides:
        config.per_layer_config = overrides
        if config._heterogeneity_spec.per_layer_overrides:
            config.allow_global_per_layer_attribute_access = True
        else:
            drop_overrides(config)


def on_meta(build: Any, *arguments: Any) -> Any:
    """``build(*arguments)`` with every tensor on the meta device and no initialisation."""
    from transformers.initialization import meta_device_safe_creation_ops, no_init_weights

    with no_init_weights(), torch.device("meta"), meta_device_safe_creation_ops():
        return build(*arguments)
