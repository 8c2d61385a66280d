"""The command line that repeats a run, from its recipe."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from pyprune.config import Recipe

FIRST = "model_name_or_path"


def command(verb: str, recipe: type[Recipe], values: Mapping[str, Any], file: str) -> str:
    """``pyprune verb MODEL --option value ...`` with all that differs from the defaults.

    What a flag cannot say (a list of prompts) is left to the recipe file, which is named then.

    Args:
        recipe: the verb's recipe.
        values: option name -> plain value, as :meth:`Recipe.to_dict` gives it; unknown names are left out.
        file: the recipe's file.
    """
    words, incomplete = ["pyprune", verb], False
    if values.get(FIRST):
        words.append(str(values[FIRST]))
    usual = _usual(recipe, values)
    for _, f in recipe.options():
        value = values.get(f.name)
        if f.name == FIRST or value is None or value == usual[f.name]:
            continue
        if f.metadata["parse"].flag:
            words.append(f"--{f.name}" if value else f"--no_{f.name}")
        elif f.name == "prompts" and not isinstance(value, str):
            incomplete = True
        else:
            words += [f"--{f.name}", _text(value)]
    if incomplete:
        words += ["--config", file]
    return " ".join(shlex.quote(word) for word in words)


def _usual(recipe: type[Recipe], values: Mapping[str, Any]) -> dict[str, Any]:
    """What options have that are not named: the defaults, and what the method brings along where one is taken."""
    if values.get("method") is None or "method" not in {f.name for _, f in recipe.options()}:
        return recipe().to_dict()
    usual = recipe.build({"method": values["method"]}).to_dict()
    named = {k: v for k, v in values.items() if k in usual and v is not None and v != usual[k] and k != "prompts"}
    if recipe.build(named).to_dict()["method"] != values["method"]:
        usual["method"] = None
    return usual


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ",".join(f"{k}={v}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ",".join(str(v) for v in value)
    return str(value)
