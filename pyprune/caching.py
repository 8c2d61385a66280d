"""The cache of a model that generates, by whatever name its transformers or its own code calls it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

NAMES = ("cache", "past_key_values", "cache_params")
"""From transformers 5.24 on, and before it of keys and values, of states. Remote code keeps what it was written for."""


def cache_of(output: Mapping[str, Any]) -> Any:
    """The cache in what a model or ``generate`` returned, None where there is none."""
    return next((output[name] for name in NAMES if output.get(name) is not None), None)


def cache_argument(model: Any) -> str:
    """The name by which ``model.forward`` takes a cache."""
    taken = inspect.signature(model.forward).parameters
    return next((name for name in NAMES if name in taken), NAMES[0])
