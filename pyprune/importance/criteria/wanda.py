"""Wanda for structures: sum over a unit's input channels j of ||W_:j||^2 * E[x_j^2].

Sun et al. 2024, "A Simple and Effective Pruning Approach for Large Language Models" (arXiv 2306.11695), equation 1,
scores one weight by |W_ij| * ||X_j||_2; this is the sum of its square over the weights of a unit.
"""

import torch
from torch import Tensor

from pyprune.importance.input_scores import InputStatistics
from pyprune.importance.registry import Criterion


def units(weight: Tensor, inputs: InputStatistics, positions: Tensor) -> Tensor:
    """Float64 [outer, units]."""
    power = inputs.squares.to(torch.float64) / max(inputs.rows, 1)
    return (weight.square().sum(0) * power)[positions.to(weight.device)].sum(-1)


CRITERION = Criterion("wanda", "||W_:j||^2 * E[x_j^2] (Sun et al. 2024)", inputs="moments", units=units)
