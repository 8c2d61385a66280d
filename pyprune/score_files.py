"""Files of scores: written by ``pyprune score``, read by ``pyprune prune``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError

from pyprune.config import PruneConfig
from pyprune.errors import PyPruneError
from pyprune.files import whole_file
from pyprune.importance.registry import ALIASES, CRITERIA
from pyprune.importance.scores import Scores
from pyprune.stage_options import ScoreConfig, ScoreFileConfig


def check_file(config: ScoreFileConfig) -> None:
    """The output file may be written."""
    if config.output_file is None:
        return
    path = Path(config.output_file)
    if path.is_dir():
        raise PyPruneError("output_file", str(path), "is a folder", "Name a file, such as scores.safetensors.")
    if path.exists() and not config.overwrite:
        raise PyPruneError("output_file", str(path), "exists already", "Set overwrite, or name another file.")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise PyPruneError("output_file", str(path), f"cannot be made in {path.parent}", "Name a folder that is there.")


def read_scores(file: str) -> Scores:
    """Scores from a file of ``pyprune score``.

    Raises:
        PyPruneError: there is no such file, or it is not one of scores.
    """
    hint = "Make one with `pyprune score --output_file`."
    try:
        return Scores.load(file)
    except FileNotFoundError:
        raise PyPruneError("scores_file", file, "is not there", hint) from None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        raise PyPruneError("scores_file", file, "is not a file of scores", hint) from None


def scores_of(recipe: PruneConfig) -> tuple[PruneConfig, Scores | None]:
    """The scores in the recipe's file, None where it names none, and the recipe as it is with their criterion.

    Raises:
        PyPruneError: the file cannot be read, or holds scores of another criterion than the one that is asked for.
    """
    file, asked = recipe.select.scores_file, recipe.score.criterion
    if file is None:
        return recipe, None
    scores = read_scores(file)
    if asked != ScoreConfig().criterion and ALIASES.get(asked, asked) != scores.criterion:
        problem = f"is another criterion than that of the scores in {file}, {scores.criterion}"
        raise PyPruneError("criterion", asked, problem, "Leave criterion out, or score anew.")
    if scores.criterion not in CRITERIA:  # somebody's own: no recipe could name it
        return recipe, scores
    return replace(recipe, score=replace(recipe.score, criterion=scores.criterion)), scores


@contextmanager
def blamed_on(file: str | None) -> Iterator[None]:
    """Errors about scores name the file that they came from, where they came from one."""
    try:
        yield
    except PyPruneError as error:
        if file is None or error.option != "scores":
            raise
        hint = "Make one of this model, with these roles: pyprune score --output_file."
        raise PyPruneError("scores_file", file, error.problem, hint) from error


def write_scores(scores: Scores, file: str) -> None:
    """Save scores; the file appears complete or not at all."""
    try:
        with whole_file(Path(file)) as work:
            scores.save(work)
    except OSError as error:
        raise PyPruneError("output_file", file, f"cannot be written: {error.strerror}", "Free some space.") from error
