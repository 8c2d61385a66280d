"""``pyprune env``: what this installation was built with and what it finds."""

from __future__ import annotations

import click

from pyprune.cli.options import add_verb, json_flag

HELP = "Show versions, devices and kernels."

EXAMPLES = """
Examples:
  pyprune env
  pyprune env --json
"""


def register(cli: click.Group) -> None:
    add_verb(cli, "env", _run, [json_flag()], HELP, EXAMPLES)


def _run(json: bool) -> None:
    from pyprune import environment

    facts = environment.collect()
    if json:
        from json import dumps

        click.echo(dumps(facts, indent=2))
    else:
        click.echo(environment.format_text(facts))
