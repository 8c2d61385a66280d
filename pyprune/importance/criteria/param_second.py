"""Second order, element-wise: sum of w^2 * H, H the diagonal of the empirical Fisher matrix.

Ma et al. 2023, "LLM-Pruner" (arXiv 2305.11627), equation 5, second term; the form is Optimal Brain Damage's (LeCun
et al. 1989) with the Hessian replaced by the mean of squared per-sample gradients. The constant 1/2 changes no order,
so it is left out, as in their code.
"""

from pyprune.importance.registry import Criterion

CRITERION = Criterion(
    "param_second", "sum of w^2*H (LLM-Pruner, eq. 5, second term)", "fisher", curvature=True, additive=True
)
