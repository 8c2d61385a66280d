"""Op rules: how each op relates axes, in one file a family.

A rule is a function from a :class:`~pyprune.discovery.tracer.Call` to the Info of each tensor result (one Info, or a
sequence of them; None for "I do not know": the op then freezes what it touches). It is registered by op name::

    @rule("mm", "bmm")
    def matmul(call): ...

Pointwise ops need no entry: torch tags them, and the elementwise rule takes every op that has the tag.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch

_Rule = TypeVar("_Rule", bound=Callable[[Any], Any])
RULES: dict[str, Callable[[Any], Any]] = {}
_FAMILIES = ("elementwise", "matmul", "shape", "reduction", "indexing", "attention", "creation", "convolution",
             "experts", "complex", "scan")  # fmt: skip


def rule(*names: str) -> Callable[[_Rule], _Rule]:
    """Register a rule for ops by schema name without namespace or overload (``"mm"``, ``"_softmax"``)."""

    def register(function: _Rule) -> _Rule:
        for name in names:
            if name in RULES:
                raise ValueError(f"two rules for {name}")
            RULES[name] = function
        return function

    return register


def find_rule(func: Any, name: str) -> Callable[[Any], Any] | None:
    """The rule for an op: by name, in-place variants included, else the elementwise rule for ops tagged pointwise."""
    _load()
    found = RULES.get(name) or (RULES.get(name[:-1]) if name.endswith("_") and not name.endswith("__") else None)
    if found is None and func is not None and torch.Tag.pointwise in func.tags:
        found = RULES["pointwise"]
    return found


@functools.cache
def _load() -> None:
    for family in _FAMILIES:
        importlib.import_module(f"{__name__}.{family}")
