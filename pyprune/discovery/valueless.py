"""Running ops on the meta device as far as values are unknown, and really as far as they are known.

Weights have no values here, so what they touch has none. What is made from sizes and from the inputs (positions, masks)
is small and is computed, so that code which looks at it runs as it would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

# Shape, strides and type of a result.
_Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]


class ValuelessOps:
    """Calls ops; the layout of a result is worked out once for each op and kind of arguments."""

    def __init__(self) -> None:
        self._layouts: dict[Any, _Layout | None] = {}
        self._plain: dict[Any, bool] = {}

    def __call__(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """``func`` where some tensors are on the meta device and the others have values.

        Everything that depends on no tensor without values is computed, whatever device was asked for.

        Raises:
            RuntimeError: a tensor that has values is written to with what has none.
        """
        tensors = list(_tensors(args)) if not kwargs else [*_tensors(args), *_tensors(kwargs.values())]
        known = sum(not t.is_meta for t in tensors)
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": "cpu" if known == len(tensors) else "meta"}
        if known == len(tensors):
            return func(*args, **kwargs)
        if known and func._schema.is_mutable and not args[0].is_meta:
            raise RuntimeError(f"{func} writes unknown values over known ones")
        plain = self._plain.get(func)
        if plain is None:
            returns = func._schema.returns
            plain = len(returns) == 1 and returns[0].alias_info is None and str(returns[0].type) == "Tensor"
            self._plain[func] = plain
        if not plain:
            return _call(func, args, kwargs, known)
        key = (func, _key(args), _key(tuple(kwargs.items())) if kwargs else None)
        layout = self._layouts.get(key)
        if layout is None:
            out = _call(func, args, kwargs, known)
            self._layouts[key] = (out.shape, out.stride(), out.dtype)
            return out
        return torch.empty_strided(layout[0], layout[1], dtype=layout[2], device="meta")


def _tensors(values: Any) -> Any:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _key(value: Any) -> Any:
    """What of an argument decides a result's layout. Equal numbers of different types do not give the same one."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple([_key(v) for v in value])
    return type(value), value


def _call(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], known: int) -> Any:
    if not known:
        return func(*args, **kwargs)
    return func(*[_without_values(a) for a in args], **{k: _without_values(v) for k, v in kwargs.items()})


def _without_values(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and not value.is_meta:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return [_without_values(v) for v in value] if isinstance(value, (list, tuple)) else value
