"""What would run and why: every stage against its entry in ``run.json`` and the files that are there."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from pyprune.errors import PyPruneError
from pyprune.runs.identity import Hashes, difference
from pyprune.runs.recipe import SECTIONS, RunRecipe
from pyprune.runs.record import Entry, Record
from pyprune.runs.stages import STAGES, RunStage

RUN, RESUME, SKIP, LATER = "run", "go on", "up to date", "left out"


@dataclass
class Step:
    """A stage of this run.

    Attributes:
        stage: the stage.
        action: RUN, RESUME (run, from where it was interrupted), SKIP or LATER (behind ``until``).
        why: in words.
        entry: what is known of it from before; None for nothing.
        forced: it runs because the user says so.
    """

    stage: RunStage
    action: str
    why: str
    entry: Entry | None
    forced: bool = False

    @property
    def runs(self) -> bool:
        return self.action in (RUN, RESUME)


def plan(
    run: RunRecipe, record: Record, hashes: Hashes, force: Collection[str] = (), until: str | None = None
) -> list[Step]:
    """The steps of a run, in order.

    Raises:
        PyPruneError: ``force`` or ``until`` names a stage that the recipe has not; or something lies where a stage
            would write, and no run left it there.
    """
    for option, names in (("force", force), ("until", [until] if until is not None else [])):
        for name in names:
            if name not in run.sections:
                raise PyPruneError(option, name, "is no stage of this recipe", f"It has: {', '.join(run.sections)}.")
    steps: list[Step] = []
    reached = True
    for kind in STAGES:
        if kind.name not in run.sections:
            continue
        stage = kind(run)
        if reached:
            steps.append(_step(stage, steps, record, hashes, kind.name in force))
        else:
            steps.append(Step(stage, LATER, f"behind --until {until}", record.entries.get(kind.name)))
        reached = reached and kind.name != until
    return steps


def request(stage: RunStage, record: Record, hashes: Hashes) -> Entry:
    """What a stage is to be made from, as it is now. Earlier stages count by the execution that made their results."""
    from pyprune import __version__

    inputs = stage.inputs(hashes)
    for name in stage.after:
        if name in stage.run.sections:
            entry = record.entries.get(name)
            inputs[name] = {"": entry.id if entry is not None else ""}
    with named(stage):
        options = json.loads(json.dumps(stage.options()))
    return Entry(options, __version__, inputs)


def changes(before: Entry, now: Entry) -> str:
    """What differs between two requests, in words; "" for nothing."""
    if before.version != now.version:
        return f"pyprune {before.version} -> {now.version}"
    for name in (*before.options, *now.options):
        old, new = before.options.get(name), now.options.get(name)
        if old != new:
            return f"option {name}: {_shown(old)} -> {_shown(new)}"
    for name in (*now.inputs, *before.inputs):
        if name not in before.inputs or name not in now.inputs:
            return f"input {name} is {'new' if name in now.inputs else 'not read any more'}"
        found = difference(before.inputs[name], now.inputs[name])
        if found:
            return f"{name} ran again" if name in SECTIONS else f"input {name}: {found}"
    return ""


def _step(stage: RunStage, earlier: Sequence[Step], record: Record, hashes: Hashes, forced: bool) -> Step:
    entry = record.entries.get(stage.name)
    if entry is None:
        there = [path for path in stage.outputs() if path.exists()]
        if there and not forced:
            problem = "exists already, and no run in this work folder made it"
            option = "output_dir" if stage.options().get("output") is None else "output"
            hint = f"Name another {option}, or replace it with --force {stage.name}."
            raise PyPruneError(option, str(there[0]), problem, hint)
        return Step(stage, RUN, f"--force {stage.name}" if forced else "new", None, forced)
    if forced:
        return Step(stage, RUN, f"--force {stage.name}", entry, forced=True)
    before = [s.stage.name for s in earlier if s.runs and s.stage.name in stage.after]
    if before:
        return Step(stage, RUN, f"{', '.join(before)} {'runs' if len(before) == 1 else 'run'} again", entry)
    changed = changes(entry, request(stage, record, hashes))
    if not entry.done:
        return Step(stage, RUN if changed else RESUME, f"was interrupted{', ' * bool(changed)}{changed}", entry)
    if changed:
        return Step(stage, RUN, changed, entry)
    for path in stage.outputs():
        known = entry.outputs.get(output_name(path, stage))
        if known is None or not path.exists():
            return Step(stage, RUN, f"output missing: {path.name}", entry)
        found = difference(known, hashes.of(path))
        if found:
            return Step(stage, RUN, f"output {path.name}: {found}", entry)
    return Step(stage, SKIP, "nothing changed", entry)


class named:
    """Says in which stage a mistake was found."""

    def __init__(self, stage: RunStage) -> None:
        self._where = f"(Stage {stage.name} of {stage.run.file}.)"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, PyPruneError):
            hint = f"{error.hint} {self._where}".strip()
            raise PyPruneError(error.option, error.value, error.problem, hint) from error


def output_name(path: Any, stage: RunStage) -> str:
    """How an output is recorded: relative to the work folder where it lies in it, so that the folder may move."""
    return path.relative_to(stage.run.output_dir).as_posix() if _inside(path, stage) else str(path)


def _inside(path: Any, stage: RunStage) -> bool:
    return path.is_relative_to(stage.run.output_dir)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
