"""The model card: what was done, with what result, and how to open it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from pyprune.selection.plan import Plan
from pyprune.surgery import skeleton, skip
from pyprune.units import size

_MOST_LAYERS = 200
_OPEN = "How to open it"


def model_card(
    model: Any,
    plan: Plan | None = None,
    report: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    terms: Mapping[str, Any] | None = None,
) -> str:
    """README.md of a saved model, in Markdown with the hub's header, of which ``terms`` become a part."""
    name = str((report or {}).get("model") or getattr(model.config, "_name_or_path", "") or "")
    parts = [_header(name, terms or {}), f"# {_title(name)}", _what(model, name, plan)]
    for heading, text in (
        (_OPEN, _opening(model)),
        ("Figures", _figures(report)),
        ("What was cut", _cuts(plan)),
        ("Recovery", _recovery(report)),
        ("Recipe", "" if not recipe else f"```yaml\n{yaml.safe_dump(dict(recipe), sort_keys=False).strip()}\n```"),
    ):
        if text:
            parts += [f"## {heading}", text]
    return "\n\n".join(parts) + "\n"


def set_opening(card: Path, text: str) -> None:
    """Puts ``text`` in the place of a card's section on how to open the model; a card without one is left alone."""
    if card.is_file():
        content = card.read_text(encoding="utf-8")
        changed = re.sub(rf"(?ms)^## {_OPEN}\n.*?(?=^## |\Z)", lambda _: f"## {_OPEN}\n\n{text}\n\n", content)
        card.write_text(changed.rstrip("\n") + "\n" if changed != content else content, encoding="utf-8")


def _header(name: str, terms: Mapping[str, Any]) -> str:
    header: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", "pyprune"],
        **terms,
    }
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists():
        header["base_model"] = name
    return f"---\n{yaml.safe_dump(header, sort_keys=False).strip()}\n---"


def _title(name: str) -> str:
    return f"{name.rstrip('/').rsplit('/', 1)[-1]}, pruned" if name else "A pruned language model"


def _what(model: Any, name: str, plan: Plan | None) -> str:
    source = f" from `{name.rstrip('/').rsplit('/', 1)[-1]}`" if name else ""
    numbers = sum(p.numel() for p in model.parameters())
    made = f"`{type(model).__name__}` with {numbers:,} parameters"
    version = _version()
    if plan is None or not plan.cuts:
        return f"{made}, saved{source} by pyprune{version}. Nothing was cut."
    return (
        f"{made}, made{source} by structural pruning with pyprune{version}: units that matter least were removed, and "
        "the weight matrices are smaller and dense. `pyprune_plan.json` lists the units that stayed."
    )


def _opening(model: Any) -> str:
    cls = type(model).__name__
    if skeleton.is_stock(model.config):
        return (
            "Plain transformers opens it; nothing else is needed.\n\n```python\n"
            "from transformers import AutoModelForCausalLM\n\n"
            'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")\n```'
        )
    return (
        f"Its layers have sizes that the stock `{cls}` does not build (see `per_layer_config`, `head_dim`, "
        "`pyprune_resized`, `pyprune_narrow` and `pyprune_skipped` in `config.json`), so `AutoModelForCausalLM."
        "from_pretrained` stops with mismatched shapes"
        + (
            ", or fills attention and FFN blocks that are gone with random numbers. "
            if skip.spec_of(model.config)
            else ". "
        )
        + "Open it with pyprune:\n\n"
        '```python\nimport pyprune\n\nmodel = pyprune.load("path/to/this/folder")\n```\n\n'
        "`pyprune export --profile hetero-hf` makes a folder of it that plain transformers opens."
    )


def _figures(report: Mapping[str, Any] | None) -> str:
    """A table of the report's before and after."""
    if not report:
        return ""
    rows: list[tuple[str, ...]] = []
    for key, values in (report.get("parameters") or {}).items():
        label = f"parameters ({key.replace('_', ' ')})"
        rows.append((label, f"{values['before']:,}", f"{values['after']:,}"))
    held = report.get("weights_bytes")
    if held:
        rows.append(("weights", size(held["before"]), size(held["after"])))
    perplexity = report.get("perplexity") or {}
    values = [perplexity.get(k) or {} for k in ("before", "after")]
    if any(v.get("perplexity") is not None for v in values):
        shown = [f"{v['perplexity']:.2f}" if v.get("perplexity") is not None else "" for v in values]
        rows.append(("perplexity", *shown))
    if not rows:
        return ""
    lines = ["| | before | after |", "|---|---:|---:|", *(f"| {' | '.join(row)} |" for row in rows)]
    protocol = values[1].get("protocol") or values[0].get("protocol")
    return "\n".join(lines) + (f"\n\nPerplexity protocol: {protocol}." if protocol else "")


def _recovery(report: Mapping[str, Any] | None) -> str:
    """What training after pruning brought, and its options."""
    found = (report or {}).get("recovery")
    if not found:
        return ""
    parts = [f"{found['what']}"]
    rows = []
    for label, pair in (("validation perplexity", found.get("validation")), ("perplexity", found.get("perplexity"))):
        if pair:
            shown = (f"{pair[k]['perplexity']:.2f}" if pair[k]["perplexity"] else "" for k in ("before", "after"))
            rows.append(f"| {label} | {' | '.join(shown)} |")
    if rows:
        parts.append("\n".join(["| | before recovery | after |", "|---|---:|---:|", *rows]))
    if found.get("perplexity"):
        parts.append(f"Perplexity protocol: {found['perplexity']['after']['protocol']}.")
    parts.append(f"```yaml\n{yaml.safe_dump(dict(found['recipe']), sort_keys=False).strip()}\n```")
    return "\n\n".join(parts)


def _cuts(plan: Plan | None) -> str:
    """Units kept of units there were, by role and layer."""
    if plan is None or not plan.cuts:
        return ""
    roles = list(dict.fromkeys(c.group.role for c in plan.cuts))
    by_layer: dict[int | None, dict[str, list[str]]] = {}
    for cut in plan.cuts:
        cells = by_layer.setdefault(cut.group.layer, {}).setdefault(cut.group.role, [])
        cells.append(f"{cut.width} of {cut.group.units}")
    lines = [f"| layer | {' | '.join(roles)} |", f"|---|{'---|' * len(roles)}"]
    for layer in sorted(by_layer, key=lambda i: -1 if i is None else i)[:_MOST_LAYERS]:
        cells = [", ".join(dict.fromkeys(by_layer[layer].get(role, []))) for role in roles]
        lines.append(f"| {'all' if layer is None else layer} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _version() -> str:
    try:
        return f" {metadata.version('pyprune')}"
    except metadata.PackageNotFoundError:
        return ""
