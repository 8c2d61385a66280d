"""Surgery: a plan becomes a dense, smaller model of the same class."""

from pyprune.surgery.apply import apply

__all__ = ["apply"]
