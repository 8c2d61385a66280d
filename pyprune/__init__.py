"""Structural pruning of Hugging Face causal language models.

    out = pyprune.prune("model", ratio=0.2, calibration="text.txt", output_dir="smaller")

or stage by stage: discover -> score -> select -> apply -> save. Nothing is imported before it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyprune import ops
    from pyprune.assess import evaluate
    from pyprune.checkpoint.load import load
    from pyprune.checkpoint.profiles import export
    from pyprune.checkpoint.save import save
    from pyprune.discovery.discover import discover
    from pyprune.discovery.groups import Groups
    from pyprune.errors import PyPruneError
    from pyprune.importance import score
    from pyprune.importance.scores import Scores
    from pyprune.pipeline import prune
    from pyprune.recover_pipeline import recover
    from pyprune.report_pipeline import write_report
    from pyprune.runs.pipeline import run_recipe
    from pyprune.search import search_plan
    from pyprune.selection.layers import select_layers
    from pyprune.selection.plan import Plan
    from pyprune.selection.quantities import measure_budget
    from pyprune.selection.select import select
    from pyprune.surgery.apply import apply

__all__ = [
    "Groups",
    "Plan",
    "PyPruneError",
    "Scores",
    "apply",
    "discover",
    "evaluate",
    "export",
    "load",
    "measure_budget",
    "ops",
    "prune",
    "recover",
    "run_recipe",
    "save",
    "score",
    "search_plan",
    "select",
    "select_layers",
    "write_report",
]

_HOME = {
    "Groups": "pyprune.discovery.groups",
    "Plan": "pyprune.selection.plan",
    "PyPruneError": "pyprune.errors",
    "Scores": "pyprune.importance.scores",
    "apply": "pyprune.surgery",
    "discover": "pyprune.discovery",
    "evaluate": "pyprune.assess",
    "export": "pyprune.checkpoint.profiles",
    "load": "pyprune.checkpoint",
    "measure_budget": "pyprune.selection.quantities",
    "prune": "pyprune.pipeline",
    "recover": "pyprune.recover_pipeline",
    "run_recipe": "pyprune.runs",
    "save": "pyprune.checkpoint",
    "score": "pyprune.importance",
    "search_plan": "pyprune.search",
    "select": "pyprune.selection",
    "write_report": "pyprune.report_pipeline",
    "select_layers": "pyprune.selection.layers",
}


def __getattr__(name: str) -> Any:
    if name == "ops":
        value: Any = import_module("pyprune.ops")
    elif name == "__version__":
        from importlib.metadata import version

        value = version("pyprune")
    elif name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'pyprune' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
