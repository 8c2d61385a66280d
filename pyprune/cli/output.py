"""What the verbs print: tables or JSON on stdout; progress and warnings on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import click


def emit(data: Any, as_json: bool, tables: Callable[[], Iterable[Any]]) -> None:
    """Print ``data`` as JSON, or the rich renderables that ``tables`` makes."""
    if as_json:
        click.echo(json.dumps(data, indent=2, allow_nan=False))
        return
    from rich.console import Console

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120, highlight=False)
    for part in tables():
        console.print(part)


def tell_unsaved(output_dir: str | None, quiet: bool) -> None:
    """That nothing of a long run will be left, before it begins."""
    if output_dir is None and not quiet:
        click.echo("note: there is no --output_dir: the model will not be saved", err=True)


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
