"""Numbers in a configuration, and what each of them does to a module's shapes, found by trying."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from torch import nn

from pyprune import families
from pyprune.surgery.decoder import scalars, structure

Config = Any
Dim = tuple[str, int]

HEAD_SIZE = ("head_dim", "head_size", "attention_head_size", "head_width", "kv_channels", "d_kv", "dim_head")
"""Usual names for the width of one attention head, in configurations and in modules."""


@dataclass(frozen=True)
class Attribute:
    """One number of a configuration: a name (dotted where configurations nest), and a position when it is in a list."""

    name: str
    position: int | None = None

    def get(self, config: Config) -> int | None:
        value = config
        for part in self.name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else read(value, part)
        if self.position is not None and value is not None:
            value = value[self.position]
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def set(self, config: Config, value: int) -> None:
        """Writes to ``config`` in place; nested configurations and lists on the way are copied, not shared."""
        *parents, last = self.name.split(".")
        owner = config
        for part in parents:
            child = copy.copy(owner[part] if isinstance(owner, Mapping) else read(owner, part))
            _put(owner, part, child)
            owner = child
        new: Any = value
        if self.position is not None:
            old = owner[last] if isinstance(owner, Mapping) else read(owner, last)
            new = list(old)
            new[self.position] = value
            new = type(old)(new)
        _put(owner, last, new)

    @property
    def head_size(self) -> bool:
        return self.name.rsplit(".", 1)[-1] in HEAD_SIZE


def read(config: Config, name: str) -> Any:
    """A configuration's common value of an attribute, also where layers override it; None when it has none."""
    common = getattr(config, "_getattr_without_heterogeneous_validation", None)
    return getattr(config, name, None) if common is None else common(name, None)


def _put(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, dict):
        owner[name] = value
    else:
        setattr(owner, name, value)


def with_values(config: Config, values: Mapping[Attribute, int]) -> Config:
    """A copy of ``config`` with these values."""
    out = copy.copy(config)
    for attribute, value in values.items():
        attribute.set(out, value)
    return out


def candidates(config: Config, layer: int | None = None) -> list[Attribute]:
    """Every positive whole number in ``config`` and the configurations it nests.

    Args:
        layer: decoder layer whose entry counts in lists with one number a layer; None leaves lists out.
    """
    return list(_numbers(config, "", layer, getattr(config, "num_hidden_layers", None)))


def unset(config: Config) -> list[Attribute]:
    """Whole numbers that ``config`` could have and has not: fields that are None, a head's width, family attributes."""
    family = families.find(config)
    names = ["head_dim", *(family.explicit if family is not None else ())]
    kinds = {f.name: str(f.type) for f in fields(config)} if is_dataclass(config) else {}
    for name, value in vars(config).items():
        if (
            value is None
            and not name.startswith("_")
            and not name.endswith("token_id")
            and "int" in kinds.get(name, "int")
        ):
            names.append(name)
    return [Attribute(name) for name in dict.fromkeys(names) if read(config, name) is None]


def _numbers(owner: Any, prefix: str, layer: int | None, count: int | None) -> Iterator[Attribute]:
    from transformers import PretrainedConfig

    for name, value in (owner if isinstance(owner, Mapping) else vars(owner)).items():
        if not isinstance(name, str) or name.startswith("_") or name in ("label2id", "id2label", "quantization_config"):
            continue
        path = prefix + name
        if isinstance(value, bool):
            continue
        if isinstance(value, int) and value > 0:
            yield Attribute(path)
        elif isinstance(value, (list, tuple)) and layer is not None and len(value) == count:
            if isinstance(value[layer], int) and not isinstance(value[layer], bool) and value[layer] > 0:
                yield Attribute(path, layer)
        elif isinstance(value, (PretrainedConfig, dict)) and prefix.count(".") < 2:
            yield from _numbers(value, path + ".", layer, count)


@dataclass
class Built:
    """What a constructor made: shapes of tensors and the plain numbers in modules.

    Buffers that only a cut model has (:data:`pyprune.families.KEPT`) are left out.
    """

    shapes: dict[str, tuple[int, ...]]
    numbers: dict[str, int | float | bool]

    @classmethod
    def of(cls, module: nn.Module) -> Built:
        return cls(without_kept(structure(module)), scalars(module))

    def has(self, base: Built, wanted: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether the tensors are those of ``base``, with the shapes ``wanted`` where it names them."""
        same = self.shapes.keys() == base.shapes.keys()
        return same and all(self.shapes[name] == shape for name, shape in wanted.items())


def without_kept(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """``shapes`` without the buffers :data:`pyprune.families.KEPT`."""
    return {name: shape for name, shape in shapes.items() if name.rpartition(".")[2] != families.KEPT}


class Scope:
    """A constructor as a function of configuration values, with its answers kept.

    Args:
        config: the configuration that the values change.
        construct: builds the module from a configuration, on the meta device.
    """

    def __init__(self, config: Config, construct: Callable[[Config], nn.Module]) -> None:
        self.config = config
        self._construct = construct
        self._answers: dict[frozenset[tuple[Attribute, int]], Built | None] = {}

    def build(self, values: Mapping[Attribute, int]) -> Built | None:
        """What the constructor makes of these values; None when it refuses them."""
        key = frozenset(values.items())
        if key not in self._answers:
            try:
                module = self._construct(with_values(self.config, values))
            except Exception:  # a constructor may refuse a value with any exception
                self._answers[key] = None
            else:
                self._answers[key] = Built.of(module)
        return self._answers[key]

    def moves(self, values: Mapping[Attribute, int], attribute: Attribute, value: int) -> dict[Dim, float]:
        """(tensor, dim) -> change per unit of ``attribute``, by building with another value of it."""
        base = self.build(values)
        if base is None:
            return {}
        for trial in trials(value):
            other = self.build({**values, attribute: trial})
            if other is None or other.shapes.keys() != base.shapes.keys():
                continue
            return {
                (name, dim): (b - a) / (trial - value)
                for name, shape in base.shapes.items()
                if len(shape) == len(other.shapes[name])
                for dim, (a, b) in enumerate(zip(shape, other.shapes[name], strict=True))
                if a != b
            }
        return {}


def trials(value: int) -> Iterable[int]:
    """Other values worth trying: twice keeps most divisibility rules, then half, then the neighbours."""
    yield 2 * value
    if value % 2 == 0:
        yield value // 2
    yield 3 * value
    yield value + 1
    if value > 1:
        yield value - 1
