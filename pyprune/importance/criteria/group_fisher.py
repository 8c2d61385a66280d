"""Fisher information of a whole slice: mean over samples of (sum of w * g_b)^2.

Multiplying a slice by a mask m, the loss's gradient with respect to m at m = 1 is the sum of w * g_b, so this is the
empirical Fisher information of the mask: what removing the slice costs to second order (Liu et al. 2021, "Group Fisher
Pruning for Practical Network Compression", arXiv 2108.00708, section 3; for the masks of heads and filters of
transformers Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers", arXiv 2204.09656, section 4).
"""

from pyprune.importance.registry import Criterion

CRITERION = Criterion(
    "group_fisher", "mean over samples of (sum of w*g)^2 (Liu et al. 2021)", "taylor_signed", gradient=True,
    additive=True, signed=True, per_sample=True,
)  # fmt: skip
