"""What the compensation can be asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from pyprune.discovery.roles import HEADS
from pyprune.errors import PyPruneError, unknown_name
from pyprune.importance.calibration import Calibration
from pyprune.importance.walk import TOKEN_WEIGHTS
from pyprune.selection.plan import Plan

MODES = ("none", "bias", "least-squares", "obs")
TARGETS = ("own", "stream")
SCOPES = ("outputs", "ffn")
REFITS = ("least-squares", "obs")
INSIDE = ("kv_heads", "query_heads", "qk_dim", "vo_dim", "ffn", "expert_ffn", "latent", "state", "channels")


def check_names(mode: str, token_weights: str, target: str, scope: str) -> None:
    """Raises PyPruneError for an unknown name, or a scope or target that the others do not go with."""
    for option, value, known in (
        ("compensation", mode, MODES[1:]), ("token_weights", token_weights, TOKEN_WEIGHTS),
        ("compensation_target", target, TARGETS), ("compensation_scope", scope, SCOPES),
    ):  # fmt: skip
        if value not in known:
            raise unknown_name(option, value, known)
    check_scope(scope, mode, target)


def check_scope(scope: str, mode: str, target: str) -> None:
    """Raises PyPruneError when ``scope`` asks for more than the mode and the target allow, or nothing has a target."""
    if scope == "ffn" and (mode not in REFITS or target != "own"):
        problem = (
            f"does not go with {'compensation ' + mode if mode not in REFITS else 'compensation_target ' + target}"
        )
        raise PyPruneError("compensation_scope", scope, problem, f"Use {' or '.join(REFITS)}, towards the own output.")
    if target != "own" and mode not in REFITS:
        problem = f"is what a refit aims at, and compensation {mode} makes none"
        raise PyPruneError("compensation_target", target, problem, f"Use {' or '.join(REFITS)}, or leave it out.")


def check_plan(plan: Plan, mode: str) -> None:
    """Raises PyPruneError when ``plan`` cuts what no projection can take over for."""
    for cut in plan.cuts:
        if cut.group.role not in INSIDE or not cut.group.exact:
            problem = f"cannot make up for cuts of {cut.group.role}"
            raise PyPruneError("compensation", mode, problem, "Cut heads and FFN channels only, or use none.")


def check_worth(worth: Mapping[str, Any] | None, mode: str, plan: Plan) -> None:
    """Raises PyPruneError when no units are chosen, or there is not one number for each of a group that is cut."""
    if worth is None:
        return
    if mode != "obs":
        problem = f"says which units go, and compensation {mode} takes those of the plan"
        raise PyPruneError("worth", ", ".join(worth), problem, "Use compensation obs, or leave it out.")
    for cut in plan.cuts:
        group, found = cut.group, worth.get(cut.group.name)
        shape = None if found is None else tuple(torch.as_tensor(found).shape)
        if shape not in (None, (group.outer, group.units)):
            problem = f"has shape {list(shape or ())} for [{group.outer}, {group.units}] units"
            raise PyPruneError("worth", group.name, problem, "Score the groups that the plan was made from.")
        if found is not None and not bool(torch.as_tensor(found).isfinite().all()):
            raise PyPruneError("worth", group.name, "holds NaN or infinity", "Score the model anew.")


def judged_roles(roles: Iterable[str], criterion: str) -> list[str]:
    """Those of ``roles`` in whose choice a second criterion has a say: all but heads.

    A say in heads was measured to cost much (docs/experiments.md, "What units are worth").

    Raises:
        PyPruneError: there are none.
    """
    found = [r for r in roles if r not in HEADS]
    if not found:
        problem = "has a say in which channels go; heads are chosen by their layer's output, and nothing else is cut"
        hint = "Name ffn among the roles, or leave it out."
        raise PyPruneError("compensation_criterion", criterion, problem, hint)
    return found


def check_samples(calibration: Calibration, mode: str, gains: bool = False) -> None:
    """Raises PyPruneError when there are too few samples to hold one out."""
    if (mode != "bias" or gains) and calibration.samples < 2:
        hint = "Give more calibration, or split it into samples."
        raise PyPruneError("samples", calibration.samples, "leave none to choose the penalty with", hint)
