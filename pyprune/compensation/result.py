"""What the compensation stage did."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from pyprune.compensation.gains import Gains
from pyprune.selection.plan import Plan


@dataclass(frozen=True)
class Compensated:
    """One matrix that was compensated: its tensor and expert, inputs kept of how many, calibration rows, and the
    figures of :class:`pyprune.compensation.refit.Refit` (errors are None in mode ``bias``). ``after_outputs`` is the
    error before what feeds the matrix was refitted too; None where that was not done."""

    tensor: str
    expert: int | None
    kept: int
    of: int
    rows: int
    penalty: float | None = None
    blend: float = 0.0
    before: float | None = None
    after: float | None = None
    after_outputs: float | None = None


@dataclass
class Compensation:
    """What was done.

    Attributes:
        mode: ``bias``, ``least-squares`` or ``obs``.
        plan: what to apply now: the plan as given; with mode ``obs``, of the same widths and with other units.
        matrices: one entry for each projection, in the order in which they were compensated.
        notes: what a reader of the result should know, as sentences.
        details: token weights, target, samples that fitted and that chose.
        gains: what multiplied the matrices afterwards, or None.
    """

    mode: str
    plan: Plan
    matrices: list[Compensated] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    gains: Gains | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        out = {"mode": self.mode, **self.details, "matrices": [asdict(m) for m in self.matrices], "notes": self.notes}
        return out if self.gains is None else {**out, "gains": self.gains.to_dict()}
