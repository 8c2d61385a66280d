"""Groups: what is coupled in a model, as data.

A *group* is a set of interchangeable *units* (KV heads, FFN channels, ...). Removing unit ``u`` removes the same
positions of every *member*, a member being one dimension of one parameter or buffer. Where a unit's positions lie is an
:class:`IndexMap`, stored as a few integers however large the tensor is.

Nothing here knows a model family, a framework's module classes, or how groups were found.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np

ROLES = (
    "kv_heads",  # KV heads together with the query heads that read them
    "query_heads",  # query heads inside each KV head, the same number in each
    "qk_dim",  # the dimensions that queries and keys are compared in (rotary pairs stay together)
    "vo_dim",  # the dimensions that values carry to the attention output
    "ffn",  # FFN channels
    "experts",
    "expert_ffn",  # FFN channels inside experts
    "latent",  # compressed dimensions between two projections (multi-head latent attention)
    "state",  # state-space channels
    "hidden",  # the residual stream
    "layers",  # whole decoder layers
    "vocab",
    "channels",  # anything else that is coupled
)


@dataclass(frozen=True)
class Lattice:
    """Positions ``offset + o*outer_stride + u*unit_stride + sum_i s_i*stride_i`` for all ``s_i`` in ``range(count_i)``.

    ``spread`` holds the ``(count, stride)`` pairs: the positions that one unit occupies.
    """

    offset: int
    outer_stride: int
    unit_stride: int
    spread: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class IndexMap:
    """From unit to positions along one dimension of a tensor.

    Attributes:
        outer: independent copies of the axis (1 unless units are chosen separately in each: query heads in KV heads).
        units: units in each copy.
        terms: the lattices whose union is a unit's position set; disjoint.
    """

    outer: int
    units: int
    terms: tuple[Lattice, ...]

    def positions(self) -> np.ndarray:
        """Int64 array [outer, units, k], ascending along ``k``; read-only and cached."""
        return _positions(self)

    @property
    def width(self) -> int:
        """Positions per unit (``k``)."""
        total = 0
        for term in self.terms:
            size = 1
            for count, _ in term.spread:
                size *= count
            total += size
        return total


@lru_cache(maxsize=256)
def _positions(index: IndexMap) -> np.ndarray:
    parts = []
    o = np.arange(index.outer, dtype=np.int64)[:, None, None]
    u = np.arange(index.units, dtype=np.int64)[None, :, None]
    for term in index.terms:
        inner = np.zeros(1, dtype=np.int64)
        for count, stride in term.spread:
            inner = (inner[:, None] + np.arange(count, dtype=np.int64) * stride).reshape(-1)
        parts.append(term.offset + o * term.outer_stride + u * term.unit_stride + inner)
    out = np.sort(np.concatenate(parts, axis=-1), axis=-1)
    out.setflags(write=False)
    return out


@dataclass(frozen=True)
class Member:
    """One dimension of one tensor that a group cuts.

    Attributes:
        tensor: dotted name, as in ``model.named_parameters()`` / ``named_buffers()`` (tied tensors: the first name).
        dim: the dimension, non-negative.
        index: where each unit lies along it.
        parameter: False for a buffer (nothing to score, still to be sliced).
        size: of the whole dimension, positions that belong to no unit of the group included; None where it is not said.
    """

    tensor: str
    dim: int
    index: IndexMap
    parameter: bool = True
    size: int | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Group:
    """Units that can be removed, and everything that goes with each of them.

    Attributes:
        name: unique in the model and stable between runs: ``"<module>:<role>"``, numbered where one module has several.
        role: one of :data:`ROLES`.
        module: dotted path of the smallest module that holds all members ("" is the model).
        layer: index of the decoder layer, or None when the group spans several or lies outside.
        units: units in each of ``outer`` copies; the same number is kept in every copy.
        outer: independent copies.
        within: name of the group whose units are the copies, or None.
        members: what is cut. Empty for role ``layers``, whose units are the modules ``modules``, and for ``sublayers``,
            a role of plans alone: the attention or the FFN of every decoder layer.
        exact: removing a unit equals zeroing it. False where a normalisation runs over the axis.
        frozen: why the group cannot be pruned (op, module, parameter), or None.
        modules: for roles ``layers`` and ``sublayers``: the module paths, one a unit.
        table: frozen for one reason only: the model computes values by position along the axis (ALiBi slopes). Who
            keeps for every unit the value that it had may prune the group (:meth:`Groups.thaw`).
        min_units: units that must stay in every copy: a router that chooses the best ``k`` experts needs ``k``.
    """

    name: str
    role: str
    module: str
    layer: int | None
    units: int
    members: tuple[Member, ...]
    outer: int = 1
    within: str | None = None
    exact: bool = True
    frozen: str | None = None
    modules: tuple[str, ...] = ()
    min_units: int = 1
    table: bool = False

    @property
    def prunable(self) -> bool:
        return self.frozen is None

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            "name": self.name, "role": self.role, "module": self.module, "layer": self.layer, "units": self.units,
            "outer": self.outer, "within": self.within, "exact": self.exact, "frozen": self.frozen,
            "min_units": self.min_units, "members": [_member_to_dict(m) for m in self.members],
        }  # fmt: skip
        if self.table:
            out["table"] = True
        if self.modules:
            out["modules"] = list(self.modules)
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Group:
        values = dict(data)
        values["members"] = tuple(_member_from_dict(m, data["outer"], data["units"]) for m in data["members"])
        values["modules"] = tuple(data.get("modules", ()))
        return cls(**values)


def _member_to_dict(member: Member) -> dict[str, Any]:
    terms = [[t.offset, t.outer_stride, t.unit_stride, [list(s) for s in t.spread]] for t in member.index.terms]
    size = {} if member.size is None else {"size": member.size}
    return {"tensor": member.tensor, "dim": member.dim, **size, "parameter": member.parameter, "terms": terms}


def _member_from_dict(data: Mapping[str, Any], outer: int, units: int) -> Member:
    terms = tuple(Lattice(o, a, b, tuple((int(c), int(s)) for c, s in spread)) for o, a, b, spread in data["terms"])
    index = IndexMap(outer, units, terms)
    return Member(data["tensor"], int(data["dim"]), index, bool(data["parameter"]), data.get("size"))


def _runs(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows that differ in nothing but digits of their names, together, in order of first appearance."""
    out: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        texts = tuple(re.sub(r"\d+", "#", row[k] or "") for k in ("name", "frozen"))
        out.setdefault((*texts, row["units"], row["outer"], row["parameters_per_unit"], row["exact"]), []).append(row)
    return list(out.values())


@dataclass
class Groups:
    """Every group of a model, in model order, with the tensors they speak of.

    Attributes:
        groups: prunable and frozen ones.
        shapes: tensor name -> shape, for every parameter and buffer of the model (tied ones once).
        parameters: names in ``shapes`` that are parameters.
        embeddings: parameter names that are token or position embeddings or the output head (what
            ``count_embeddings=False`` leaves out).
        tied: other names of tied tensors -> the name used here.
        warnings: ops without a rule and other facts the user should see, once each.
    """

    groups: list[Group]
    shapes: dict[str, tuple[int, ...]]
    parameters: frozenset[str]
    embeddings: frozenset[str] = frozenset()
    tied: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, name: str) -> Group:
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(f"no group named {name!r}")

    def prunable(
        self, roles: Iterable[str] | None = None, layers: Iterable[int] | None = None, exact: bool | None = None
    ) -> list[Group]:
        """The groups that are not frozen, of these roles, in these decoder layers."""
        role_set = None if roles is None else set(roles)
        layer_set = None if layers is None else set(layers)
        return [
            g
            for g in self.groups
            if g.prunable
            and (role_set is None or g.role in role_set)
            and (layer_set is None or g.layer in layer_set)
            and (exact is None or g.exact == exact)
        ]

    def thaw(self, roles: Iterable[str]) -> Groups:
        """The same with the groups of these roles prunable that nothing but a computed table froze (``Group.table``).

        For callers that keep the table's values for the units that stay.
        """
        wanted = set(roles)
        return replace(
            self, groups=[replace(g, frozen=None) if g.table and g.role in wanted else g for g in self.groups]
        )

    def roles(self) -> list[str]:
        """The roles present, in the order of :data:`ROLES`."""
        present = {g.role for g in self.groups}
        return [r for r in ROLES if r in present]

    def numel(self, tensor: str) -> int:
        size = 1
        for n in self.shapes[tensor]:
            size *= n
        return size

    def num_parameters(self, count_embeddings: bool = True) -> int:
        """Parameters of the whole model; tied tensors count once."""
        return sum(self.numel(p) for p in self.parameters if count_embeddings or p not in self.embeddings)

    def parameters_per_unit(self, group: Group) -> int:
        """Parameters that leave with one unit when nothing else is cut."""
        if group.role == "layers":
            prefix = group.modules[0] + "."
            return sum(self.numel(p) for p in self.parameters if p.startswith(prefix))
        total = 0
        for m in group.members:
            if m.parameter:
                total += self.numel(m.tensor) // self.shapes[m.tensor][m.dim] * m.index.width
        return total

    def table(self) -> list[dict[str, Any]]:
        """One row a group, for printing: role, module, units, outer, parameters per unit, members, exact, frozen."""
        return [
            {
                "name": g.name, "role": g.role, "module": g.module, "units": g.units, "outer": g.outer,
                "parameters_per_unit": self.parameters_per_unit(g), "members": len(g.members), "exact": g.exact,
                "frozen": g.frozen,
            }
            for g in self.groups
        ]  # fmt: skip

    def __str__(self) -> str:
        """The table as text; groups of the same kind in consecutive layers share a line."""
        head = ("role", "module", "groups", "units", "per unit", "members", "note")
        lines = [head]
        for rows in _runs(self.table()):
            first, last = rows[0], rows[-1]
            module = first["module"] or "(model)"
            if len(rows) > 1:
                module = f"{module} .. {last['module']}"
            outer = f"{first['outer']} x " if first["outer"] > 1 else ""
            note = f"frozen: {first['frozen']}" if first["frozen"] else "" if first["exact"] else "not exact"
            lines.append(
                (first["role"], module, str(len(rows)), f"{outer}{first['units']}",
                 f"{first['parameters_per_unit']:,}", str(first["members"]), note)
            )  # fmt: skip
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([*text, *(f"warning: {w}" for w in self.warnings)])

    def to_dict(self) -> dict[str, Any]:
        return {
            "groups": [g.to_dict() for g in self.groups],
            "shapes": {k: list(v) for k, v in self.shapes.items()},
            "parameters": sorted(self.parameters),
            "embeddings": sorted(self.embeddings),
            "tied": dict(self.tied),
            "warnings": list(self.warnings),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Groups:
        return cls(
            groups=[Group.from_dict(g) for g in data["groups"]],
            shapes={k: tuple(v) for k, v in data["shapes"].items()},
            parameters=frozenset(data["parameters"]),
            embeddings=frozenset(data["embeddings"]),
            tied=dict(data["tied"]),
            warnings=list(data["warnings"]),
        )
