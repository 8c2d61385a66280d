"""Tables of a recovery: what it brought, and how it went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from pyprune.units import perplexity, seconds


def recovery_tables(report: Mapping[str, Any]) -> list[RenderableType]:
    """Before and after, the validations, what the models say, notes."""
    parts: list[RenderableType] = [Text(report["what"].replace("`", "")), _figures(report)]
    if report.get("validations"):
        parts += [_validations(report), Text(_pace(report))]
    said = report.get("continuation")
    if said:
        table = Table(title="What the models say", title_justify="left", show_header=False, min_width=24)
        for name in ("before", "after"):
            table.add_row(name, Text(said[name]))
        parts.append(table)
    parts += [Text(f"note: {w}") for w in report.get("warnings", ())]
    if report.get("output_dir"):
        parts.append(Text(f"saved in {report['output_dir']}"))
    return parts


def _figures(report: Mapping[str, Any]) -> Table:
    table = Table(title="Perplexity", title_justify="left", caption_justify="left")
    table.add_column("")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    for label, key in (("validation", "validation"), ("evaluation text", "perplexity")):
        pair = report.get(key)
        if pair:
            shown = [perplexity(pair[k]["perplexity"]) for k in ("before", "after")]
            table.add_row(label, *shown, f"{pair['after']['nll'] - pair['before']['nll']:+.3f} nats")
    if report.get("perplexity"):
        table.caption = Text(report["perplexity"]["after"]["protocol"])
    return table


def _validations(report: Mapping[str, Any]) -> Table:
    table = Table(title="Validations", title_justify="left")
    for name in ("step", "perplexity"):
        table.add_column(name, justify="right")
    best = report["validation"]["best_step"]
    for found in report["validations"]:
        mark = " *" if found["step"] == best else ""
        table.add_row(f"{found['step']}{mark}", f"{found['perplexity']:.2f}")
    return table


def _pace(report: Mapping[str, Any]) -> str:
    speed = report["tokens"] / max(report["seconds"], 1e-9)
    return f"* kept. {seconds(report['seconds'])}, {speed:,.0f} learned tokens a second, validations included"
