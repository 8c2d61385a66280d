"""First-order Taylor, element-wise: sum of |w * G|.

Ma et al. 2023, "LLM-Pruner" (arXiv 2305.11627), equation 5, first term.
"""

from pyprune.importance.registry import Criterion

CRITERION = Criterion("param_first", "sum of |w*G| (LLM-Pruner, eq. 5, first term)", "taylor_abs", gradient=True)
