"""Where gradients go while a backward pass runs: into float32 sums, and away."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pyprune.importance.losses import NotFinite
from pyprune.importance.registry import Criterion
from pyprune.ops import accumulate_square_

HALF = (torch.float16, torch.bfloat16)


class Collector:
    """Consumes the gradients of the scored parameters as they arrive, and keeps only row and column sums.

    A parameter's gradient is alive between its arrival and :meth:`finish`, which the engine calls as soon as all of its
    batches have arrived. Gradients of 16-bit weights are added up in float32, so that small contributions of later
    batches are not rounded away.

    Args:
        criterion: what is measured.
        parameters: name -> parameter, the scored ones.
        samples: calibration sequences in all batches.
        scale: what losses are multiplied by before the backward pass; divided out here, in float32.

    Attributes:
        sums: name -> (rows, columns) of the salience, for parameters that are finished.
        factor: what engines multiply each sample's loss by.
    """

    def __init__(
        self, criterion: Criterion, parameters: Mapping[str, nn.Parameter], samples: int, scale: float = 1.0
    ) -> None:
        self.criterion, self.parameters, self.samples, self.scale = criterion, parameters, samples, scale
        self.factor = scale if criterion.curvature else scale / samples
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._gradients: dict[str, Tensor] = {}
        self._curvatures: dict[str, Tensor] = {}

    def install(self, after: Callable[[str], None] | None = None) -> list[RemovableHandle]:
        """Hook every parameter. ``after(name)`` is called when its gradient has been taken in."""

        def hook(name: str) -> Callable[[Tensor], None]:
            def arrived(parameter: Tensor) -> None:
                self.take(name)
                if after is not None:
                    after(name)

            return arrived

        return [p.register_post_accumulate_grad_hook(hook(name)) for name, p in self.parameters.items()]

    def take(self, name: str) -> None:
        """Take in ``parameter.grad``, of one batch (of one sample, where the criterion reads curvatures)."""
        p = self.parameters[name]
        grad = p.grad
        if grad is None:
            return
        if not self.criterion.curvature and p.dtype not in HALF and self.scale == 1:
            return  # autograd adds the batches up in .grad itself
        p.grad = None
        self.add(name, grad)

    @torch.no_grad()
    def add(self, name: str, grad: Tensor) -> None:
        """Take in a gradient of a batch, or of a sample where the criterion reads curvatures; ``grad`` is not kept."""
        wide = torch.promote_types(grad.dtype, torch.float32)
        if self.criterion.curvature:
            h = self._curvatures.get(name)
            if h is None:
                h = self._curvatures[name] = torch.zeros_like(grad, dtype=wide, memory_format=torch.contiguous_format)
            accumulate_square_([h], [grad], 1 / (self.samples * self.scale**2))
            share = 1 / (self.samples * self.scale)
        else:
            share = 1 / self.scale
        if self.criterion.gradient:
            total = self._gradients.get(name)
            if total is None:
                self._gradients[name] = grad.to(wide) * share
            else:
                total.add_(grad, alpha=share)

    def finish(self, names: Iterable[str]) -> None:
        """Turn what has arrived for these parameters into sums, added to what is there, and free it.

        Raises:
            NotFinite: weights or gradients hold NaN or infinity.
        """
        names = list(names)
        weights: list[Tensor] = []
        gradients: list[Tensor] = []
        curvatures: list[Tensor] = []
        for name in names:
            p = self.parameters[name]
            weight = p.detach()
            if self.criterion.gradient:
                g = self._gradients.pop(name, None)
                gradients.append(g if g is not None else p.grad if p.grad is not None else torch.zeros_like(weight))
            if self.criterion.curvature:
                h = self._curvatures.pop(name, None)
                wide = torch.promote_types(p.dtype, torch.float32)
                curvatures.append(h if h is not None else torch.zeros_like(weight, dtype=wide))
            p.grad = None
            weights.append(weight)
        if not names:
            return
        rows, cols = self.criterion.measure(weights, gradients or None, curvatures or None)  # type: ignore[misc]
        for name, r, c in zip(names, rows, cols, strict=True):
            if not r.isfinite().all():
                raise NotFinite(name)
            before = self.sums.get(name)
            self.sums[name] = (r, c) if before is None else (before[0] + r, before[1] + c)
