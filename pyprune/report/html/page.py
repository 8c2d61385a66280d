"""From what is known of a run to one page of HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from pyprune.report.html import facts, figures, pictures
from pyprune.units import count, perplexity, seconds, size

DENSE, PRUNED, RECOVERED = "dense", "pruned", "recovered"
Record = Mapping[str, Any]


@dataclass
class Sources:
    """All that a page is made of; whatever is missing is left out of it.

    Attributes:
        columns: key -> name of every model, in order; keys ``dense``, ``pruned``, ``recovered`` or others.
        report: what ``pyprune_report.json`` holds.
        recovery: the recovery's part of it.
        importance: as :func:`pyprune.report.importance.importance_summary` gives it.
        widths: its ``widths``, or those of a plan.
        evaluations: (column, result of one model) in the order in which they count.
        sizes: column -> bytes of the weight files as they lie there.
        samples: {"prompt", and under columns' keys what those models say}.
        recipes: (title, YAML).
        commands: (what it does, command line).
        notes: what the reader should know about the page itself.
    """

    columns: dict[str, str]
    report: Record
    recovery: Record | None = None
    importance: Record | None = None
    widths: Sequence[Record] = ()
    evaluations: Sequence[tuple[str, Record]] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    samples: Sequence[Mapping[str, str]] = ()
    recipes: Sequence[tuple[str, str]] = ()
    commands: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()


def page(sources: Sources) -> str:
    """The whole HTML document. Every text that comes from outside is escaped."""
    return _template().render(context(sources)) + "\n"


def context(sources: Sources) -> dict[str, Any]:
    """What the template is given."""
    report, recovery = sources.report, sources.recovery
    found = list(_figures(sources))
    keys = list(sources.columns)
    versions = {**(report.get("versions") or {}), **((recovery or {}).get("versions") or {})}
    return {
        "title": _title(sources), "subtitle": _subtitle(sources), "tiles": list(_tiles(sources, found)),
        "columns": [{"key": k, "name": n} for k, n in sources.columns.items()],
        "done": facts.done(report), "warnings": _warnings(sources),
        "widths": pictures.widths(sources.widths),
        "importance": pictures.importance((sources.importance or {}).get("roles") or ()),
        "criterion": (sources.importance or {}).get("criterion"),
        "quality": figures.rows(found, figures.QUALITY, keys), "cost": figures.rows(found, figures.COST, keys),
        "samples": [_sample(one, keys) for one in sources.samples],
        "names": sources.columns,
        "recovery": facts.recovery_done(recovery) if recovery else [], "curve": _curve(recovery),
        "validation": _validation(recovery),
        "stages": facts.stages(("prune", report.get("stages")), ("recover", (recovery or {}).get("stages"))),
        "recipes": list(sources.recipes), "commands": list(sources.commands), "versions": versions,
    }  # fmt: skip


@lru_cache(maxsize=1)
def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("pyprune.report.html"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("report.html")


def _figures(sources: Sources) -> list[figures.Figure]:
    report, recovery = sources.report, sources.recovery or {}
    start = PRUNED if PRUNED in sources.columns else DENSE  # what recovery began with
    counts = (report.get("parameters") or {}).get("with_embeddings") or {}
    bytes_ = report.get("weights_bytes") or {}
    found = [
        *figures.of_pair(report.get("perplexity"), (DENSE, PRUNED)),
        *figures.of_pair(recovery.get("perplexity"), (start, RECOVERED)),
        *figures.of_sizes(counts.get("before"), bytes_.get("before"), DENSE),
        *figures.of_sizes(counts.get("after"), bytes_.get("after"), PRUNED),
    ]
    if RECOVERED in sources.columns:  # an adapter is merged, so that no parameter is added
        found += figures.of_sizes(counts.get("after"), bytes_.get("after"), RECOVERED)
    for column, result in sources.evaluations:
        found += figures.of_evaluation(result, column)
    for column, there in sources.sizes.items():
        found += figures.of_sizes(None, there, column)
    return [f for f in found if f.column in sources.columns]


def _title(sources: Sources) -> str:
    name = _base(str(sources.report.get("model") or "A language model"))
    counts = (sources.report.get("parameters") or {}).get("with_embeddings")
    done = [f"pruned by {100 * counts['ratio']:.3g} %"] if counts else []
    done += ["recovered"] if sources.recovery else []
    return f"{name}, {' and '.join(done)}" if done else name


def _subtitle(sources: Sources) -> str:
    made = (sources.report.get("versions") or {}).get("pyprune")
    return "Report of " + (f"pyprune {made}" if made else "pyprune")


def _tiles(sources: Sources, found: Sequence[figures.Figure]) -> Any:
    """The few figures that stand at the top: (label, text, smaller text)."""
    counts = (sources.report.get("parameters") or {}).get("with_embeddings")
    if counts:
        shown = f"{count(counts['before'])} → {count(counts['after'])}"
        yield "parameters", f"{figures.MINUS}{100 * counts['ratio']:.1f} %", shown
    for row in figures.rows(found, figures.QUALITY, list(sources.columns)):
        if row["label"] == "perplexity":
            there = [
                (cell["shown"], name) for cell, name in zip(row["cells"], sources.columns.values(), strict=True) if cell
            ]
            yield "perplexity", " → ".join(shown for shown, _ in there), " → ".join(name for _, name in there)
            break
    sizes = {f.column: f.shown for f in found if f.label == "weights on disk"}
    if PRUNED in sizes:
        yield "weights on disk", sizes[PRUNED], f"from {sizes[DENSE]}" if DENSE in sizes else ""
    total = sources.report.get("seconds")
    if total:
        yield "time to prune", seconds(total), f"peak memory {size(sources.report.get('peak_memory') or 0)}"


def _base(name: str) -> str:
    """The last part of a path; a hub name whole."""
    stripped = name.rstrip("/\\")
    on_a_hub = stripped.count("/") == 1 and not stripped.startswith((".", "/", "~"))
    return stripped if on_a_hub else stripped.split("/")[-1]


def _warnings(sources: Sources) -> list[str]:
    found = [*(sources.report.get("warnings") or ()), *((sources.recovery or {}).get("warnings") or ()), *sources.notes]
    return list(dict.fromkeys(str(one) for one in found))


def _sample(sample: Mapping[str, str], keys: Sequence[str]) -> dict[str, Any]:
    return {"prompt": sample["prompt"], "said": [(key, sample[key]) for key in keys if key in sample]}


def _curve(recovery: Record | None) -> dict[str, Any] | None:
    made = (recovery or {}).get("validations") or ()
    return pictures.curve([(one["step"], one["perplexity"]) for one in made])


def _validation(recovery: Record | None) -> str:
    """One sentence about the text that was held out."""
    pair = (recovery or {}).get("validation")
    if not pair:
        return ""
    before, after = (perplexity(pair[k]["perplexity"]) for k in ("before", "after"))
    return f"Perplexity on the held-out part of the training text: {before} before, {after} after."
