"""First-order Taylor of a whole slice: |sum of w * G| (Ma et al. 2023, "LLM-Pruner", arXiv 2305.11627, equation 3).

To first order the loss changes by the sum of w * G when a slice is set to zero; the magnitude is taken of that sum.
"""

from pyprune.importance.registry import Criterion

CRITERION = Criterion(
    "vectorize", "|sum of w*G| (LLM-Pruner, eq. 3)", "taylor_signed", gradient=True, additive=True, signed=True
)
