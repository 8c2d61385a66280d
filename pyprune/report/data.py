"""The report of a pruning run: plain data, the same as JSON and as tables."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pyprune.discovery.groups import Groups

PACKAGES = ("pyprune", "torch", "transformers", "safetensors")


def versions(more: Iterable[str] = ()) -> dict[str, str]:
    """What a result depends on: package -> version, those that are installed; ``more`` packages too."""
    out = {"python": platform.python_version()}
    for name in (*PACKAGES, *more):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out


def groups_dict(groups: Groups) -> dict[str, Any]:
    """Groups as JSON holds them, with the parameters that leave with one unit of each, and the totals."""
    data = groups.to_dict()
    for entry, group in zip(data["groups"], groups, strict=True):
        entry["parameters_per_unit"] = groups.parameters_per_unit(group)
    counts = {f"{k}_embeddings": groups.num_parameters(k == "with") for k in ("with", "without")}
    return {"parameter_counts": counts, **data}


@dataclass
class Report:
    """What was asked and what came out.

    Attributes:
        model: name or folder of the dense model, or its class when it came as an object.
        model_class: class name.
        parameters: {"with_embeddings" | "without_embeddings": {"before", "after", "ratio"}}; tied tensors count once.
        weights_bytes: {"before", "after"}: bytes of the weight files; of the tensors where there are no files.
        perplexity: {"before", "after"}: each as ``Perplexity.to_dict()``; None when no text was given.
        continuation: {"prompt", "before", "after"}; None when no prompt was given.
        samples: {"prompt", "before", "after"} of each prompt that both models continued; None when none was asked.
        stages: {"name", "seconds", "peak_memory", "peak_gpu_memory"} in order, bytes.
        plan: details of the plan (what was asked, widths, allocation).
        scores: criterion and details of the scores; None when nothing was scored.
        depth: which layers went, by which criterion, and what each was worth; None when no whole layer was to go.
        basis: which groups' units are principal coordinates, as ``Rebased.to_dict()``; None when all are as they were.
        compensation: one entry a step, as ``Compensation.to_dict()``; None when nothing was compensated.
        recipe: every option's value.
        output_dir: where the result lies, or None.
        versions: package -> version.
        warnings: what the user should know.
    """

    model: str
    model_class: str
    parameters: dict[str, dict[str, Any]]
    weights_bytes: dict[str, int]
    perplexity: dict[str, Any] | None = None
    continuation: dict[str, str] | None = None
    samples: list[dict[str, str]] | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)
    plan: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] | None = None
    depth: dict[str, Any] | None = None
    basis: dict[str, Any] | None = None
    compensation: list[dict[str, Any]] | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    output_dir: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of all stages."""
        return float(sum(s["seconds"] for s in self.stages))

    @property
    def peak_memory(self) -> int:
        """Largest resident size of the process over all stages, in bytes."""
        return max((int(s["peak_memory"]) for s in self.stages), default=0)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable; ``format`` and ``version`` tell readers what it is."""
        totals = {"seconds": self.seconds, "peak_memory": self.peak_memory}
        return {"format": "pyprune-report", "version": 1, **asdict(self), **totals}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)
