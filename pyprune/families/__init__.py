"""Model adapters: only what a configuration cannot express.

Most families need nothing here: :mod:`pyprune.surgery` finds by itself which configuration attributes give the planned
shapes. A family is written where a *constructor* assumes something, for example that a head is ``hidden_size // heads``
wide. One file a family; it calls :func:`register` once. Files of this package are imported by themselves.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from torch import nn

Config = Any

KEPT = "kept_units"
"""Name of the buffer with the old positions of the units that stayed, where a model's tables go by position."""


@dataclass(frozen=True)
class Family:
    """What must be done after the stock constructor, so that it honours more of the configuration.

    Attributes:
        name: of the family.
        model_types: ``config.model_type`` of the configurations it serves.
        explicit: configuration attributes that this adapter makes independent, each with the value that the stock
            constructor assumes for a given configuration (not rounded: a fraction says that it would refuse).
        stock: changes a copy of the configuration in place so that the stock constructor accepts it.
        resize: gives one module of the built model (any module; most are left alone) the sizes that the configuration
            asks for. Runs on the meta device, before weights are there, for every module from the outside in.
        stand_in: another class and configuration that compute the very same function and accept widths that the
            family's own configuration class refuses, or None when the model uses what only its own class has.
        tables: roles along whose axes the model computes values by position (ALiBi slopes), and whose modules, once
            ``resize`` has made them smaller, take those of the units in their buffer :data:`KEPT`, int64 [units kept].
    """

    name: str
    model_types: tuple[str, ...]
    explicit: Mapping[str, Callable[[Config], float]] = field(default_factory=dict)
    stock: Callable[[Config], None] | None = None
    resize: Callable[[nn.Module, Config], None] | None = None
    stand_in: Callable[[Config], tuple[type, Config] | None] | None = None
    tables: tuple[str, ...] = ()

    def applies(self, config: Config) -> bool:
        """Whether the configuration asks for something that the stock constructor would not build."""
        return any(
            getattr(config, name, None) not in (None, assumed(config)) for name, assumed in self.explicit.items()
        )


_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Makes ``family`` known for its model types. Raises ValueError when one of them is taken."""
    for model_type in family.model_types:
        if model_type in _FAMILIES:
            raise ValueError(f"model type {model_type!r} has a family already: {_FAMILIES[model_type].name}")
        _FAMILIES[model_type] = family
    return family


def find(config: Config) -> Family | None:
    """The family that serves this configuration, or None: the stock class is enough."""
    return _FAMILIES.get(getattr(config, "model_type", ""))


def families() -> list[Family]:
    """Every registered family, once."""
    return list({id(f): f for f in _FAMILIES.values()}.values())


for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
