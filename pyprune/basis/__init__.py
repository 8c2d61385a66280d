"""A change of basis before units are chosen: the same model, in coordinates of which few carry most."""

from pyprune.basis.stage import Rebased, change_basis

__all__ = ["Rebased", "change_basis"]
