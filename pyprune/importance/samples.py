"""Each sample's own weight gradients from one backward pass over several samples.

Autograd sums a weight's gradient over the batch, so squared per-sample gradients seem to need a pass for each sample.
For a linear layer y = x W^T the gradient of sample b is dy_b^T x_b, [out, in], and both factors pass by during the one
backward pass. Everything but these products then runs at the speed of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pyprune.importance.collector import Collector


class NotTappable(Exception):
    """The scored parameters are not all those of linear layers that see [samples, length, width]."""


class _Tap(torch.autograd.Function):
    """Identity in front of a linear layer. Going back, hands the layer's input and its output's gradient to ``sink``.

    The input is saved before the layer computes, so that recomputing a block still stops short of its last product.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, arrived: list[Tensor], sink: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.arrived, ctx.sink = arrived, sink
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        ctx.sink(x, ctx.arrived.pop())
        return dx, None, None


@dataclass
class SampleTaps:
    """Taps on the linear layers that hold the scored parameters.

    Attributes:
        layers: layer -> (name of its weight, name of its bias), None where one is not scored.
        rows: refuse inputs that are not [rows, length, width]; None takes them as they are.
        collector: where the samples' gradients go; None lets them go nowhere.
    """

    layers: dict[nn.Linear, tuple[str | None, str | None]]
    rows: int | None = None
    collector: Collector | None = None

    @classmethod
    def of(cls, model: nn.Module, scored: Mapping[str, nn.Parameter]) -> SampleTaps:
        """Raises NotTappable when a scored parameter is not that of exactly one linear layer."""
        names = {id(p): name for name, p in scored.items()}
        layers: dict[nn.Linear, tuple[str | None, str | None]] = {}
        found: list[int] = []
        for module in model.modules():
            own = [id(p) for p in module.parameters(recurse=False) if id(p) in names]
            found += own
            if own and type(module) is not nn.Linear:  # a subclass may compute something else
                raise NotTappable(f"{names[own[0]]} is not in a linear layer")
            if own and isinstance(module, nn.Linear):
                layers[module] = (names.get(id(module.weight)), names.get(id(module.bias)))
        if len(found) != len(names):
            raise NotTappable("linear layers share weights")
        return cls(layers)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within it the layers compute through taps, and their parameters get no gradient from autograd."""
        before = {layer: layer.__dict__.get("forward") for layer in self.layers}
        if any(own is not None for own in before.values()):
            raise NotTappable("something else has replaced a linear layer's forward pass")
        try:
            for layer in self.layers:
                layer.forward = partial(self._forward, layer)  # type: ignore[method-assign]
            yield
        finally:
            for layer in self.layers:
                layer.__dict__.pop("forward", None)  # the class's own again

    def _forward(self, layer: nn.Linear, x: Tensor) -> Tensor:
        if self.rows is not None and (x.dim() != 3 or x.shape[0] != self.rows):
            raise NotTappable(f"a linear layer is given {list(x.shape)} for {self.rows} samples")
        if not x.requires_grad:  # nothing below is scored; without it the tap would see no gradient either
            x = x.detach().requires_grad_()
        arrived: list[Tensor] = []
        x = _Tap.apply(x, arrived, partial(self._sink, layer))
        y = linear(x, layer.weight.detach(), None if layer.bias is None else layer.bias.detach())
        if y.requires_grad:
            y.register_hook(arrived.append)
        return y

    def _sink(self, layer: nn.Linear, x: Tensor, dy: Tensor) -> None:
        if self.collector is None:
            return
        weight, bias = self.layers[layer]
        product = torch.empty_like(layer.weight, dtype=dy.dtype, memory_format=torch.contiguous_format)
        for xb, dyb in zip(x.detach(), dy.detach(), strict=True):
            if weight is not None:
                self.collector.add(weight, torch.mm(dyb.t(), xb, out=product))
            if bias is not None:
                self.collector.add(bias, dyb.sum(0))
