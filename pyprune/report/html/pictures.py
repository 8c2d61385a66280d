"""Geometry of the pictures: numbers for the template, in each picture's own units.

Every picture is stretched to the width of the page, so that its words stand in HTML around it and stay readable on a
telephone; an SVG holds shapes only. Each has a sentence that says what it shows, and a table with the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pyprune.units import spans

NAMES = {
    "kv_heads": "KV heads", "query_heads": "query heads", "qk_dim": "query and key dimensions of a head",
    "vo_dim": "value dimensions of a head", "ffn": "FFN channels", "experts": "experts",
    "expert_ffn": "FFN channels of experts", "latent": "latent dimensions", "state": "state channels",
    "hidden": "hidden channels", "layers": "layers", "channels": "channels",
}  # fmt: skip
ALWAYS = ("kv_heads", "query_heads", "ffn", "experts", "expert_ffn")  # drawn also where nothing was cut
FAINTEST = 0.18  # opacity of the least that is drawn
FAINTEST_UNIT = 0.3  # where a cell is one unit, and may carry a cross
Record = Mapping[str, Any]


def widths(entries: Sequence[Record]) -> list[dict[str, Any]]:
    """A picture for each role that was cut, or that every reader looks for: kept of what there was, layer by layer."""
    out = []
    for role in dict.fromkeys(e["role"] for e in entries):
        mine = sorted((e for e in entries if e["role"] == role), key=lambda e: -1 if e["layer"] is None else e["layer"])
        before, after = (sum(e[k] for e in mine) for k in ("before", "after"))
        if before == after and role not in ALWAYS:
            continue
        most = max(e["before"] for e in mine)
        bars = [
            {
                "layer": e["layer"], "before": e["before"], "after": e["after"],
                "x": i + 0.1, "height": e["after"] / most, "whole": e["before"] / most,
            }
            for i, e in enumerate(mine)
        ]  # fmt: skip
        out.append({
            "role": role, "name": NAMES.get(role, role), "bars": bars, "count": len(bars), "most": most,
            "before": before, "after": after, "single": len(bars) == 1, "ticks": _ticks(mine),
            "words": _width_words(role, mine),
        })  # fmt: skip
    return out


def importance(roles: Sequence[Record]) -> list[dict[str, Any]]:
    """A picture for each scored role: a row a layer; kept and removed units in their colours, stronger where there are
    more of them (bins) or where they matter more (unit by unit)."""
    return [_units(role) if role["mode"] == "units" else _bins(role) for role in roles]


def curve(points: Sequence[tuple[float, float]]) -> dict[str, Any] | None:
    """A line through (x, y) in a square of 1 by 1, upside down as SVG has it; None for fewer than two points."""
    known = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    if len(known) < 2:
        return None
    xs, ys = zip(*known, strict=True)
    (left, right), (low, high) = (min(xs), max(xs)), (min(ys), max(ys))
    wide, tall = (right - left) or 1.0, (high - low) or 1.0
    line = " ".join(f"{(x - left) / wide:.4f},{1 - (y - low) / tall:.4f}" for x, y in known)
    return {"line": line, "low": low, "high": high, "left": left, "right": right}


def _bins(role: Record) -> dict[str, Any]:
    rows, bins = role["rows"], len(role["edges"]) - 1
    most = max((k + r for row in rows for k, r in zip(row["kept"], row["removed"], strict=True)), default=0) or 1
    drawn = []
    for row in rows:
        cells = []
        for i, (kept, removed) in enumerate(zip(row["kept"], row["removed"], strict=True)):
            there = kept + removed
            if not there:
                continue
            strength, part = _strength(math.sqrt(there / most)), removed / there
            if removed:
                cells.append({"x": i, "width": _short(part), "kind": "removed", "strength": strength})
            if kept:
                cells.append({"x": _short(i + part), "width": _short(1 - part), "kind": "kept", "strength": strength})
        drawn.append(_row(row, cells, sum(row["kept"]), sum(row["removed"])))
    first, last = (f"{role['edges'][i]:.1e}" for i in (0, -1))
    scale = "logarithmic" if role["scale"] == "log" else "linear"
    return {
        **_frame(role, drawn, bins), "axis": (first, f"score, {scale} scale", last),
        "key": f"Stronger: more units of that score (up to {most:,} in a cell).",
    }  # fmt: skip


def _units(role: Record) -> dict[str, Any]:
    rows = role["rows"]
    values = [v for row in rows for v in row["scores"]]
    shades = _shades(values, role["scale"])
    drawn = []
    for row in rows:
        cells = [
            {"x": i, "width": 1, "kind": "kept" if kept else "removed", "strength": _strength(shades(v), FAINTEST_UNIT)}
            for i, (v, kept) in enumerate(zip(row["scores"], row["kept"], strict=True))
        ]
        drawn.append(_row(row, cells, sum(row["kept"]), len(row["kept"]) - sum(row["kept"])))
    columns = max(len(row["scores"]) for row in rows)
    return {
        **_frame(role, drawn, columns), "axis": ("1", "unit", str(columns)),
        "key": f"Stronger: a higher score, from {min(values):.1e} to {max(values):.1e}.",
    }  # fmt: skip


def _frame(role: Record, rows: list[dict[str, Any]], columns: int) -> dict[str, Any]:
    name = NAMES.get(role["role"], role["role"])
    kept, removed = (sum(row[k] for row in rows) for k in ("kept", "removed"))
    words = f"{name}: {removed:,} of {kept + removed:,} units removed in {len(rows)} layers."
    if rows[0]["layer"] is None:
        words = f"{name}: {removed:,} of {kept + removed:,} units removed."
    return {"role": role["role"], "name": name, "rows": rows, "columns": columns, "words": words,
            "crosses": role["mode"] == "units"}  # fmt: skip


def _row(row: Record, cells: list[dict[str, Any]], kept: int, removed: int) -> dict[str, Any]:
    spread = {k: row[k] for k in ("layer", "least", "median", "greatest")}
    return {**spread, "cells": cells, "kept": kept, "removed": removed}


def _shades(values: Sequence[float], scale: str) -> Any:
    """Score -> 0..1."""
    if scale == "log":
        positive = [v for v in values if v > 0]
        low, high = math.log(min(positive)), math.log(max(positive))
        low = max(low, high - math.log(1e12))
        return lambda v: (max(math.log(v), low) - low) / (high - low) if v > 0 and high > low else float(v > 0)
    least, greatest = min(values), max(values)
    return lambda v: (v - least) / (greatest - least) if greatest > least else 1.0


def _strength(value: float, faintest: float = FAINTEST) -> float:
    return round(faintest + (1 - faintest) * value, 2)


def _ticks(entries: Sequence[Record]) -> list[str]:
    """Layers at the left end, in the middle and at the right end."""
    layers = ["all" if e["layer"] is None else str(e["layer"]) for e in entries]
    return layers if len(layers) < 3 else [layers[0], layers[len(layers) // 2], layers[-1]]


def _width_words(role: str, entries: Sequence[Record]) -> str:
    name = NAMES.get(role, role)
    before, after = (sum(e[k] for e in entries) for k in ("before", "after"))
    if role == "layers":
        gone = [e["layer"] for e in entries if not e["after"]]
        return f"{after} of {before} layers stay" + (f"; removed: {spans(gone)}." if gone else ".")
    each = {(e["after"], e["before"]) for e in entries}
    if len(each) == 1:
        kept, of = each.pop()
        where = "" if len(entries) == 1 else f" in each of {len(entries)} layers"
        return f"{kept:,} of {of:,} {name}{where}."
    left = [e["after"] for e in entries]
    return f"{after:,} of {before:,} {name} in all, from {min(left):,} to {max(left):,} in a layer."


def _short(value: float) -> float:
    return round(value, 3)
