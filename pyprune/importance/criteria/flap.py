"""Fluctuation: sum over a unit's input channels j of ||W_:j||^2 * Var(x_j).

An et al. 2024, "Fluctuation-based Adaptive Structured Pruning for Large Language Models" (arXiv 2312.11983), equation
5: what is left of a channel's contribution once its mean has been moved into the bias (``compensation="bias"``).
"""

import torch
from torch import Tensor

from pyprune.importance.input_scores import InputStatistics
from pyprune.importance.registry import Criterion


def units(weight: Tensor, inputs: InputStatistics, positions: Tensor) -> Tensor:
    """Float64 [outer, units]."""
    count = max(inputs.count, torch.finfo(torch.float64).tiny)
    around = inputs.squares.to(torch.float64) - inputs.sums.to(torch.float64).square() / count
    variance = around.clamp_min(0) / max(inputs.rows, 1)
    return (weight.square().sum(0) * variance)[positions.to(weight.device)].sum(-1)


CRITERION = Criterion("flap", "||W_:j||^2 * Var(x_j) (An et al. 2024, eq. 5)", inputs="moments", units=units)
