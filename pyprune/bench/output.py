"""What the measurements are written to: CSV, a page that says where and how, and a plot."""

from __future__ import annotations

import csv
import datetime
import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pyprune import environment
from pyprune.bench.run import Line
from pyprune.errors import PyPruneError

HEADINGS = {
    "op": "op", "shapes": "shapes", "dtype": "dtype", "median": "median, ms", "spread": "IQR, ms", "rate": "rate",
    "percent": "% of ceiling", "eager": "eager / ours", "compiled": "compiled / ours", "peak_gib": "peak, GiB",
    "eager_peak_gib": "eager peak, GiB",
}  # fmt: skip


def check_plot(folder: str) -> None:
    """Raises PyPruneError when no plot can be drawn, before anything is measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise PyPruneError(
            "output", folder, "gets a plot, which needs the package 'matplotlib'",
            "pip install 'pyprune[bench]', or leave --output out.",
        )  # fmt: skip


def facts(command: str) -> dict[str, str]:
    """Where, when and with what: date, command, processor, GPUs, driver, and versions."""
    found = environment.collect()
    gpus = found["gpus"]
    named = [g["name"] for g in gpus] if isinstance(gpus, list) else []
    kernels = found["kernels"]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "processor": f"{found['cpu'].get('model')}, {found['cpu'].get('usable')} cores",
        "gpu": ", ".join(named) or "none",
        "driver": _driver(),
        "pyprune": str(found["pyprune"]),
        "torch": f"{found['torch'].get('version')}, {found['torch'].get('threads')} threads",
        "kernels": f"{kernels.get('cpu_isa')}, CUDA {'usable' if kernels.get('cuda_usable') else 'not usable'}",
        "transformers": str(found["packages"].get("transformers")),
    }


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "none"
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    ended = subprocess.run(query, capture_output=True, text=True, timeout=30)
    return ended.stdout.strip().splitlines()[0] if ended.returncode == 0 and ended.stdout.strip() else "unknown"


def cells(line: Line) -> dict[str, str]:
    """A line as the table shows it."""
    values: dict[str, Any] = asdict(line)
    shown = {name: values[name] for name in ("op", "shapes", "dtype")}
    for name in ("median", "spread"):
        shown[name] = "" if values[name] is None else f"{1000 * values[name]:.3f}"
    shown["rate"] = "" if line.rate is None else f"{line.rate:.3g} {line.unit}"
    for name, form in (("percent", "{:.0f}"), ("eager", "{:.2f}"), ("compiled", "{:.2f}")):
        shown[name] = "" if values[name] is None else form.format(values[name])
    for name in ("peak_gib", "eager_peak_gib"):
        shown[name] = "" if values[name] is None else f"{values[name]:.2f}"
    return shown


def table(lines: Sequence[Line]) -> Any:
    """A rich table, the notes under it."""
    from rich.table import Table

    out = Table(caption="\n".join(notes(lines)) or None, caption_justify="left")
    used = _used(lines)
    for name in used:
        out.add_column(HEADINGS[name], justify="left" if name in ("op", "shapes", "dtype") else "right")
    for line in lines:
        shown = cells(line)
        out.add_row(*(shown[name] for name in used))
    return out


def notes(lines: Sequence[Line]) -> list[str]:
    """Each note once, after the operations that it belongs to."""
    by_note: dict[str, list[str]] = {}
    for line in lines:
        if line.note:
            by_note.setdefault(line.note, []).append(line.op)
    return [f"{', '.join(ops)}: {note}" for note, ops in by_note.items()]


def _used(lines: Sequence[Line]) -> list[str]:
    """The columns in which some line has a value."""
    shown = [cells(line) for line in lines]
    return [name for name in HEADINGS if any(row[name] for row in shown)]


def write(folder: str, lines: Sequence[Line], told: dict[str, str]) -> None:
    """``results.csv`` (seconds, all columns) and ``results.md`` (table and facts) in ``folder``; :func:`plot` is apart.

    Raises:
        PyPruneError: the folder cannot be made.
    """
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PyPruneError("output", folder, f"cannot be made: {error.strerror}", "Name a folder.") from None
    with open(place / "results.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, Line.columns())
        writer.writeheader()
        writer.writerows(asdict(line) for line in lines)
    used = _used(lines)
    rows = ["| " + " | ".join(cells(line)[name] for name in used) + " |" for line in lines]
    head = ["| " + " | ".join(HEADINGS[name] for name in used) + " |", "|" + "---|" * len(used)]
    about = [f"- {name}: {value}" for name, value in told.items()]
    page = ["# pyprune bench", "", *about, "", *head, *rows, "", *(f"- {note}" for note in notes(lines))]
    (place / "results.md").write_text("\n".join(page).rstrip() + "\n", encoding="utf-8")


def plot(folder: str, lines: Sequence[Line], told: dict[str, str]) -> None:
    """``results.png``: percent of the ceiling, and how many times as long stock PyTorch takes."""
    from matplotlib.figure import Figure

    shown = [line for line in lines if line.median is not None]
    names = [f"{line.op}\n{line.shapes}, {line.dtype}" for line in shown]
    figure = Figure(figsize=(11, 1.2 + 0.5 * max(2, len(shown))), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = range(len(shown))
    left.barh(places, [line.percent or 0.0 for line in shown], color="tab:blue")
    left.set_yticks(places, names, fontsize=8)
    left.invert_yaxis()
    left.axvline(100, color="grey", linewidth=0.8)
    left.set_xlabel("% of the ceiling measured in the same run")
    right.barh([p - 0.2 for p in places], [line.eager or 0.0 for line in shown], 0.4, label="eager PyTorch / ours")
    right.barh([p + 0.2 for p in places], [line.compiled or 0.0 for line in shown], 0.4, label="torch.compile / ours")
    right.axvline(1, color="grey", linewidth=0.8)
    right.set_xlabel("times as long")
    right.legend(fontsize=8)
    place = told["gpu"] if told["gpu"] != "none" and "cuda" in told["command"] else told["processor"]
    figure.suptitle(f"pyprune bench, {place}, torch {told['torch']}, {told['date']}", fontsize=9)
    figure.savefig(Path(folder) / "results.png", dpi=120)
