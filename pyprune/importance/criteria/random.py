"""Random scores: the control that every criterion has to beat."""

import torch
from torch import Tensor

from pyprune.discovery.groups import Group
from pyprune.importance.registry import Criterion


def draw(group: Group, generator: torch.Generator) -> Tensor:
    """Uniform in [0, 1), float32 [outer, units]."""
    return torch.rand(group.outer, group.units, generator=generator)


CRITERION = Criterion("random", "uniform in [0, 1); a control", draw=draw)
