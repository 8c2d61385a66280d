"""From row and column sums of tensors to one number a unit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pyprune.discovery.groups import Group, Member
from pyprune.errors import unknown_name

# [members, outer, units] float64 -> [outer, units]
AGGREGATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(0),
    "mean": lambda x: x.mean(0),
    "max": lambda x: x.amax(0),
    "prod": lambda x: x.log2().sum(0),  # of logarithms: see :func:`to_float32`
    "first": lambda x: x[0],
    "last": lambda x: x[-1],
}


def check_aggregation(name: str) -> str:
    """``name``, when it is known.

    Raises:
        PyPruneError: it is not; the nearest name is suggested.
    """
    if name not in AGGREGATIONS:
        raise unknown_name("aggregation", name, AGGREGATIONS)
    return name


def slice_sums(sums: tuple[Tensor, Tensor], dim: int, ndim: int) -> Tensor:
    """Sum over every slice along ``dim``, float64 [..., size of dim] on the CPU.

    Args:
        sums: rows and columns of one tensor, as :func:`pyprune.ops.salience` returns them; any dimensions in front.
        dim: dimension of the tensor.
        ndim: its number of dimensions, 1 to 3.
    """
    rows, cols = (s.cpu().double() for s in sums)
    if ndim == 3:
        return rows.sum(-1) if dim == 0 else rows.sum(-2) if dim == 1 else cols.sum(-2)
    return rows if dim == 0 else cols


def member_scores(
    member: Member, sums: tuple[Tensor, Tensor], ndim: int, signed: bool, samples: int | None = None
) -> Tensor:
    """Score of each unit in one tensor, float64 [outer, units]: the sum of the slices at the unit's positions.

    With ``samples``, the sums have a leading dimension for them: the mean over samples of the square of a unit's sum.
    """
    values = slice_sums(sums, member.dim, ndim)
    if signed and samples is None:
        values = values.abs()
    units = values[..., torch.from_numpy(member.index.positions().copy())].sum(-1)
    return units if samples is None else units.square().sum(0) / samples


def group_scores(
    group: Group,
    sums: Mapping[str, tuple[Tensor, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    aggregation: str,
    signed: bool,
    samples: int | None = None,
) -> Tensor:
    """Score of each unit, float64 [outer, units] (base-2 logarithms for ``prod``).

    Buffers have nothing to score, and a tensor that is listed under two names counts once.
    For role ``layers`` a unit's members are all parameters of the module, each with the total over the tensor.

    Args:
        sums: tensor name -> row and column sums, in model order.
        shapes: tensor name -> shape.
        signed: whether the sums are signed, so that the magnitude of each slice is taken here.
        samples: of calibration, where the sums are apart for each and their squares count.
    """
    combine = AGGREGATIONS[aggregation]
    if group.role == "layers":
        columns = []
        for module in group.modules:
            found = [rows.cpu().double() for name, (rows, _) in sums.items() if name.startswith(module + ".")]
            if samples is None:
                column = torch.stack([rows.sum() for rows in found]).reshape(-1, 1, 1)
                column = column.abs() if signed else column
            else:
                squares = [rows.flatten(1).sum(1).square().sum() / samples for rows in found]
                column = torch.stack(squares).reshape(-1, 1, 1)
            columns.append(combine(column))
        return torch.cat(columns, dim=1)
    parts = [
        member_scores(member, sums[member.tensor], len(shapes[member.tensor]), signed, samples)
        for member in scored_members(group)
    ]  # fmt: skip
    return combine(torch.stack(parts))


def scored_members(group: Group) -> list[Member]:
    """The members that have something to score, each once."""
    return list(dict.fromkeys(m for m in group.members if m.parameter))


def to_float32(
    values: dict[str, Tensor], roles: Mapping[str, str], aggregation: str
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The scores as float32, and for ``prod`` the power of two that each role's products were divided by.

    A product over many members leaves float32's range easily. Only the order of units of one role matters, so a role
    whose products would leave it is scaled as a whole, by a power of two.
    """
    if aggregation != "prod":
        return {name: v.to(torch.float32) for name, v in values.items()}, {}
    shifts: dict[str, int] = {}
    for role in dict.fromkeys(roles[name] for name in values):
        finite = torch.cat([v[v.isfinite()].reshape(-1) for name, v in values.items() if roles[name] == role])
        if finite.numel() and (finite.max() > 126 or finite.min() < -125):
            # The largest goes to 2^100, which leaves the most room below.
            shifts[role] = math.ceil(float(finite.max())) - 100
    out = {name: torch.exp2(v - shifts.get(roles[name], 0)).to(torch.float32) for name, v in values.items()}
    return out, shifts
