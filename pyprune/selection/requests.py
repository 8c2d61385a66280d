"""Reading what the user asks for: parameter counts, layer ranges, amounts of units."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any, TypeAlias

from pyprune.discovery.groups import ROLES
from pyprune.errors import PyPruneError, unknown_name

LayerSpec: TypeAlias = "str | int | Iterable[int]"
Amount: TypeAlias = "int | float"

_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_COUNT = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([KMBT]?)", re.IGNORECASE)
_LAYERS = re.compile(r"(?P<only>\d+)|(?P<first>\d+)-(?P<last>\d+)|(?P<start>\d*):(?P<stop>\d*)")

_HEADS = ("attention", "attn", "heads")  # what is often said for roles whose names are far from it


def parse_ratio(ratio: Any) -> float:
    """A fraction in [0, 1).

    Raises:
        PyPruneError: not a number, or outside.
    """
    if not _is_number(ratio):
        raise PyPruneError("ratio", ratio, "is not a number", "Give the fraction of parameters to remove, as 0.2.")
    if not 0 <= ratio < 1:  # NaN too
        hint = (
            f"Did you mean {ratio / 100:g}?"
            if 2 <= ratio < 100  # a percentage
            else "Give the fraction of parameters to remove, as 0.2."
        )
        raise PyPruneError("ratio", ratio, "must be at least 0 and below 1", hint)
    return float(ratio)


def parse_count(count: Any) -> int:
    """A number of parameters: ``5_400_000_000``, ``"5.4B"``, ``"108M"``, ``"750k"``.

    Raises:
        PyPruneError: not such a number, or below 1.
    """
    hint = 'Give a number of parameters, as 108000000, "108M" or "5.4B".'
    if isinstance(count, str):
        match = _COUNT.fullmatch(count.strip().replace("_", "").replace(",", ""))
        if match is None:
            raise PyPruneError("target_params", count, "is not a number of parameters", hint)
        value = float(match[1]) * _SUFFIXES[match[2].upper()]
    elif _is_number(count) and math.isfinite(count):
        value = float(count)
    else:
        raise PyPruneError("target_params", count, "is not a number of parameters", hint)
    if round(value) < 1:
        raise PyPruneError("target_params", count, "must be at least one parameter", hint)
    return count if isinstance(count, int) else round(value)


def parse_layers(spec: LayerSpec | None, count: int) -> list[int] | None:
    """Ascending decoder layer indices of a model with ``count`` layers; None stays None (all layers).

    Accepts ``"3-27"`` (27 included), ``"3:28"``, ``"3:"``, ``":28"`` (as in Python, the end excluded), ``"5"``,
    several of them with commas, an index, or any iterable of indices or such strings.

    Raises:
        PyPruneError: not such a form, an empty or backward range, a layer that the model does not have.
    """
    if spec is None:
        return None
    parts: list[Any]
    if isinstance(spec, str):
        parts = spec.split(",")
    elif isinstance(spec, Iterable):
        parts = [p for item in spec for p in (item.split(",") if isinstance(item, str) else [item])]
    else:
        parts = [spec]
    out: set[int] = set()
    for part in parts:
        if isinstance(part, Integral) and not isinstance(part, bool):
            out.add(int(part))
        else:
            out.update(_layer_range(part, spec, count))
    if not out:
        raise PyPruneError(
            "layers", spec, "names no layer", f"The model has layers 0 to {count - 1}; leave it out for all."
        )
    for layer in sorted(out):
        if not 0 <= layer < count:
            raise PyPruneError("layers", spec, f"there is no layer {layer}", f"The model has layers 0 to {count - 1}.")
    return sorted(out)


def _layer_range(part: Any, spec: LayerSpec, count: int) -> range:
    match = _LAYERS.fullmatch("".join(part.split())) if isinstance(part, str) else None
    if match is None or part.strip() == ":":
        hint = 'Give "3-27" (27 included), "3:28" (28 excluded), "0,4,8-11" or a list of layer indices.'
        raise PyPruneError(
            "layers", spec, f"{part!r} is not a layer range" if part != spec else "is not a layer range", hint
        )
    if match["only"] is not None:
        return range(int(match["only"]), int(match["only"]) + 1)
    if match["first"] is not None:
        out = range(int(match["first"]), int(match["last"]) + 1)
    else:
        out = range(int(match["start"] or 0), int(match["stop"]) if match["stop"] else count)
    if not out:
        raise PyPruneError("layers", spec, f"the range {part.strip()!r} is empty", "Its start must lie before its end.")
    return out


def parse_roles(option: str, roles: str | Iterable[str]) -> list[str]:
    """Known roles, each once, in the order given; a string is split at commas.

    Raises:
        PyPruneError: a name that is no role, or none at all.
    """
    names = [r.strip() for r in roles.split(",")] if isinstance(roles, str) else list(roles)
    for name in names:
        if name in _HEADS:
            hint = f"Heads are kv_heads and query_heads. Known: {', '.join(sorted(ROLES))}."
            raise PyPruneError(option, name, "is not known", hint)
        if not isinstance(name, str) or name not in ROLES:
            raise unknown_name(option, str(name), ROLES)
    if not names:
        raise PyPruneError(option, None, "names no role", "Name at least one, as kv_heads or ffn.")
    return list(dict.fromkeys(names))


def parse_amounts(option: str, amounts: Any) -> dict[str, Amount]:
    """Role -> units (int, at least 1) or fraction of the units (float, in (0, 1]).

    Raises:
        PyPruneError: not such a mapping.
    """
    if not isinstance(amounts, Mapping) or not amounts:
        problem = "is empty" if isinstance(amounts, Mapping) else "is not a mapping from role to width"
        raise PyPruneError(option, amounts, problem, 'Give it as {"kv_heads": 0.5, "ffn": 5504}, or leave it out.')
    parse_roles(option, list(amounts))
    return {role: parse_amount(option, amount, f" for {role}") for role, amount in amounts.items()}


def parse_amount(option: str, amount: Any, where: str = "") -> Amount:
    """Units (int, at least 1) or a fraction of them (float, in (0, 1]).

    Raises:
        PyPruneError: neither.
    """
    hint = "Give an integer for a number of units, or a fraction above 0 and at most 1 (1.0 is all)."
    if not _is_number(amount):
        raise PyPruneError(option, amount, f"is not a number of units or a fraction{where}", hint)
    if isinstance(amount, Integral):
        if amount < 1:
            raise PyPruneError(option, amount, f"at least one unit must stay{where}", hint)
        return int(amount)
    if not 0 < amount <= 1:
        raise PyPruneError(option, amount, f"is no fraction{where}", hint)
    return float(amount)


def parse_removal(option: str, amount: Any) -> Amount:
    """How many units go: a number (int, at least 1) or a fraction of them (float, above 0 and below 1).

    Raises:
        PyPruneError: neither.
    """
    hint = "Give a whole number, as 3, or a fraction of all, as 0.2."
    if not _is_number(amount) or amount != amount:
        raise PyPruneError(option, amount, "is not a number", hint)
    if isinstance(amount, Integral):
        if amount < 1:
            raise PyPruneError(option, amount, "must be at least 1", hint)
        return int(amount)
    if not 0 < amount < 1:
        raise PyPruneError(option, amount, "must be a whole number, or a fraction above 0 and below 1", hint)
    return float(amount)


def units_of(amount: Amount, units: int) -> int:
    """An amount in units: integers as they are, fractions rounded (half up), at least 1."""
    return amount if isinstance(amount, int) else max(1, math.floor(amount * units + 0.5))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
