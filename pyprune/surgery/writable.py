"""Whether a configuration survives being saved: some classes check sizes when they are made and refuse new ones."""

from __future__ import annotations

import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pyprune import families
from pyprune.errors import PyPruneError
from pyprune.surgery import narrow, resize, skip
from pyprune.surgery.decoder import text_config

Config = Any


def refusal(config: Config) -> str | None:
    """Why ``config`` cannot be read back once written; None when it can."""
    try:
        with TemporaryDirectory() as folder:
            config.to_json_file(Path(folder) / "config.json")
            type(config).from_pretrained(folder)
    except Exception as error:  # configuration classes validate themselves with any exception
        cause = error.__cause__ or error
        return " ".join(str(cause).split()).rstrip(".")
    return None


def stand_in(config: Config) -> tuple[type, Config] | None:
    """Another class and configuration for the same network, where the family has one."""
    family = families.find(text_config(config))
    found = None if family is None or family.stand_in is None else family.stand_in(config)
    if found is not None:
        for kind in (narrow, resize, skip):
            if spec := kind.spec_of(config):
                setattr(found[1], kind.FIELD, copy.deepcopy(spec))
    return found


def saved_as(model: Any) -> tuple[type, Config, str] | None:
    """What a model is saved as, where its own configuration class refuses it: class, configuration, and a sentence for
    the user. None where it is saved as it is.

    Raises:
        PyPruneError: nothing that there is computes the same.
    """
    problem = refusal(model.config)
    if problem is None:
        return None
    name, other = type(model).__name__, stand_in(model.config)
    if other is None:
        raise PyPruneError("model", name, f"has a configuration that {type(model.config).__name__} refuses: {problem}")
    return *other, f"{name} cannot be saved as it is ({problem}); saved as {other[0].__name__}, the same network."


def can_be_saved(config: Config) -> bool:
    """Whether ``config``, or its stand-in, can be written and read again."""
    return refusal(config) is None or stand_in(config) is not None


def check_writable(config: Config) -> None:
    """Raises PyPruneError: a model of this configuration cannot be saved."""
    if not can_be_saved(config):
        problem = f"would hold a configuration that {type(config).__name__} refuses: {refusal(config)}"
        hint = "Choose other widths or roles (round_to rounds widths), or leave it out and keep the model in memory."
        raise PyPruneError("output_dir", None, problem, hint)
