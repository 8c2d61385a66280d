"""What earlier evaluations say about moves that were not evaluated: a Bayesian linear model of the log divergence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LATEST = 300  # observations that are read
NOISE = 0.3  # of the spread of observed changes: what a linear model of a curved function leaves


def sample_slopes(
    points: Sequence[Sequence[float]], logs: Sequence[float], base: int, rng: np.random.Generator
) -> np.ndarray | None:
    """Slopes of the log divergence, one a group, drawn from the posterior (Thompson sampling); None without evidence.

    Model: log KL(x) - log KL(x_base) = b . (x - x_base) + noise, with b ~ N(0, tau^2), tau from the mean slope seen.
    Far points weigh less: the noise grows with their distance.

    Args:
        points: what fraction of each group was kept, [observations, groups].
        logs: the log divergences.
        base: number of the observation that moves start from.
    """
    x = np.asarray(points[-LATEST:], np.float64) - np.asarray(points[base], np.float64)
    y = np.asarray(logs[-LATEST:], np.float64) - logs[base]
    distance = np.sqrt((x**2).sum(1))
    use = (distance > 0) & np.isfinite(y)
    if use.sum() < 3:
        return None
    x, y, distance = x[use], y[use], distance[use]
    slope = float((y**2).sum() / (x**2).sum())  # tau^2
    if slope <= 0:
        return None
    near = np.median(distance)
    noise = NOISE * np.sqrt(slope) * near * np.maximum(1.0, (distance / near) ** 2)
    scaled, goal = x / noise[:, None], y / noise
    precision = scaled.T @ scaled + np.eye(x.shape[1]) / slope
    factor = np.linalg.cholesky(precision)
    mean = np.linalg.solve(precision, scaled.T @ goal)
    draw: np.ndarray = mean + np.linalg.solve(factor.T, rng.standard_normal(len(mean)))
    return draw
