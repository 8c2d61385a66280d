"""From ``round_to``, ``min_keep`` and ``widths`` to the widths that each group may take."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from math import gcd
from numbers import Integral
from typing import Any

from pyprune.discovery.groups import Group
from pyprune.errors import PyPruneError
from pyprune.selection.allocation import Limits
from pyprune.selection.requests import Amount, parse_amount, parse_amounts, units_of

# What a single round_to speaks of: axes that matrix products run over, not numbers of heads, experts or layers.
CHANNEL_ROLES = ("ffn", "expert_ffn", "latent", "state", "hidden", "channels")

GROUPED_STEP = 8
"""Grouped products of stacked experts refuse rows that are no multiple of 16 bytes: 8 numbers of 16 bits."""

Members = Mapping[str, Sequence[Group]]


def rounding_steps(
    round_to: int | Mapping[str, int] | None, members: Members, shapes: Mapping[str, Sequence[int]],
    exact: Collection[str] = (),
) -> dict[str, int]:  # fmt: skip
    """Role -> multiple, for the roles that are rounded.

    Channels inside stacked experts are rounded to :data:`GROUPED_STEP` where nothing is said about them.

    Args:
        shapes: tensor -> shape; an expert matrix of three dimensions is a stacked one.
        exact: roles whose widths are given as numbers, which are taken at their word.

    Raises:
        PyPruneError: not an integer of at least 1, a role that is not cut, a multiple larger than a group.
    """
    steps = _asked_steps(round_to, members)
    stacked = [g for g in members.get("expert_ffn", ()) if any(len(shapes[m.tensor]) == 3 for m in g.members)]
    step = gcd(GROUPED_STEP, *(g.units for g in stacked))
    if stacked and step > 1 and "expert_ffn" not in {*steps, *exact}:
        steps["expert_ffn"] = step
    return steps


def _asked_steps(round_to: int | Mapping[str, int] | None, members: Members) -> dict[str, int]:
    if round_to is None:
        return {}
    if isinstance(round_to, Mapping):
        _only_cut("round_to", round_to, members)
        steps = {role: _multiple(step, role) for role, step in round_to.items()}
    else:
        step = _multiple(round_to)
        steps = {role: step for role in members if role in CHANNEL_ROLES}
        if not steps:
            problem = f"a single number rounds channels, and only {', '.join(members)} are cut"
            raise PyPruneError("round_to", round_to, problem, f'Give it by role, as {{"{next(iter(members))}": 2}}.')
    for role, step in steps.items():
        smallest = min(members[role], key=lambda g: g.units)
        if step > smallest.units:
            problem = f"{smallest.name} has only {smallest.units} units"
            raise PyPruneError("round_to", round_to, problem, "Give a smaller multiple.")
    return steps


def group_limits(
    members: Members,
    steps: Mapping[str, int],
    min_keep: Mapping[str, Amount],
    defaults: Mapping[str, float],
    protected: Mapping[str, Sequence[int]],
) -> dict[str, Limits]:
    """Group name -> the widths it may take.

    Args:
        members: role -> groups to cut.
        steps: role -> multiple.
        min_keep: role -> what the user wants to stay.
        defaults: role -> fraction that stays where ``min_keep`` says nothing.
        protected: group name -> units that must stay.

    Raises:
        PyPruneError: ``min_keep`` is more than a group has.
    """
    out = {}
    for role, groups in members.items():
        for group in groups:
            least = units_of(min_keep.get(role, defaults.get(role, 1)), group.units)
            if least > group.units:
                problem = f"{group.name} has only {group.units} units"
                raise PyPruneError("min_keep", min_keep[role], problem, 'Give it by role, as {"ffn": 64}.')
            out[group.name] = Limits(
                group.units, max(least, len(protected[group.name]), group.min_units), steps.get(role, 1)
            )
    return out


def least_by_role(min_keep: Amount | Mapping[str, Amount] | None, members: Members) -> dict[str, Amount]:
    """Role -> what the user wants to stay; a single amount is for every role.

    Raises:
        PyPruneError: not an amount, or for a role that is not cut.
    """
    if min_keep is None:
        return {}
    if isinstance(min_keep, Mapping):
        _only_cut("min_keep", min_keep, members)
        return parse_amounts("min_keep", min_keep)
    return dict.fromkeys(members, parse_amount("min_keep", min_keep))


def fixed_widths(
    groups: Sequence[Group], amount: Amount, limits: Mapping[str, Limits], least: Amount | None
) -> tuple[dict[str, int], dict[str, Limits]]:
    """What ``widths`` asks of one role: group name -> units, and limits that allow it.

    A fraction is rounded to the nearest allowed width. ``least`` is the user's ``min_keep`` for the role.

    Raises:
        PyPruneError: more units than there are, fewer than must stay, or no multiple of ``round_to``.
    """
    role = groups[0].role
    widths, allowed = {}, dict(limits)
    for group in groups:
        limit, wanted = limits[group.name], units_of(amount, group.units)
        if wanted > group.units:
            problem = f"{group.name} has only {group.units} units"
            raise PyPruneError("widths", {role: amount}, problem, "Ask for at most that, or for a fraction.")
        if least is not None and wanted < units_of(least, group.units):
            raise PyPruneError("widths", {role: amount}, f"contradicts min_keep {least}", "Change one of the two.")
        if role == "layers" and wanted < limit.floor:
            problem = f"{limit.floor} layers lie outside layers= and stay"
            raise PyPruneError("widths", {role: amount}, problem, f"Keep at least {limit.floor}, or widen layers=.")
        if wanted < group.min_units:
            problem = f"{group.name} cannot do with fewer than {group.min_units} units"
            raise PyPruneError("widths", {role: amount}, problem, f"Keep at least {group.min_units}.")
        limit = replace(limit, floor=min(limit.floor, wanted))
        if isinstance(amount, int) and limit.nearest(wanted) != wanted:
            problem = f"is no multiple of round_to {limit.step}"
            raise PyPruneError("widths", {role: amount}, problem, f"{limit.nearest(wanted)} is the nearest that is.")
        allowed[group.name] = limit
        widths[group.name] = limit.nearest(wanted)
    return widths, allowed


def _multiple(step: Any, role: str = "") -> int:
    if not isinstance(step, Integral) or isinstance(step, bool) or step < 1:
        where = f" for {role}" if role else ""
        raise PyPruneError("round_to", step, f"is no positive integer{where}", "Give a multiple, as 128.")
    return int(step)


def _only_cut(option: str, by_role: Mapping[str, Any], members: Members) -> None:
    for role in by_role:
        if role not in members:
            raise PyPruneError(
                option, dict(by_role), f"{role} is not among the roles to cut", f"Those are: {', '.join(members)}."
            )
