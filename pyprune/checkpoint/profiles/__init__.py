"""Profiles: forms of a checkpoint that other programs open."""

from pyprune.checkpoint.profiles.writing import PROFILES, export, get_profile, save_as

__all__ = ["PROFILES", "export", "get_profile", "save_as"]
