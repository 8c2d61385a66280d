"""``pyprune score``: what every unit is worth."""

from __future__ import annotations

from typing import Any

import click

from pyprune.cli.options import verb
from pyprune.cli.output import emit, reporting
from pyprune.config import ScoringConfig

HELP = """Score every unit of MODEL.

The scores go into a file that `pyprune prune --scores_file` reads.

Scoring is the long part of pruning; from one file of scores any number of ratios can be tried.
"""

EXAMPLES = """
Examples:
  pyprune score MODEL --calibration train.txt --criterion param_second --output_file scores.safetensors
  pyprune prune MODEL --scores_file scores.safetensors --ratio 0.3 --output_dir smaller
"""


def register(cli: click.Group) -> None:
    @verb(cli, ScoringConfig, "score", HELP, EXAMPLES)
    def run(flags: dict[str, Any], config: str | None, json: bool, quiet: bool) -> None:
        recipe = ScoringConfig.build(flags, config)
        from pyprune import pipeline, report

        with reporting(quiet):
            groups, scores = pipeline.score_model(recipe)
        data = {
            "criterion": scores.criterion,
            "details": scores.details,
            "output_file": recipe.save.output_file,
            "scores": {name: values.tolist() for name, values in scores.items()},
        }
        saved = [] if recipe.save.output_file is None else [f"saved in {recipe.save.output_file}"]
        emit(data, json, lambda: [report.score_table(groups, scores), *saved])
