"""A whole run from one recipe: prune, recover, evaluate, export, report, each stage only when something changed."""

from pyprune.runs.pipeline import run_recipe

__all__ = ["run_recipe"]
