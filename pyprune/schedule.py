"""What is asked of ``select`` and of a search: in several steps so that the last one lands exactly on what the user
asked."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from math import ceil
from pathlib import Path
from typing import Any

import torch

from pyprune.config import PruneConfig
from pyprune.discovery.groups import Groups
from pyprune.discovery.roles import INSIDE_HEADS
from pyprune.errors import PyPruneError
from pyprune.selection.allocation import ALLOCATIONS
from pyprune.selection.requests import units_of
from pyprune.selection.select import select
from pyprune.stage_options import SelectConfig


def requests(config: SelectConfig, dense: Groups) -> Iterator[dict[str, Any]]:
    """Arguments of ``select`` for every step.

    Sizes and widths fall linearly from the dense model's to what was asked. From the second step on ``select`` sees a
    smaller model, so everything is given in absolute terms of the dense one: parameters left, units left.

    Args:
        config: what was asked.
        dense: groups of the model before the first step.

    Raises:
        PyPruneError: several steps with amounts that are not the same number of units in every layer, or with a ratio
            that is out of reach.
    """
    common = {
        "allocation": config.allocation,
        "roles": config.roles,
        "layers": config.layers,
        "round_to": config.round_to,
        "count_embeddings": config.count_embeddings,
    }
    count = config.iterative_steps
    if count == 1:
        amounts = {"widths": config.widths, "min_keep": config.min_keep}
        yield {"ratio": config.ratio, "target_params": config.target_params, **amounts, **common}
        return
    if config.widths is not None and config.allocation != "uniform":
        raise PyPruneError("iterative_steps", count, f"widths with allocation {config.allocation} are cut in one step")
    roles = {*(config.roles or ()), *(config.widths or ())}
    inside = roles.intersection(INSIDE_HEADS)
    if inside:  # few configurations express them, so that surgery may leave narrow linear layers
        problem = f"{' and '.join(sorted(inside))} may leave layers that cannot be cut again"
        raise PyPruneError("iterative_steps", count, problem, "Leave them out, or use iterative_steps 1.")
    if config.layers is not None and "layers" in roles:
        problem = "whole layers out of some layers are removed in one step"
        raise PyPruneError("iterative_steps", count, problem, "Leave layers out, or use iterative_steps 1.")
    total = dense.num_parameters(config.count_embeddings)
    final = config.target_params
    if config.ratio is not None:
        # The steps ask in parameters; what cannot be reached is said in the ratio's terms.
        amounts = {"widths": config.widths, "min_keep": config.min_keep}
        select(dense, equal_scores(dense), **without_scores({"ratio": config.ratio, **amounts, **common}))
        final = total - round(config.ratio * total)
    least = _in_units("min_keep", config.min_keep, dense)
    for step in range(1, count + 1):
        out = {"min_keep": least, **common}
        if final is not None:
            out["target_params"] = total - (total - final) * step // count
        if config.widths is not None:
            out["widths"] = {
                role: units - (units - _width(amount, units)) * step // count
                for role, amount in config.widths.items()
                for units in [_units("widths", role, dense)]
            }
        yield out


def without_scores(request: Mapping[str, Any]) -> dict[str, Any]:
    """A request to try before anything is measured: an allocation that gives layers widths of their own, from scores or
    with the model, is taken for one that needs neither."""
    asked, tried = ALLOCATIONS.get(request["allocation"]), ALLOCATIONS["log_depth"]
    alike = asked is not None and (asked.by_layer, asked.min_keep) == (tried.by_layer, tried.min_keep)
    return {**request, "allocation": tried.name} if alike else dict(request)


def equal_scores(groups: Groups) -> dict[str, torch.Tensor]:
    """Scores that prefer nothing, to try a request with."""
    return {g.name: torch.zeros(g.outer, g.units) for g in groups.prunable()}


def search_options(recipe: PruneConfig, request: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of :func:`pyprune.search.search_plan` for a request."""
    return {
        **request,
        "compensation": recipe.compensate.compensation,
        "token_weights": recipe.score.token_weights,
        "steps": recipe.search.search_steps,
        "minutes": recipe.search.search_minutes,
        "seed": recipe.calibration.seed,
        "cache": recipe.score.cache,
        "overwrite": recipe.save.overwrite,
    }


def search_file(recipe: PruneConfig) -> Path | None:
    """Where a search keeps its state: as asked, else beside the output, else nowhere."""
    if recipe.search.search_file is not None:
        return Path(recipe.search.search_file)
    if recipe.save.output_dir is None:
        return None
    target = Path(recipe.save.output_dir).expanduser().absolute()
    return target.parent / f".{target.name}.search.json"


def forget_search(recipe: PruneConfig) -> None:
    """Remove the state of a search that lies beside an output which is complete now."""
    file = search_file(recipe)
    if file is not None and recipe.search.search_file is None:
        for path in file.parent.glob(f"{glob.escape(file.name)}*"):
            path.unlink(missing_ok=True)


def _in_units(option: str, amount: Any, groups: Groups) -> Any:
    """A fraction as units of the dense model, which stays right when the model shrinks."""
    if isinstance(amount, Mapping):
        return {role: _in_units_of(option, role, a, groups) for role, a in amount.items()}
    if isinstance(amount, float):
        return {role: _in_units_of(option, role, amount, groups) for role in groups.roles()}
    return amount


def _in_units_of(option: str, role: str, amount: int | float, groups: Groups) -> int:
    return ceil(amount * _units(option, role, groups)) if isinstance(amount, float) else amount


def _width(amount: int | float, units: int) -> int:
    return min(units, units_of(amount, units))


def _units(option: str, role: str, groups: Groups) -> int:
    found = {g.units for g in groups if g.role == role and g.prunable}
    if len(found) > 1:
        problem = f"{role} has different numbers of units in different layers, which several steps cannot share"
        raise PyPruneError(option, None, problem, "Use iterative_steps 1, or a ratio.")
    return found.pop() if found else 1
