"""``pyprune env``: what this installation was built with and what it finds."""

from __future__ import annotations

import click

from pyprune.cli.options import verb

HELP = "Show versions, devices and kernels."

EXAMPLES = """
Examples:
  pyprune env
  pyprune env --json
"""


def register(cli: click.Group) -> None:
    @verb(cli, None, "env", HELP, EXAMPLES)
    def run(json: bool) -> None:
        from pyprune import environment

        facts = environment.collect()
        if json:
            from json import dumps

            click.echo(dumps(facts, indent=2))
        else:
            click.echo(environment.format_text(facts))
