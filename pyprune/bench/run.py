"""The measurements, one line each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch

from pyprune.bench import whole
from pyprune.bench.cases import CASES, Case
from pyprune.bench.measure import Timing, Work, copy_work, interleaved, product_work
from pyprune.progress import bar

WHAT = (*CASES, "scoring")


@dataclass(frozen=True)
class Line:
    """One measurement.

    Attributes:
        median, spread: seconds of one call, and the distance between the quartiles.
        rate, unit: GB/s or TFLOP/s of the least work that must be done; tokens/s for whole models.
        ceiling: what the machine did in the same rounds, in the same unit: a copy, or a large matrix product.
        percent: of that ceiling.
        eager, compiled: how many times as long stock PyTorch took, eager and through ``torch.compile``. For whole
            models ``eager`` is LLM-Pruner's procedure.
        peak_gib, eager_peak_gib: peak memory, of whole models.
        note: why something is missing.
    """

    op: str
    shapes: str
    dtype: str
    median: float | None = None
    spread: float | None = None
    rate: float | None = None
    unit: str = ""
    ceiling: float | None = None
    percent: float | None = None
    eager: float | None = None
    compiled: float | None = None
    peak_gib: float | None = None
    eager_peak_gib: float | None = None
    note: str = ""

    @classmethod
    def columns(cls) -> list[str]:
        return [f.name for f in fields(cls)]


def run(
    what: Iterable[str],
    shapes: str,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    compiler: bool = True,
    on_line: Callable[[Line], None] = lambda line: None,
) -> list[Line]:
    """Measure.

    Args:
        what: names of :data:`WHAT`.
        shapes: a name of :data:`pyprune.bench.shapes.SHAPES`.
        rounds: runs of each candidate, in turn.
        compiler: also measure ``torch.compile``.
        on_line: called with each line when it is there.

    Raises:
        PyPruneError: the shapes do not fit into memory.
    """
    lines: list[Line] = []

    def add(line: Line) -> None:
        lines.append(line)
        on_line(line)

    with bar("measuring"), torch.inference_mode(False):
        for part in what:
            if part == "scoring":
                for found in whole.measure(shapes, dtype, device, min(rounds, 3)):
                    add(_scoring_line(found, shapes, dtype))
                continue
            for case in CASES[part](shapes, dtype, device):
                add(measured(case, shapes, dtype, device, rounds, compiler))
                del case  # and its tensors, before those of the next are made
    return lines


def measured(
    case: Case, shapes: str, dtype: torch.dtype, device: torch.device, rounds: int, compiler: bool = True
) -> Line:
    """One case beside stock PyTorch and its ceiling."""
    name = str(dtype).removeprefix("torch.")
    if case.ours is None:
        return Line(case.op, shapes, name, unit=case.unit, note=case.missing)
    scale = 1e9 if case.unit == "GB/s" else 1e12
    limit, limit_work = copy_work(device) if case.unit == "GB/s" else product_work(device, dtype)
    works: dict[str, Work] = {"ours": case.ours, "eager": case.stock(case.eager), "ceiling": limit}
    compiled, note = compiled_work(case) if compiler else (None, "torch.compile was not asked for")
    if compiled is not None:
        works["compiled"] = compiled
    with torch.no_grad():
        timings = interleaved(works, rounds, device, ahead=not case.host)
    ours = timings["ours"]
    rate, ceiling = case.work / ours.median / scale, limit_work / timings["ceiling"].median / scale
    return Line(
        case.op, shapes, name, ours.median, ours.spread, rate, case.unit, ceiling, 100 * rate / ceiling,
        timings["eager"].median / ours.median,
        timings["compiled"].median / ours.median if "compiled" in timings else None, note=note,
    )  # fmt: skip


def compiled_work(case: Case) -> tuple[Work | None, str]:
    """The eager formula through ``torch.compile``, compiled by a first run; or None, and the reason."""
    try:
        torch.compiler.reset()
        work = case.stock(torch.compile(case.eager, dynamic=False))
        with torch.no_grad():
            work()
    except Exception as error:  # a missing compiler, an unsupported GPU: of many unrelated kinds
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        return None, f"torch.compile: {type(error).__name__}: {first}"[:160]
    return work, ""


def _scoring_line(found: dict[str, Any], shapes: str, dtype: torch.dtype) -> Line:
    ours, theirs = Timing.of(found["ours"]["seconds"]), Timing.of(found["llm_pruner"]["seconds"])
    return Line(
        f"scoring {found['criterion']}", shapes, str(dtype).removeprefix("torch."), ours.median, ours.spread,
        found["tokens"] / ours.median, "tokens/s", eager=theirs.median / ours.median,
        peak_gib=found["ours"]["peak"] / 2**30, eager_peak_gib=found["llm_pruner"]["peak"] / 2**30,
        note="eager is LLM-Pruner's procedure",
    )  # fmt: skip
