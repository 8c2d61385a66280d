"""Profiles: forms of a checkpoint that other programs open."""

from pyprune.checkpoint.profiles.writing import (
    PROFILES,
    check_fits,
    export,
    finish,
    get_profile,
    own_profile,
    save_as,
)

__all__ = ["PROFILES", "check_fits", "export", "finish", "get_profile", "own_profile", "save_as"]
