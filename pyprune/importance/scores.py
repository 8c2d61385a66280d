"""Scores: one number a unit, as data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Scores(Mapping[str, torch.Tensor]):
    """Importance of every unit; higher is more important.

    Attributes:
        by_group: group name -> float32 tensor [outer, units] on the CPU, finite.
        criterion: the criterion's registered name.
        details: how they were made (aggregation, calibration, seed, seconds, peak memory), JSON-serialisable.
    """

    by_group: dict[str, torch.Tensor]
    criterion: str
    details: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, group: str) -> torch.Tensor:
        return self.by_group[group]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_group)

    def __len__(self) -> int:
        return len(self.by_group)

    def weighed(self, worth: Scores) -> Scores:
        """sqrt(s F), unit by unit, F of ``worth``; negative scores count as zero. Groups that ``worth`` has not keep s.

        It is what obs compares units by as long as nothing takes over for anything
        (:mod:`pyprune.compensation.removal`: s_g sqrt(F_g / S_g) with s_g = S_g, which wanda scores).
        """
        mean = {
            n: (v.double().clamp_min(0) * worth[n].double().clamp_min(0)).sqrt().to(v.dtype) if n in worth else v
            for n, v in self.items()
        }
        return Scores(mean, self.criterion, {**self.details, "weighed_by": worth.criterion})

    def among(self, groups: Iterable[str]) -> Scores:
        """Those of the groups named, where there are any."""
        names = set(groups)
        return Scores({n: v for n, v in self.items() if n in names}, self.criterion, self.details)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; criterion and details go into its metadata."""
        from safetensors.torch import save_file

        meta = {"criterion": self.criterion, "details": json.dumps(self.details)}
        save_file({k: v.contiguous() for k, v in self.by_group.items()}, str(path), metadata=meta)

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read what :meth:`save` wrote."""
        from safetensors import safe_open

        with safe_open(str(path), framework="pt") as f:
            meta = f.metadata()
            values = {k: f.get_tensor(k) for k in f.keys()}
        return cls(values, meta["criterion"], json.loads(meta["details"]))
