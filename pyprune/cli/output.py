"""What the verbs print: tables or JSON on stdout; progress and warnings on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from pyprune.errors import PyPruneError
from pyprune.stage_options import PageConfig


def emit(data: Any, as_json: bool, tables: Callable[[], Iterable[Any]]) -> None:
    """Print ``data`` as JSON, or the rich renderables that ``tables`` makes."""
    if as_json:
        click.echo(json.dumps(data, indent=2, allow_nan=False))
        return
    from rich.console import Console

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120, highlight=False)
    for part in tables():
        console.print(part)


SAME_COMMAND = "The same command goes on."


def teller(quiet: bool) -> Callable[[str], None]:
    """What shows a line on stderr, or with ``quiet`` leaves it out."""
    return lambda line: None if quiet else click.echo(line, err=True)


def check_answers_shown(page: PageConfig, output_dir: str | None, as_json: bool) -> None:
    """Raises PyPruneError: models shall answer, and neither a folder nor JSON takes the answers."""
    option = "generations" if page.generations else "prompts" if page.prompts is not None else None
    if option is not None and page.generations != 0 and output_dir is None and not as_json:
        problem = "is for the report, which lies in output_dir"
        hint = "Give output_dir too, or leave it out."
        raise PyPruneError(option, getattr(page, option), problem, hint)


@contextmanager
def going_on(how: Callable[[], str | None]) -> Iterator[None]:
    """An interrupt within says how the run goes on, where ``how`` then knows it."""
    try:
        yield
    except KeyboardInterrupt:
        said = how()
        raise KeyboardInterrupt(*([] if said is None else [said])) from None


@contextmanager
def reporting(quiet: bool) -> Iterator[None]:
    """Settings of a run from the command line: whether progress is shown, and how much the libraries may say.

    The libraries report on weights they open, through bars and logs of their own; here that is part of a stage.
    """
    import warnings

    from transformers.utils import logging

    from pyprune import progress

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings(), progress.shown(not quiet):
        warnings.showwarning = _show_warning
        if quiet:
            warnings.simplefilter("ignore")
        yield


def _show_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    """One line, as errors have it, without the place in the code."""
    click.echo("warning: " + " ".join(str(message).split()), err=True)
