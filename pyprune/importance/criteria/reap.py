"""Router-weighted expert activation: the mean over an expert's tokens of gate * ||expert's output||.

    S_e = 1 / |X_e| * sum over x in X_e of g_e(x) * ||f_e(x)||_2,   X_e the tokens that are routed to expert e

Lasby et al. 2025, "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression" (arXiv 2510.13999).
The gates are those that the model multiplies by: normalised over the chosen experts where its router does that.
"""

from pyprune.importance.registry import Criterion

CRITERION = Criterion("reap", "mean over routed tokens of gate * ||output|| (Lasby et al. 2025)", experts=True)
