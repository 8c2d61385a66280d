"""``pyprune report``: the page of a checkpoint."""

from __future__ import annotations

from typing import Any

import click

from pyprune.cli.options import verb
from pyprune.cli.output import emit, reporting
from pyprune.config import ReportingConfig

HELP = """Show a pruned checkpoint on one page.

MODEL is a folder that prune or recover wrote. The page, report.html in that folder, is made of what lies there: what
was asked and done, widths and importance of every layer, perplexity, samples, recipes. It needs no network and no
scripts.

Results of `pyprune eval --output` join it: those named pyprune_eval*.json in the folder, and those given with --eval.
Models are opened only for --generations or --prompts, for answers that are not stored.
"""

EXAMPLES = """
Examples:
  The page of a folder, written anew:
    pyprune report smaller

  With task accuracy and speed of the dense and the pruned model:
    pyprune eval smaller --compare MODEL --tasks piqa.jsonl --speed --output smaller/pyprune_eval.json
    pyprune report smaller

  Dense, pruned and recovered model side by side, with what they say after five prompts:
    pyprune report smaller --dense MODEL --recovered recovered --generations 5 --output whole.html
"""


def register(cli: click.Group) -> None:
    @verb(cli, ReportingConfig, "report", HELP, EXAMPLES)
    def run(flags: dict[str, Any], config: str | None, json: bool, quiet: bool) -> None:
        recipe = ReportingConfig.build(flags, config)
        from rich.text import Text

        from pyprune import report_pipeline

        with reporting(quiet):
            file = report_pipeline.run(recipe)
        emit({"output": str(file)}, json, lambda: [Text(f"written to {file}")])
