"""Criteria by name: what each one reads and what it computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyprune.discovery.groups import Group
from pyprune.errors import unknown_name
from pyprune.ops import salience

if TYPE_CHECKING:
    from pyprune.importance.input_scores import InputStatistics

Sums = tuple[list[Tensor], list[Tensor]]
Measure = Callable[[Sequence[Tensor], "Sequence[Tensor] | None", "Sequence[Tensor] | None"], Sums]


@dataclass(frozen=True)
class Criterion:
    """How a unit's importance is measured.

    With the loss L_b of sample b, the mean over the tokens that it predicts, g_b = dL_b/dw; G = mean_b g_b, and
    H = mean_b g_b^2, the diagonal of the empirical Fisher matrix.

    Attributes:
        name: as users write it.
        summary: the formula and its source, one line.
        formula: of :func:`pyprune.ops.salience`, summed over rows and columns. With a formula (and a gradient in it)
            scores come from activations too, without gradients of weights. None where ``measure`` or ``draw`` is given.
        measure: (weights, G or None, H or None) -> row sums and column sums, for what no formula says.
        gradient: reads G, or every g_b where ``per_sample``.
        curvature: reads H.
        additive: linear in G and H, so that sums over batches may be added up in place of gradients.
        signed: the sums are signed, and the magnitude or the square is taken of a whole slice.
        per_sample: the square of a slice's signed sum, and the mean of it over samples.
        inputs: ``"moments"`` or ``"gram"``: reads these statistics of the inputs of linear layers.
        units: with ``inputs``: (weight float64 [outputs, inputs], its statistics, positions int64 [outer, units, k]) ->
            float64 [outer, units].
        tokens: reads what units hand on at single tokens and the gradient that comes back there.
        experts: reads the gated outputs of routed experts, and scores them alone.
        draw: (group, generator) -> float32 [outer, units], for criteria that read no tensor.
    """

    name: str
    summary: str
    formula: str | None = None
    measure: Measure | None = None
    gradient: bool = False
    curvature: bool = False
    additive: bool = False
    signed: bool = False
    per_sample: bool = False
    inputs: str | None = None
    units: Callable[[Tensor, InputStatistics, Tensor], Tensor] | None = None
    tokens: bool = False
    experts: bool = False
    draw: Callable[[Group, torch.Generator], Tensor] | None = None

    @property
    def backward(self) -> bool:
        """Whether gradients are needed."""
        return self.gradient or self.curvature

    @property
    def calibrated(self) -> bool:
        """Whether calibration batches are needed."""
        return self.backward or self.of_units

    @property
    def forward_only(self) -> bool:
        """Whether it is measured in forward passes alone."""
        return self.inputs is not None or self.experts

    @property
    def of_units(self) -> bool:
        """Whether units are scored as such, and not from row and column sums of tensors."""
        return self.forward_only or self.tokens

    @property
    def separate(self) -> bool:
        """Whether each sample's own gradients are needed, and not their sum alone."""
        return self.curvature or self.per_sample

    def sums(
        self, weights: Sequence[Tensor], gradients: Sequence[Tensor] | None, curvatures: Sequence[Tensor] | None
    ) -> Sums:
        """Row sums and column sums of every tensor, as :func:`pyprune.ops.salience` returns them."""
        if self.measure is not None:
            return self.measure(weights, gradients, curvatures)
        assert self.formula is not None
        return salience(self.formula, weights, gradients, curvatures)


CRITERIA: dict[str, Criterion] = {}
ALIASES: dict[str, str] = {}


def register(criterion: Criterion, *aliases: str) -> None:
    """Make a criterion known under its name and, optionally, others."""
    CRITERIA[criterion.name] = criterion
    ALIASES.update(dict.fromkeys(aliases, criterion.name))


def get_criterion(name: str) -> Criterion:
    """The criterion of that name or alias.

    Raises:
        PyPruneError: there is none; the nearest name is suggested.
    """
    name = ALIASES.get(name, name)
    if name not in CRITERIA:
        raise unknown_name("criterion", name, [*CRITERIA, *ALIASES])
    return CRITERIA[name]
