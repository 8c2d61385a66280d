"""Both orders, element-wise: sum of |w * G - w^2 * H / 2|.

Ma et al. 2023, "LLM-Pruner" (arXiv 2305.11627), equation 5.
"""

from pyprune.importance.registry import Criterion

CRITERION = Criterion("param_mix", "sum of |w*G - w^2*H/2| (LLM-Pruner, eq. 5)", "mixed", gradient=True, curvature=True)
