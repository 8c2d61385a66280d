"""First-order Taylor, element-wise: sum of |w * G|.

Ma et al. 2023, "LLM-Pruner" (arXiv 2305.11627), equation 5, first term.
"""

from collections.abc import Sequence

from torch import Tensor

from pyprune.importance.registry import Criterion, Sums
from pyprune.ops import salience


def measure(weights: Sequence[Tensor], gradients: Sequence[Tensor] | None, curvatures: Sequence[Tensor] | None) -> Sums:
    return salience("taylor_abs", weights, gradients)


CRITERION = Criterion("param_first", "sum of |w*G| (LLM-Pruner, eq. 5, first term)", measure, gradient=True)
