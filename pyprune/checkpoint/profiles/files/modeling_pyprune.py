"""Opens a pruned model whose decoder layers have widths of their own, with torch and transformers alone.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

The model's class is that of transformers with the same name; its forward pass is not touched. After the stock
constructor has run, decoder layers are constructed again with their entries of ``per_layer_config``, and the rest
follows ``pyprune_build`` (and ``pyprune_narrow``, and ``pyprune_skipped``: attention or FFN blocks that are gone, which
give zeros here) in ``config.json``:

- ``stock``: configuration values for the stock constructor, where it refuses the true ones;
- ``layers``: path of the decoder layers to construct again, or null;
- ``modules``: module -> parameter -> shape, or module -> name -> number;
- ``tables``: attention module -> [argument, position, rows, whether the batch is folded in]: takes its own rows of a
  table (ALiBi) that is made for all heads.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import Tensor, nn

_FOLLOWED = ("_attn_implementation_internal", "_experts_implementation_internal")


def __getattr__(name: str) -> Any:
    """The class ``name`` of transformers, built to the widths in its configuration."""
    base = getattr(transformers, name, None)
    if not (isinstance(base, type) and issubclass(base, transformers.PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = pruned_class(base)
    return globals()[name]


def pruned_class(base: Any) -> Any:
    """A subclass of the causal language model class ``base`` whose constructor honours every width."""

    def __init__(self: Any, config: Any, *arguments: Any, **options: Any) -> None:
        plain = _plain(config)
        base.__init__(self, plain, *arguments, **options)
        _fit(self, config, plain)

    # The weights have the stock class's names on disk, which transformers translates for classes of its own only.
    own = classmethod(lambda cls: False)
    return type(base.__name__, (base,), {"__init__": __init__, "is_custom_code": own, "__module__": __name__})


def _text(config: Any) -> Any:
    return config.get_text_config(decoder=True)


def _plain(config: Any) -> Any:
    """A copy for the stock constructor: all layers alike, sizes that it accepts."""
    plain = copy.deepcopy(config)
    text = _text(plain)
    text.per_layer_config = None
    text.__dict__.pop("allow_global_per_layer_attribute_access", None)
    for name, value in config.pyprune_build["stock"].items():
        setattr(text, name, value)
    return plain


def _fit(model: Any, config: Any, plain: Any) -> None:
    """Gives ``model``, made for ``plain``, the configuration and the widths of ``config``."""
    for name in _FOLLOWED:  # the stock constructor has chosen an attention implementation
        for own, made in ((config, plain), (_text(config), _text(plain))):
            if name in vars(made):
                own.__dict__[name] = made.__dict__[name]
    exchange = {id(plain): config, id(_text(plain)): _text(config)}
    for module in model.modules():
        for name, value in vars(module).items():
            if id(value) in exchange:
                module.__dict__[name] = exchange[id(value)]
    build = config.pyprune_build
    if build["layers"]:
        layers = model.get_submodule(build["layers"])
        for index, values in _text(config).to_dict().get("per_layer_config", {}).items():
            layer = layers[int(index)]
            layers[int(index)] = type(layer)(_layer_config(_text(config), _text(plain), values), int(index))
    for path, values in build["modules"].items():
        _resize(model.get_submodule(path), values)
    for path, sides in (getattr(config, "pyprune_narrow", None) or {}).items():
        _narrow(model.get_submodule(path), sides)
    for path, spec in build["tables"].items():
        _take_rows(model.get_submodule(path), *spec)
    for path, values in (getattr(config, "pyprune_skipped", None) or {}).items():
        _skip(model.get_submodule(path), values)


def _layer_config(config: Any, plain: Any, values: dict[str, Any]) -> Any:
    """``plain`` with these values; the choice of attention implementation stays that of ``config``."""
    own = copy.copy(plain)
    for name, value in values.items():
        *parents, last = name.split(".")
        owner = own
        for part in parents:
            setattr(owner, part, copy.copy(getattr(owner, part)))
            owner = getattr(owner, part)
        setattr(owner, last, value)
    for name in _FOLLOWED:
        own.__dict__.pop(name, None)
    own.__dict__["_model_config"] = config
    own.__class__ = _following(type(config))
    return own


def _following(cls: Any) -> Any:
    def follow(name: str) -> property:
        def get(self: Any) -> Any:
            return getattr(vars(self)["_model_config"], name)

        def put(self: Any, value: Any) -> None:
            setattr(vars(self)["_model_config"], name, value)

        return property(get, put)

    return type(cls.__name__, (cls,), {**{n: follow(n) for n in _FOLLOWED}, "__module__": cls.__module__})


def _resize(module: nn.Module, values: dict[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, list):
            old = module._parameters[name]
            assert old is not None
            module._parameters[name] = nn.Parameter(old.new_empty(value), requires_grad=old.requires_grad)
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.normalized_shape = tuple(value)
        else:
            setattr(module, name, value)


def _narrow(layer: Any, sides: dict[str, list[int]]) -> None:
    """A matrix between fewer inputs and outputs than the model around it has; the others are zeros."""
    linear = isinstance(layer, nn.Linear)
    numbers = {"in": "in_features", "out": "out_features"} if linear else {"in": "nx", "out": "nf"}
    own = type(layer)
    for side, name in numbers.items():
        kept = torch.empty(sides[side][1], dtype=torch.int64) if side in sides else None
        layer.register_buffer(f"kept_{side}", kept)
        if side in sides:
            setattr(layer, name, sides[side][1])
    layer.wide_out = sides["out"][0] if "out" in sides else 0
    shape = [getattr(layer, numbers["in"]), getattr(layer, numbers["out"])]
    layer.weight = nn.Parameter(layer.weight.new_empty(shape[::-1] if linear else shape))
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.new_empty(shape[1]))

    def forward(self: Any, inputs: Tensor) -> Tensor:
        if self.kept_in is not None:
            inputs = inputs.index_select(-1, self.kept_in)
        outputs = own.forward(self, inputs)
        if self.kept_out is None:
            return outputs
        wide = outputs.new_zeros((*outputs.shape[:-1], self.wide_out))
        return wide.index_copy(-1, self.kept_out, outputs)

    layer.__class__ = type(f"Narrow{own.__name__}", (own,), {"forward": forward, "__module__": __name__})


def _skip(module: Any, values: int) -> None:
    """A module that is gone: zeros in place of what it gave, a tensor or a tuple of so many values."""
    own: Any = type(module)
    for held in (module._modules, module._parameters, module._buffers):
        held.clear()

    def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        zeros = torch.zeros_like(arguments[0] if arguments else named["hidden_states"])
        return (zeros, *[None] * (values - 1)) if values else zeros

    # No subclass: initialisers ask for the class, and fill in matrices that are not there.
    module.__class__ = type(own.__name__, (nn.Module,), {"forward": forward, "__module__": own.__module__})


def _take_rows(attention: Any, argument: str, position: int, rows: int, batched: bool) -> None:
    """Makes ``attention`` take the rows ``kept_units`` (a buffer) of the table that its ``forward`` is given."""
    own: Any = type(attention)
    attention.register_buffer("kept_units", torch.empty(rows, dtype=torch.int64))

    def forward(self: Any, hidden_states: Tensor, *arguments: Any, **named: Any) -> Any:
        values = list(arguments)
        place: Any = (named, argument) if argument in named else (values, position - 1)
        table, kept = place[0][place[1]], self.kept_units
        if batched:
            table = table.unflatten(0, (hidden_states.shape[0], -1)).index_select(1, kept).flatten(0, 1)
        else:
            table = table.index_select(0, kept)
        place[0][place[1]] = table
        return own.forward(self, hidden_states, *values, **named)

    attention.__class__ = type(own.__name__, (own,), {"forward": forward, "__module__": own.__module__})
