"""Functions that must be seen before they become ops.

Below this level scaled dot-product attention is decomposed differently on every backend, and with it goes whether a
scale was given; a grouped product of fake tensors is refused for every type but bfloat16; ``one_hot`` reads values; and
an expert number that indexes stacked weights becomes a Python number whose origin nobody knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from pyprune.discovery import axes as ax
from pyprune.discovery.rules import find_rule
from pyprune.discovery.tracer import Call, Tracer


def _empty_product(a: torch.Tensor, b: torch.Tensor, **_: Any) -> torch.Tensor:
    """What a grouped product of ``a`` [tokens, K] and ``b`` [groups, K, N] looks like."""
    return a.new_empty((a.shape[0], b.shape[-1]))


def _empty_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """What attention of ``query`` [*, L, E] over ``value`` [*, S, V] looks like."""
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


# Function -> (name of its rule, names of its arguments, stand-in for tensors without data).
_WHOLE: dict[Any, tuple[str, tuple[str, ...], Callable[..., torch.Tensor] | None]] = {
    torch.nn.functional.scaled_dot_product_attention: (
        "scaled_dot_product_attention",
        ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"),
        _empty_attention,
    ),
    torch._grouped_mm: ("_grouped_mm", ("self", "mat2", "offs", "bias", "out_dtype"), _empty_product),
    torch.nn.functional.one_hot: ("one_hot", ("self", "num_classes"), None),
}  # fmt: skip
_READS = frozenset({torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__})


class Interceptor(TorchFunctionMode):
    """Hands such functions to their rules as one op each.

    Args:
        tracer: what labels the results.
        fake: the model runs on tensors without data.
    """

    def __init__(self, tracer: Tracer, fake: bool) -> None:
        super().__init__()
        self.tracer, self.fake = tracer, fake

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.tracer.paused:
            return func(*args, **kwargs)
        if func in _READS:
            self._freeze_read(func, args[0])
        elif func in _WHOLE:
            return self._whole(func, args, kwargs)
        elif func is torch.Tensor.__getitem__ and self._by_pointer(*args):
            self.tracer.paused = True
            try:
                out = func(*args)
            finally:
                self.tracer.paused = False
            bound = {"self": args[0], "index": args[1]}
            self.tracer.run_rule(find_rule(None, "select_expert"), Call(self.tracer, func, "select_expert", bound, out))
            return out
        return func(*args, **kwargs)

    def _whole(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        name, names, stand_in = _WHOLE[func]
        bound = dict.fromkeys(names) | dict(zip(names, args, strict=False)) | kwargs
        if name == "_grouped_mm" and not (args[0].dim() == 2 and args[1].dim() == 3):
            stand_in = None
        self.tracer.paused = True
        try:
            out = stand_in(*args, **kwargs) if self.fake and stand_in is not None else func(*args, **kwargs)
        finally:
            self.tracer.paused = False
        self.tracer.run_rule(find_rule(None, name), Call(self.tracer, func, name, bound, out))
        return out

    def _by_pointer(self, tensor: Any, index: Any) -> bool:
        """``tensor[index]`` with one number that points into a known axis."""
        if not isinstance(index, torch.Tensor) or index.dim() != 0 or index.is_floating_point():
            return False
        return index.dtype != torch.bool and self.tracer.info(index).values is not None

    def _freeze_read(self, func: Any, tensor: torch.Tensor) -> None:
        info = self.tracer.info(tensor)
        for axis in (*info.axes, *(() if info.values is None else (info.values,))):
            ax.freeze(axis, f"its values are read by {func.__name__} in {self.tracer.module or 'the model'}")
