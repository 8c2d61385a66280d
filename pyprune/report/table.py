"""Tables for the terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from pyprune.discovery.groups import Group, Groups
from pyprune.importance.scores import Scores
from pyprune.report.data import Report
from pyprune.units import perplexity as shown_perplexity
from pyprune.units import seconds, size, spans

MEMBERS = 4  # shown of each group; JSON has all


def report_tables(report: Report) -> list[RenderableType]:
    """Before and after, what each stage took, what the models say, and notes."""
    parts: list[RenderableType] = [_before_after(report), _stages(report)]
    if report.continuation is not None:
        parts.append(_continuations(report.continuation))
    if report.depth is not None:
        gone, part = report.depth["removed_layers"], report.depth["layer_part"]
        what = {"layer": "layers removed", "attention": "attention removed in layers", "ffn": "FFN removed in layers"}
        parts.append(Text(f"{what[part]}: {spans(gone)} ({len(gone)}, by {report.depth['criterion']})"))
    parts += _units_kept(report.plan)
    parts += [Text(f"note: {w}") for w in report.warnings]
    if report.output_dir is not None:
        parts.append(Text(f"saved in {report.output_dir}"))
    return parts


def group_tables(groups: Groups, model: str) -> list[RenderableType]:
    """What can be removed, a row for groups that differ only in their layer; what is left whole and why; warnings."""
    table = Table(title="What can be removed together", title_justify="left", caption_justify="left")
    table.add_column("role")
    table.add_column("module", overflow="fold")
    for name in ("groups", "units", "parameters\na unit"):
        table.add_column(name, justify="right")
    table.add_column(Text("members [dimension]"), overflow="fold")
    whole = Table(title="Left whole", title_justify="left")
    whole.add_column("role")
    whole.add_column("why", overflow="fold")
    for alike in _alike(groups.groups):
        first = alike[0]
        if not first.prunable:
            whole.add_row(first.role, Text(first.frozen or ""))
            continue
        table.add_row(
            first.role if first.exact else f"{first.role} *",
            Text(_pattern([g.module for g in alike]) or "(the model)"),
            str(len(alike)),
            f"{first.outer} x {first.units}" if first.outer > 1 else str(first.units),
            f"{groups.parameters_per_unit(first):,}",
            Text(_members(first)),
        )
    if any(g.prunable and not g.exact for g in groups):
        table.caption = "* a normalisation runs over these units, so removing some changes what it gives for the rest"
    notes = [Text(f"warning: {w}") for w in groups.warnings]
    return [_totals(groups, model), table, *([whole] if whole.row_count else []), *notes]


def _totals(groups: Groups, model: str) -> Text:
    inside = groups.num_parameters(count_embeddings=False)
    return Text(f"{model}: {groups.num_parameters():,} parameters, {inside:,} without embeddings and output head")


def score_table(groups: Groups, scores: Scores) -> Table:
    """The spread of the scores in each group, a row for each role and layer."""
    table = Table(title=f"Scores by {scores.criterion}", title_justify="left")
    table.add_column("group")
    for name in ("units", "least", "median", "greatest"):
        table.add_column(name, justify="right")
    for group in groups:
        if group.name in scores:
            values = scores[group.name].flatten()
            stats = (values.min(), values.median(), values.max())
            table.add_row(Text(group.name), str(values.numel()), *(f"{v.item():.4g}" for v in stats))
    return table


def _before_after(report: Report) -> Table:
    table = Table(title=Text(f"{report.model} ({report.model_class})"), title_justify="left")
    table.add_column("")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    for key, label in (("with_embeddings", "parameters"), ("without_embeddings", "parameters without embeddings")):
        p = report.parameters[key]
        table.add_row(label, f"{p['before']:,}", f"{p['after']:,}", _change(p["before"], p["after"]))
    budget = report.plan.get("budget")
    if budget is not None:
        label = f"memory with {budget['length']:,} cached tokens" if budget["name"] == "memory" else budget["unit"]
        counts = [size(n) if budget["name"] == "memory" else f"{n:,}" for n in (budget["before"], budget["after"])]
        table.add_row(label, *counts, _change(budget["before"], budget["after"]))
    rows = [("size on disk", report.weights_bytes["before"], report.weights_bytes["after"])]
    peaks = {s["name"]: s["peak_memory"] for s in report.stages}
    if "perplexity before" in peaks and "perplexity after" in peaks:
        rows.append(("peak memory of evaluation", peaks["perplexity before"], peaks["perplexity after"]))
    for label, before, after in rows:
        table.add_row(label, size(before), size(after), _change(before, after))
    if report.perplexity:
        a, b = (report.perplexity[k]["nll"] for k in ("before", "after"))
        shown = (shown_perplexity(report.perplexity[k]["perplexity"]) for k in ("before", "after"))
        table.add_row("perplexity", *shown, f"{b - a:+.3f} nats")
        table.caption, table.caption_justify = Text(report.perplexity["before"]["protocol"]), "left"
    return table


def _units_kept(plan: Mapping[str, Any]) -> list[Text]:
    """How many of each role, from the least to the greatest where groups differ, and what chose them."""
    kept = []
    for role, width in (plan.get("widths") or {}).items():
        some = [width] if isinstance(width, int) else sorted(set(width.values()))
        kept.append(f"{role} {some[0]:,}" + (f" to {some[-1]:,}" if len(some) > 1 else ""))
    by = [f"{name} {plan[name]}" for name in ("criterion", "allocation") if plan.get(name)]
    return [Text(f"units kept: {', '.join(kept)}" + (f" ({', '.join(by)})" if by else ""))] if kept else []


def _stages(report: Report) -> Table:
    table = Table(title="Stages", title_justify="left", show_footer=True)
    table.add_column("stage", "in all")
    table.add_column("time", seconds(report.seconds), justify="right")
    table.add_column("peak memory", size(report.peak_memory), justify="right")
    gpu = [s["peak_gpu_memory"] for s in report.stages if s["peak_gpu_memory"] is not None]
    if gpu:
        table.add_column("peak GPU memory", size(max(gpu)), justify="right")
    for s in report.stages:
        row = [s["name"], seconds(s["seconds"]), size(s["peak_memory"])]
        if gpu:
            row.append("" if s["peak_gpu_memory"] is None else size(s["peak_gpu_memory"]))
        table.add_row(*row)
    return table


def _continuations(said: Mapping[str, str]) -> Table:
    table = Table(title="What the models say", title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", overflow="fold")
    for name in ("prompt", "before", "after"):
        table.add_row(name, Text(said[name]))
    return table


def _change(before: int, after: int) -> str:
    return f"{after / before - 1:+.2%}" if before else ""


def _alike(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups that differ in nothing but layer numbers, in order of first appearance."""
    found: dict[tuple[object, ...], list[Group]] = {}
    for g in groups:
        members = tuple((re.sub(r"\.\d+\.", ".N.", m.tensor), m.dim) for m in g.members)
        reason = re.sub(r"\.\d+\.", ".N.", g.frozen or "")
        key = (g.role, re.sub(r"\.\d+(?=\.|$)", ".N", g.module), g.units, g.outer, g.exact, reason, members)
        found.setdefault(key, []).append(g)
    return list(found.values())


def _pattern(modules: Sequence[str]) -> str:
    """Module paths as one: layers.0.mlp and layers.1.mlp -> layers.{0-1}.mlp."""
    split = [m.split(".") for m in modules]
    out = []
    for parts in zip(*split, strict=True):
        distinct = list(dict.fromkeys(parts))
        varies = len(distinct) > 1 and all(p.isdigit() for p in distinct)
        out.append("{" + spans(int(p) for p in distinct) + "}" if varies else distinct[0])
    return ".".join(out)


def _members(group: Group) -> str:
    """Members with their dimension, alike ones together: q_proj[0], layers.{0-3}.mlp.up_proj[0]."""
    prefix = group.module + "." if group.module else ""
    names = [f"{m.tensor.removeprefix(prefix)}[{m.dim}]".replace(".weight[", "[") for m in group.members]
    alike: dict[str, list[str]] = {}
    for name in names or group.modules:
        alike.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "N", name), []).append(name)
    shown = [_pattern(same) for same in alike.values()]
    return ", ".join(shown[:MEMBERS]) + (f", and {len(shown) - MEMBERS} more" if len(shown) > MEMBERS else "")
