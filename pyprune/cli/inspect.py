"""``pyprune inspect``: what can be removed together."""

from __future__ import annotations

from typing import Any

import click

from pyprune.cli.options import verb
from pyprune.cli.output import emit, reporting
from pyprune.config import InspectConfig

HELP = """Show what can be removed together in MODEL.

Only the configuration is needed; no weights are read.

Each row is a set of coupled slices: removing one unit removes the same positions of every member.
"""

EXAMPLES = """
Examples:
  pyprune inspect MODEL
  pyprune inspect MODEL --json > groups.json
"""


def register(cli: click.Group) -> None:
    @verb(cli, InspectConfig, "inspect", HELP, EXAMPLES)
    def run(flags: dict[str, Any], config: str | None, json: bool, quiet: bool) -> None:
        recipe = InspectConfig.build(flags, config)
        from pyprune import pipeline, report

        with reporting(quiet):
            name, groups = pipeline.inspect_model(recipe)
        model = f"{recipe.model.model_name_or_path} ({name})"
        data = {"model": recipe.model.model_name_or_path, "model_class": name, **report.groups_dict(groups)}
        emit(data, json, lambda: report.group_tables(groups, model))
