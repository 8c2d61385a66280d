"""Stock classes built to a configuration, per-layer widths and family adapters included.

The one place that knows how a configuration becomes modules: pruning builds the smaller model with it on the meta
device, and loading a saved folder hands transformers the very same class, so what was built is what can be opened.
"""

from __future__ import annotations

import copy
import inspect
from functools import cache
from importlib import import_module
from typing import Any

from torch import nn

from pyprune import families
from pyprune.surgery import narrow, resize, skip
from pyprune.surgery.attributes import Attribute
from pyprune.surgery.decoder import (
    construct_layer,
    drop_overrides,
    layer_overrides,
    layers_path,
    on_meta,
    same_make,
    shorten,
    text_config,
)

Config = Any

_FOLLOWED = ("_attn_implementation_internal", "_experts_implementation_internal")


def is_stock(config: Config) -> bool:
    """Whether the class alone builds what this configuration asks for."""
    text = text_config(config)
    family = families.find(text)
    usual = not layer_overrides(text) and not any(kind.spec_of(config) for kind in (narrow, resize, skip))
    return usual and (family is None or not family.applies(text))


def build(cls: type, config: Config) -> Any:
    """The model of stock class ``cls`` with the widths of ``config``: tensors on the meta device, nothing tied.

    ``config`` becomes the model's own (``model.config is config``). The constructor's errors pass through.
    """
    model = on_meta(lambda: loading_class(cls)._from_config(config, dtype=config.dtype))
    model.__class__ = cls
    return model


@cache
def loading_class(cls: Any) -> Any:
    """A subclass of ``cls`` whose constructor honours per-layer widths and family attributes.

    For transformers' ``from_pretrained``; set ``model.__class__ = cls`` afterwards.
    """

    def __init__(self: Any, config: Config, *arguments: Any, **options: Any) -> None:
        if is_stock(config):
            cls.__init__(self, config, *arguments, **options)
            return
        plain = stock_config(config)
        cls.__init__(self, plain, *arguments, **options)
        _fit(self, cls, config, plain)

    return type(cls.__name__, (cls,), {"__init__": __init__, "__module__": cls.__module__})


def build_layer(cls: type, path: str, layer_class: type[nn.Module], config: Config, index: int) -> nn.Module:
    """Decoder layer ``index`` of model class ``cls``, on the meta device, for a ``config`` whose layers are all alike.

    The layer's own constructor is used where it takes ``(config, index)`` and gives what the whole model's gives;
    otherwise the model is built up to that layer, which is taken out of it.

    Args:
        path: of the decoder layers in the model.
        layer_class: of this layer in the stock model.
    """
    plain = stock_config(config)
    layer: nn.Module
    if _stands_alone(cls, path, layer_class, plain, index):
        layer = on_meta(construct_layer, layer_class, text_config(plain), index)
    else:
        layer = _from_model(cls, path, plain, index)
    _repoint(layer, {id(plain): config, id(text_config(plain)): text_config(config)})
    _resize(layer, text_config(config))
    _fit_modules(layer, config, f"{path}.{index}.")
    return layer


_alone: dict[tuple[type, type], bool] = {}


def _stands_alone(cls: type, path: str, layer_class: type[nn.Module], plain: Config, index: int) -> bool:
    if (cls, layer_class) not in _alone:
        layer = on_meta(construct_layer, layer_class, text_config(plain), index)
        _alone[cls, layer_class] = layer is not None and same_make(layer, _from_model(cls, path, plain, index))
    return _alone[cls, layer_class]


def _from_model(cls: Any, path: str, plain: Config, index: int) -> nn.Module:
    """The layer out of a model that ends with it; out of the whole model where the class wants all its layers."""
    try:
        model = on_meta(cls, shorten(plain, list(range(index + 1))))
        layer: nn.Module = model.get_submodule(path)[index]
    except Exception:  # whatever a constructor raises when its configuration has fewer layers than it counts on
        layer = on_meta(cls, copy.deepcopy(plain)).get_submodule(path)[index]
    return layer


def stock_config(config: Config) -> Config:
    """A shallow copy that the stock constructor accepts: no per-layer widths, no family attributes."""
    text = text_config(config)
    if text is config:
        return _plain_text(config)
    out = copy.copy(config)
    for name, value in vars(config).items():
        if value is text:
            out.__dict__[name] = _plain_text(text)
    return out


def _plain_text(text: Config) -> Config:
    out = copy.copy(text)
    own: Any = type(text)
    if not _reads_overrides(own):
        drop_overrides(out)
    family = families.find(text)
    if family is not None and family.applies(text) and family.stock is not None:
        family.stock(out)
    return out


@cache
def _reads_overrides(config_class: Any) -> bool:
    """Whether the class's own modelling code reads per-layer configurations, perhaps for more than its layers."""
    try:
        module = import_module(config_class.__module__.replace(".configuration_", ".modeling_"))
        return "per_layer_config" in inspect.getsource(module)
    except (ImportError, OSError, TypeError):
        return False


def _fit(model: Any, cls: type, config: Config, plain: Config) -> None:
    """After the stock constructor ran with ``plain``: the real configuration, family sizes, per-layer widths."""
    text = text_config(config)
    for name in _FOLLOWED:
        config.__dict__[name] = plain.__dict__[name]
        text.__dict__[name] = text_config(plain).__dict__[name]
    _repoint(model, {id(plain): config, id(text_config(plain)): text})
    common = copy.copy(text)
    drop_overrides(common)
    _resize(model, common)
    path = layers_path(model) or ""
    overridden = tuple(f"{path}.{index}." for index in layer_overrides(text))
    for index in layer_overrides(text):
        layers = model.get_submodule(path)
        own = layer_config(text, index)
        layers[index] = build_layer(cls, path, type(layers[index]), with_text(config, own), index)
    _fit_modules(model, config, "", done=overridden)


def _fit_modules(module: nn.Module, config: Config, prefix: str, done: tuple[str, ...] = ()) -> None:
    """Resized modules, narrow layers and skipped modules, of those under ``prefix`` and not under one of ``done``."""
    for kind in (resize, narrow, skip):
        spec = kind.spec_of(config)
        own = {p[len(prefix) :]: spec[p] for p in spec if p.startswith(prefix) and not p.startswith(done)}
        if own:
            on_meta(kind.install, module, own)


def _repoint(module: nn.Module, configs: dict[int, Config]) -> None:
    """Modules keep references to their configuration: exchanges those in ``configs`` (by identity)."""
    for child in module.modules():
        for name, value in vars(child).items():
            if id(value) in configs:
                child.__dict__[name] = configs[id(value)]


def _resize(module: nn.Module, text: Config) -> None:
    family = families.find(text)
    if family is not None and family.applies(text) and family.resize is not None:
        on_meta(_each, family.resize, module, text)


def _each(resize: Any, module: nn.Module, text: Config) -> None:
    for child in list(module.modules()):
        resize(child, text)


def with_text(config: Config, text: Config) -> Config:
    """A shallow copy of ``config`` whose decoder part is ``text``."""
    old = text_config(config)
    if old is config:
        return text
    out = copy.copy(config)
    for name, value in vars(config).items():
        if value is old:
            out.__dict__[name] = text
    return out


def with_overrides(config: Config, overrides: dict[str, Any]) -> Config:
    """A copy of ``config`` for layers that are all alike, with these values (dotted names reach nested parts)."""
    out = copy.copy(config)
    drop_overrides(out)
    for name, value in overrides.items():
        if "." in name:
            Attribute(name).set(out, value)
        else:
            setattr(out, name, value)
    return out


class _Layer:
    """Mixed into the configuration class of a layer with its own widths.

    The choice of attention and experts implementation stays that of the model's configuration, also when it changes
    later: masks are made for the model's choice, and a layer that ran another would silently misread them.
    """

    def __reduce__(self) -> Any:
        return layer_config, (vars(self)["_model_config"], vars(self)["_layer_index"])

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__reduce__()


def _follow(name: str) -> property:
    def get(self: Any) -> Any:
        return getattr(vars(self)["_model_config"], name)

    def put(self: Any, value: Any) -> None:
        setattr(vars(self)["_model_config"], name, value)

    return property(get, put)


@cache
def _layer_class(cls: Any) -> Any:
    body = {name: _follow(name) for name in _FOLLOWED}
    return type(cls.__name__, (_Layer, cls), {**body, "__module__": cls.__module__})


def layer_config(config: Config, index: int) -> Config:
    """The configuration of decoder layer ``index``: ``config`` with that layer's overrides."""
    own = with_overrides(config, layer_overrides(config).get(index, {}))
    for name in _FOLLOWED:
        own.__dict__.pop(name, None)
    own.__dict__.update(_model_config=config, _layer_index=index)
    config_class: Any = type(config)
    own.__class__ = _layer_class(config_class)
    return own
