"""The stages of a run as a table."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from pyprune.units import seconds

if TYPE_CHECKING:
    from pyprune.runs.pipeline import RunResult

WORDS = {"run": ("would run", "ran"), "go on": ("would go on", "went on")}


def run_table(result: RunResult) -> Table:
    """A row for each stage: what became of it and why, how long it took, what it found, where that lies."""
    title = f"{result.recipe.file} on {result.recipe.model}"
    table = Table(title=Text(title), title_justify="left", caption_justify="left")
    table.add_column("stage")
    table.add_column("")
    table.add_column("why", overflow="fold")
    table.add_column("took", justify="right")
    table.add_column("result", overflow="fold")
    table.add_column("in", overflow="fold")
    for stage in result.stages:
        word = WORDS.get(stage.action, (stage.action,) * 2)[stage.ran]
        took = seconds(stage.seconds) if stage.seconds else ""
        where = ", ".join(os.path.relpath(p, result.recipe.output_dir) for p in stage.outputs)
        table.add_row(stage.name, word, Text(stage.why), took, Text(stage.result), Text(where))
    table.caption = Text(f"work folder: {result.recipe.output_dir}")
    return table
