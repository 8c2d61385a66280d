"""Discovery: which slices of which tensors must be removed together, found by running the model once."""

from pyprune.discovery.discover import discover
from pyprune.discovery.groups import ROLES, Group, Groups, IndexMap, Lattice, Member

__all__ = ["ROLES", "Group", "Groups", "IndexMap", "Lattice", "Member", "discover"]
