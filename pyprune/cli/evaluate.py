"""``pyprune eval``: how good a model is."""

from __future__ import annotations

from typing import Any

import click

from pyprune.cli.options import verb
from pyprune.cli.output import emit, session
from pyprune.config import EvaluationConfig

HELP = """Measure MODEL's perplexity on a text.

The text is tokenised once, without special tokens, and cut into windows that do not overlap; in each window every token
but the first is scored. Figures compare only between equal texts, lengths and numbers of windows.
"""

EXAMPLES = """
Examples:
  pyprune eval MODEL --eval_text test.txt
  pyprune eval MODEL --eval_text test.txt --eval_length 128 --eval_windows 32 --json
  pyprune eval MODEL --prompt "The capital of France is"
"""


def register(cli: click.Group) -> None:
    @verb(cli, EvaluationConfig, "eval", HELP, EXAMPLES)
    def run(flags: dict[str, Any], config: str | None, json: bool, quiet: bool) -> None:
        recipe = EvaluationConfig.build(flags, config)
        from pyprune import pipeline, report

        with session(quiet):
            result = pipeline.evaluate(recipe)
        emit(result, json, lambda: [report.evaluation_table(result)])
