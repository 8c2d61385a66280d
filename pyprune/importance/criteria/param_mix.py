"""Both orders, element-wise: sum of |w * G - w^2 * H / 2|.

Ma et al. 2023, "LLM-Pruner" (arXiv 2305.11627), equation 5.
"""

from collections.abc import Sequence

from torch import Tensor

from pyprune.importance.registry import Criterion, Sums
from pyprune.ops import salience


def measure(weights: Sequence[Tensor], gradients: Sequence[Tensor] | None, curvatures: Sequence[Tensor] | None) -> Sums:
    return salience("mixed", weights, gradients, curvatures)


CRITERION = Criterion("param_mix", "sum of |w*G - w^2*H/2| (LLM-Pruner, eq. 5)", measure, gradient=True, curvature=True)
