"""Fisher information of a unit at single tokens: mean over tokens of (sum over its inputs of x * dx)^2.

With a mask m_t on what a unit hands to the layer that reads it at token t, the gradient of a text's summed loss with
respect to m_t at 1 is z_t = sum over the unit's inputs of x_t * dx_t. With labels that the model itself draws, the mean
of z_t^2 is the Fisher information of m_t, which is the curvature of the divergence from the model as it is (Kunstner et
al. 2019, "Limitations of the Empirical Fisher Approximation", arXiv 1905.12558, section 2): what the unit's removal
costs to second order, tokens taken for independent. The masks are those of Kwon et al. 2022 (arXiv 2204.09656, section
4) for a token alone: there are as many of them as tokens, and so their mean is known better than that of whole samples.
"""

from pyprune.importance.registry import Criterion

CRITERION = Criterion("token_fisher", "mean over tokens of (sum of x*dx)^2 (Kwon et al. 2022)", tokens=True)
