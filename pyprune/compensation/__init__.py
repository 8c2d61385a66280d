"""Compensation: what stays of a layer takes over, as far as it can, for what a plan removes."""

from pyprune.compensation.stage import MODES, TARGETS, Compensation, compensate

__all__ = ["MODES", "TARGETS", "Compensation", "compensate"]
