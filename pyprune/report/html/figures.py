"""Figures of several models as rows of a table: one row for what compares, one cell a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyprune.units import count, perplexity, size

QUALITY, COST = "quality", "cost"
MINUS = "\N{MINUS SIGN}"
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """One measurement of one model.

    Attributes:
        section: ``quality`` or ``cost``.
        label, note: what was measured, and how; figures with equal ones stand in one row.
        column: key of the model.
        value: the number, or None for one that overflows.
        shown: as people read it.
        lower: whether less is better; None where neither is.
        points: whether the distance to the first model is shown in points (accuracies), else as a percentage.
    """

    section: str
    label: str
    note: str
    column: str
    value: float | None
    shown: str
    lower: bool | None = True
    points: bool = False


def of_pair(pair: Record | None, columns: tuple[str, str]) -> Iterator[Figure]:
    """A perplexity before and after, as the reports of prune and recover hold it."""
    for column, key in zip(columns, ("before", "after"), strict=True):
        found = (pair or {}).get(key)
        if found:
            yield _perplexity(found, column)


def of_evaluation(result: Record, column: str) -> Iterator[Figure]:
    """All figures of one model in what ``pyprune eval --output`` wrote."""
    if result.get("perplexity"):
        yield _perplexity(result["perplexity"], column)
    for task in result.get("tasks") or ():
        for key in ("acc", "acc_norm"):
            if task.get(key) is not None:
                label, note = f"{task['task']}, {key}", f"zero-shot, {task['questions']:,} questions"
                error = task.get(f"{key}_stderr")
                shown = f"{100 * task[key]:.1f}" + ("" if error is None else f" ± {100 * error:.1f}") + " %"
                yield Figure(QUALITY, label, note, column, task[key], shown, lower=False, points=True)
    yield from of_sizes(result.get("parameters"), result.get("weights_bytes"), column)
    speed = result.get("speed")
    if speed:
        for key, label in (("prefill", "tokens read a second"), ("decode", "tokens written a second")):
            shown = f"{speed[key]:,.1f} ± {speed[key + '_spread']:,.1f}"
            yield Figure(COST, label, speed["protocol"], column, speed[key], shown, lower=False)
        shown = " ± ".join(f"{1000 * speed[k]:,.1f}" for k in ("first_token", "first_token_spread")) + " ms"
        yield Figure(COST, "time to the first token", speed["protocol"], column, speed["first_token"], shown)
    yield from _footprint(result.get("footprint") or {}, column)


def of_sizes(parameters: int | None, weights_bytes: int | None, column: str) -> Iterator[Figure]:
    """Parameters and the size of the weight files."""
    if parameters:
        yield Figure(COST, "parameters", "", column, parameters, f"{parameters:,}")
    if weights_bytes:
        yield Figure(COST, "weights on disk", "", column, weights_bytes, size(weights_bytes))


def rows(figures: Iterable[Figure], section: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Rows for the template, in the order in which they first appear; of two figures in one cell the later one counts.

    Each is {"label", "note", "cells"}; a cell is None or {"shown", "share" (of the row's greatest value), "change"
    (against the first cell with a value), "verdict" ("better", "worse" or "")}.
    """
    found: dict[tuple[str, str], dict[str, Figure]] = {}
    for figure in figures:
        if figure.section == section:
            found.setdefault((figure.label, figure.note), {})[figure.column] = figure
    out = []
    for (label, note), by_column in found.items():
        row = [by_column.get(column) for column in columns]
        greatest = max((f.value for f in row if f is not None and f.value is not None), default=0.0)
        first = next((f for f in row if f is not None and f.value is not None), None)
        cells = [None if f is None else _cell(f, first, greatest) for f in row]
        out.append({"label": label, "note": note, "cells": cells})
    return out


def _cell(figure: Figure, first: Figure | None, greatest: float) -> dict[str, Any]:
    share = 1.0 if figure.value is None else figure.value / greatest if greatest > 0 else 0.0
    change, verdict = "", ""
    if first is not None and figure is not first and figure.value is not None and first.value is not None:
        gap = figure.value - first.value
        if figure.points:
            change = f"{100 * gap:+.1f} points"
        elif first.value:
            change = f"{100 * gap / first.value:+.1f} %"
        if gap and figure.lower is not None:
            verdict = "better" if (gap < 0) == figure.lower else "worse"
    return {"shown": figure.shown, "share": share, "change": change.replace("-", MINUS), "verdict": verdict}


def _perplexity(found: Record, column: str) -> Figure:
    value = found.get("perplexity")
    return Figure(QUALITY, "perplexity", str(found.get("protocol", "")), column, value, perplexity(value))


def _footprint(needs: Record, column: str) -> Iterator[Figure]:
    kinds = (
        ("weights_bytes", "weights in memory", size), ("cache_bytes_per_token", "KV cache a token", size),
        ("state_bytes", "recurrent state", size), ("peak_memory", "peak memory of the process", size),
        ("peak_gpu_memory", "peak GPU memory", size), ("macs_per_token", "multiply-accumulates a token", count),
    )  # fmt: skip
    for key, label, show in kinds:
        if needs.get(key):
            yield Figure(COST, label, "", column, needs[key], show(needs[key]))
