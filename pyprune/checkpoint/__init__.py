"""Checkpoints: folders that other programs open, and opening them."""

from pyprune.checkpoint.load import load, open_model
from pyprune.checkpoint.save import save

__all__ = ["load", "open_model", "save"]
