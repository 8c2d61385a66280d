"""Plan: which units stay, as data. Self-contained: it can be applied, saved and read without rediscovering anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyprune.discovery.groups import Group


@dataclass(frozen=True)
class Cut:
    """The kept units of one group: ``kept[o]`` is ascending, and every copy ``o`` keeps the same number."""

    group: Group
    kept: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len(self.kept) != self.group.outer:
            raise ValueError(f"{self.group.name}: kept has {len(self.kept)} rows, the group has {self.group.outer}")
        if len({len(row) for row in self.kept}) != 1:
            raise ValueError(f"{self.group.name}: every copy must keep the same number of units")
        for row in self.kept:
            if not row or list(row) != sorted(set(row)) or row[0] < 0 or row[-1] >= self.group.units:
                raise ValueError(f"{self.group.name}: kept units must be ascending, unique and within range")

    @property
    def width(self) -> int:
        """Units kept in each copy."""
        return len(self.kept[0])

    def removed_modules(self) -> list[str]:
        """Paths of the modules that go; empty unless the units are modules."""
        return [m for i, m in enumerate(self.group.modules) if i not in set(self.kept[0])]

    def removed_positions(self) -> list[tuple[str, int, np.ndarray]]:
        """(tensor, dim, int64 positions that go) for every member."""
        gone = np.ones((self.group.outer, self.group.units), dtype=bool)
        for o, row in enumerate(self.kept):
            gone[o, list(row)] = False
        return [(m.tensor, m.dim, m.index.positions()[gone].reshape(-1)) for m in self.group.members]


@dataclass
class Plan:
    """Kept indices per group.

    Attributes:
        cuts: one per group that is cut; groups absent from it stay whole.
        details: how it was made (ratio asked and achieved, allocation, criterion), JSON-serialisable.
    """

    cuts: tuple[Cut, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Cut:
        for cut in self.cuts:
            if cut.group.name == name:
                return cut
        raise KeyError(f"the plan does not cut a group named {name!r}")

    def removed_modules(self, *roles: str) -> list[str]:
        """Paths of the decoder layers (role ``layers``) and of the sub-blocks (role ``sublayers``) that go.

        Args:
            roles: those wanted; none: both.
        """
        return [m for c in self.cuts if not roles or c.group.role in roles for m in c.removed_modules()]

    def kept_positions(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, dict[int, np.ndarray]]:
        """tensor -> dim -> ascending int64 positions that stay, for every tensor and dimension that loses any.

        Groups that cut the same dimension combine: a position stays when no group removes it.
        """
        stay: dict[tuple[str, int], np.ndarray] = {}
        for cut in self.cuts:
            for tensor, dim, gone in cut.removed_positions():
                mask = stay.setdefault((tensor, dim), np.ones(shapes[tensor][dim], dtype=bool))
                mask[gone] = False
        out: dict[str, dict[int, np.ndarray]] = {}
        for (tensor, dim), mask in stay.items():
            if not mask.all():
                out.setdefault(tensor, {})[dim] = np.flatnonzero(mask)
        return out

    def new_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Shapes after the cut; tensors of removed layers and sub-blocks are absent."""
        kept = self.kept_positions(shapes)
        gone = tuple(m + "." for m in self.removed_modules())
        out = {}
        for name, shape in shapes.items():
            if gone and name.startswith(gone):
                continue
            dims = kept.get(name, {})
            out[name] = tuple(len(dims[d]) if d in dims else n for d, n in enumerate(shape))
        return out

    def to_json(self) -> str:
        cuts = [{"group": c.group.to_dict(), "kept": [list(row) for row in c.kept]} for c in self.cuts]
        return json.dumps({"format": "pyprune-plan", "version": 1, "details": self.details, "cuts": cuts})

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Raises ValueError when the text is not a plan."""
        data = json.loads(text)
        if data.get("format") != "pyprune-plan" or data.get("version") != 1:
            raise ValueError("not a pyprune plan (format 'pyprune-plan', version 1)")
        cuts = tuple(
            Cut(Group.from_dict(c["group"]), tuple(tuple(int(i) for i in row) for row in c["kept"]))
            for c in data["cuts"]
        )
        return cls(cuts, data["details"])
