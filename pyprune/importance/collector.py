"""Where gradients and sums go while a backward pass runs: into float32 sums, and away."""

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
    batches are not rounded away. Sums made from activations come by :meth:`add_sums`.

    Args:
        criterion: what is measured.
        parameters: name -> parameter, the scored ones.
        samples: calibration sequences in all batches.
        scale: what losses are multiplied by before the backward pass; divided out here, in float32.

    Attributes:
        sums: name -> (rows, columns) of the salience, for parameters that are finished. With a leading dimension of
            samples where the criterion is ``per_sample``.
        factor: what engines multiply each sample's loss by.
        gradient_share: what gradients that arrive are multiplied by to add up to G.
        curvature_share: what their squares are multiplied by to add up to H.
    """

    def __init__(
        self, criterion: Criterion, parameters: Mapping[str, nn.Parameter], samples: int, scale: float = 1.0
    ) -> None:
        self.criterion, self.parameters, self.samples, self.scale = criterion, parameters, samples, scale
        self.factor = scale if criterion.separate else scale / samples
        self.gradient_share = 1 / (samples * scale) if criterion.curvature else 1 / scale
        self.curvature_share = 1 / (samples * scale**2)
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._gradients: dict[str, Tensor] = {}
        self._curvatures: dict[str, Tensor] = {}
        self._apart: dict[str, list[tuple[Tensor, Tensor]]] = {}  # per_sample: sums of each backward pass
        self._latest: dict[str, int] = {}  # the pass that a parameter's last entry there belongs to
        self._pass = 0

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
        """Take in ``parameter.grad``, of one batch (of one sample, where the criterion looks at samples apart)."""
        p = self.parameters[name]
        grad = p.grad
        if grad is None:
            return
        if not self.criterion.separate and p.dtype not in HALF and self.scale == 1:
            return  # autograd adds the batches up in .grad itself
        p.grad = None
        self.add(name, grad)

    @torch.no_grad()
    def add(self, name: str, grad: Tensor, expert: int | None = None) -> None:
        """Take in a gradient of a batch, or of a sample where the criterion looks at samples apart; it is not kept.

        Args:
            grad: of the whole parameter, or of one ``expert`` of a stacked one.
        """
        p = self.parameters[name].detach()
        wide = torch.promote_types(grad.dtype, torch.float32)
        if self.criterion.per_sample:
            weight = p if expert is None else p[expert]
            (rows,), (cols,) = self.criterion.sums([weight], [grad.to(wide) * self.gradient_share], None)
            self.add_sums(name, rows[None], cols[None], expert)
            return
        if self.criterion.curvature:
            h = _part(self._curvatures, name, p, wide, expert)
            accumulate_square_([h], [grad], self.curvature_share)
        if self.criterion.gradient:
            if expert is None and name not in self._gradients:
                self._gradients[name] = grad.to(wide) * self.gradient_share
            else:
                _part(self._gradients, name, p, wide, expert).add_(grad, alpha=self.gradient_share)

    def add_sums(self, name: str, rows: Tensor, cols: Tensor, expert: int | None = None) -> None:
        """Add to the sums of a parameter, or of one ``expert`` of a stacked one.

        Args:
            rows: as in ``sums``; those of one expert lack its dimension.
            cols: likewise.
        """
        if expert is not None:
            experts = self.parameters[name].shape[0]
            rows, cols = _spread(rows, expert, experts), _spread(cols, expert, experts)
        if not self.criterion.per_sample:
            before = self.sums.get(name)
            self.sums[name] = (rows, cols) if before is None else (before[0] + rows, before[1] + cols)
            return
        entries = self._apart.setdefault(name, [])
        if self._latest.get(name) == self._pass and entries:
            # Another use of the same weight by the same samples: both are part of its gradient.
            entries[-1] = (entries[-1][0] + rows, entries[-1][1] + cols)
        else:
            entries.append((rows, cols))
            self._latest[name] = self._pass

    def next_samples(self) -> None:
        """What arrives from now on belongs to other samples."""
        self._pass += 1

    def finish(self, names: Iterable[str]) -> None:
        """Turn what has arrived for these parameters into sums, added to what is there, and free it.

        Raises:
            NotFinite: weights or gradients hold NaN or infinity.
        """
        names = list(names)
        waiting = [name for name in names if self._waits(name)]
        weights: list[Tensor] = []
        gradients: list[Tensor] = []
        curvatures: list[Tensor] = []
        for name in waiting:
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
        if waiting:
            rows, cols = self.criterion.sums(weights, gradients or None, curvatures or None)
            for name, r, c in zip(waiting, rows, cols, strict=True):
                self.add_sums(name, *((r[None], c[None]) if self.criterion.per_sample else (r, c)))
        for name in names:
            entries = self._apart.pop(name, [])
            if entries:
                entries = [*([self.sums[name]] if name in self.sums else []), *entries]
                self.sums[name] = torch.cat([r for r, _ in entries]), torch.cat([c for _, c in entries])
            if not self.sums[name][0].isfinite().all():
                raise NotFinite(name)

    def _waits(self, name: str) -> bool:
        """Whether a gradient is there to be turned into sums; a parameter that nothing reached has one of zeros."""
        if name in self._gradients or name in self._curvatures or self.parameters[name].grad is not None:
            return True
        return name not in self.sums and name not in self._apart


def _part(table: dict[str, Tensor], name: str, like: Tensor, dtype: torch.dtype, expert: int | None) -> Tensor:
    """The sum of a parameter, zero at first; of one expert, a view."""
    if name not in table:
        table[name] = torch.zeros_like(like, dtype=dtype, memory_format=torch.contiguous_format)
    return table[name] if expert is None else table[name][expert]


def _spread(values: Tensor, expert: int, experts: int) -> Tensor:
    """[..., size] -> [..., experts, size], zero for the others."""
    out = values.new_zeros(*values.shape[:-1], experts, values.shape[-1])
    out[..., expert, :] = values
    return out
