"""Importance: what every unit of a model's groups is worth."""

from pyprune.importance.calibration import Calibration, load_calibration
from pyprune.importance.scores import Scores
from pyprune.importance.scoring import score

__all__ = ["Calibration", "Scores", "load_calibration", "score"]
