"""What was asked and done, as rows of label and text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pyprune.report.html.pictures import NAMES
from pyprune.units import seconds, size, spans

Record = Mapping[str, Any]


def done(report: Record) -> list[tuple[str, str]]:
    """Rows for what pruning was asked for and reached; few where the report knows little."""
    plan, recipe = report.get("plan") or {}, report.get("recipe") or {}
    rows: list[tuple[str, str | None]] = [
        ("model", f"{report.get('model', '')} ({report.get('model_class', 'of unknown class')})"),
        ("asked", _asked(plan)),
        ("reached", _reached(report.get("parameters") or {})),
        ("criterion", _criterion(report.get("scores") or {}, plan)),
        ("calibration", _calibration(report.get("scores") or {})),
        ("allocation", _allocation(plan)),
        ("roles", ", ".join(NAMES.get(r, r) for r in plan.get("roles") or ()) or None),
        ("layers", spans(sorted(plan["layers"])) if plan.get("layers") else None),
        ("limits", _limits(plan)),
        ("values", _values(report.get("basis") or {})),
        ("compensation", _compensation(report.get("compensation") or ())),
        ("gains", _gains(report.get("compensation") or ())),
        ("type and device", _pair(recipe.get("dtype"), recipe.get("device"))),
        ("form", recipe.get("profile")),
        ("time until saving", seconds(report["seconds"]) if report.get("seconds") else None),
        ("peak memory", size(report["peak_memory"]) if report.get("peak_memory") else None),
    ]
    return [(label, text) for label, text in rows if text]


def recovery_done(recovery: Record) -> list[tuple[str, str]]:
    """Rows for what recovery did."""
    what = str(recovery.get("what", "")).replace("`", "")
    rows: list[tuple[str, str | None]] = [
        ("what", what),
        ("data", _data(recovery.get("data") or ())),
        ("steps", f"{recovery['steps']:,} of {recovery['planned_steps']:,}" if recovery.get("steps") else None),
        ("tokens learned", f"{recovery['tokens']:,}" if recovery.get("tokens") else None),
        ("learning rate", f"{recovery['learning_rate']:.3g}" if recovery.get("learning_rate") else None),
        ("adapter", f"{recovery['adapter_parameters']:,} parameters" if recovery.get("adapter_parameters") else None),
        ("training", seconds(recovery["seconds"]) if recovery.get("seconds") else None),
    ]
    return [(label, text) for label, text in rows if text]


def stages(*reports: tuple[str, Sequence[Record] | None]) -> list[dict[str, Any]]:
    """What every stage took, of the named runs in order, with its share of the longest."""
    found = [(verb, one) for verb, each in reports for one in each or ()]
    longest = max((one["seconds"] for _, one in found), default=0.0) or 1.0
    return [
        {
            "verb": verb, "name": one["name"], "seconds": seconds(one["seconds"]),
            "share": one["seconds"] / longest, "memory": size(one["peak_memory"]),
            "gpu": size(one["peak_gpu_memory"]) if one.get("peak_gpu_memory") is not None else "",
        }
        for verb, one in found
    ]  # fmt: skip


def _asked(plan: Record) -> str | None:
    asked = plan.get("asked") or {}
    parts = list(_amounts(asked, (plan.get("budget") or {}).get("unit", "parameters")))
    if asked.get("iterative_steps", 1) > 1:
        parts.append(f"in {asked['iterative_steps']} steps")
    counted = plan.get("count_embeddings")
    if counted is not None and (asked.get("ratio") is not None or asked.get("target_params")):
        parts.append("embeddings counted" if counted else "embeddings not counted")
    return ", ".join(parts) or None


def _amounts(asked: Record, unit: str) -> Iterator[str]:
    if asked.get("ratio") is not None:
        yield f"{100 * asked['ratio']:g} % of the {unit} removed"
    if asked.get("target_params"):
        yield f"{asked['target_params']:,} parameters left"
    for role, amount in (asked.get("widths") or {}).items():
        yield f"{_amount(amount)} of the {NAMES.get(role, role)} left"


def _amount(amount: Any) -> str:
    """Units, or a fraction of them."""
    return f"{100 * amount:g} %" if isinstance(amount, float) else f"{amount:,}"


def _reached(parameters: Record) -> str | None:
    parts = []
    for key, values in parameters.items():
        label = "" if key == "with_embeddings" else f" {key.replace('_', ' ')}"
        parts.append(f"{100 * values['ratio']:.2f} % removed{label}: {values['before']:,} → {values['after']:,}")
    return "; ".join(parts) or None


def _criterion(scores: Record, plan: Record) -> str | None:
    name = scores.get("criterion") or plan.get("criterion")
    if not name:
        return None
    more = [f"{k} {scores[k]}" for k in ("aggregation", "route", "engine") if scores.get(k)]
    return f"{name} ({', '.join(more)})" if more else str(name)


def _calibration(scores: Record) -> str | None:
    found = scores.get("calibration")
    if not found:
        return None
    tokens = f"{found['samples']:,} sequences of {found['length']:,} tokens"
    return f"{found.get('source', 'text')}: {tokens}, seed {found.get('seed', 0)}"


def _allocation(plan: Record) -> str | None:
    name, by = plan.get("allocation"), plan.get("allocation_criterion")
    return f"{name}, shares by {by}" if name and by else name


def _limits(plan: Record) -> str | None:
    parts = []
    for key, label in (("round_to", "multiples of"), ("min_keep", "at least")):
        values = plan.get(key)
        if isinstance(values, Mapping):
            told = {r: v for r, v in values.items() if v not in (None, 1)}
            parts += [f"{NAMES.get(r, r)}: {label} {_amount(v)}" for r, v in told.items()]
        elif values:
            parts.append(f"{label} {_amount(values)}")
    return "; ".join(parts) or None


def _values(basis: Record) -> str | None:
    changed = basis.get("groups") or ()
    return f"in principal coordinates in {len(changed)} layers" if changed else None


def _compensation(made: Sequence[Record]) -> str | None:
    if not made:
        return None
    matrices = sum(len(one.get("matrices") or ()) for one in made)
    target = f", target {made[0]['target']}" if made[0].get("target") else ""
    return f"{made[0]['mode']}{target}, {matrices} matrices"


def _gains(made: Sequence[Record]) -> str | None:
    found = next((one["gains"] for one in made if one.get("gains")), None)
    if found is None or found.get("before") is None or found.get("after") is None:
        return None
    change = f"{found['before']:.4f} to {found['after']:.4f} nats a token from the dense model on held-out calibration"
    return change if found.get("kept") else f"left out ({change})"


def _data(sources: Sequence[Any]) -> str | None:
    return ", ".join(str(one["source"]) for one in sources if isinstance(one, Mapping) and "source" in one) or None


def _pair(dtype: Any, device: Any) -> str | None:
    return f"{dtype}, {device}" if dtype and device else None
