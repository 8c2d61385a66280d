"""Compensation: what stays of a layer takes over, as far as it can, for what a plan removes."""

from pyprune.compensation.gains import Gains, Reference, fit_gains, reference
from pyprune.compensation.stage import Compensation, compensate

__all__ = ["Compensation", "Gains", "Reference", "compensate", "fit_gains", "reference"]
