"""Running a recipe: the plan, then each stage in turn, recorded when it begins and when it ends."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyprune.errors import PyPruneError
from pyprune.runs.identity import Hashes
from pyprune.runs.plan import RESUME, Step, named, output_name, plan, request
from pyprune.runs.recipe import RunRecipe, read_recipe
from pyprune.runs.record import Record, alone

HASHES = ".hashes.json"


@dataclass
class Outcome:
    """What became of a stage.

    Attributes:
        name: the stage.
        action: "run", "go on", "up to date" or "left out".
        why: in words.
        ran: whether it ran now.
        seconds: that its last execution took; 0.0 when it never ran.
        result: what that found, in a line.
        outputs: where it lies.
    """

    name: str
    action: str
    why: str
    ran: bool = False
    seconds: float = 0.0
    result: str = ""
    outputs: list[str] = field(default_factory=list)


@dataclass
class RunResult:
    """What :func:`run_recipe` gives: the recipe with every option, and what became of its stages."""

    recipe: RunRecipe
    stages: list[Outcome]
    dry: bool

    def to_dict(self) -> dict[str, Any]:
        return {"recipe": self.recipe.to_dict(), "dry_run": self.dry, "stages": [vars(s) for s in self.stages]}


def run_recipe(
    file: str | Path, *, model: str | None = None, output_dir: str | Path | None = None, until: str | None = None,
    force: Sequence[str] = (), dry_run: bool = False, say: Callable[[str], None] | None = None,
) -> RunResult:  # fmt: skip
    """Run a recipe: prune -> recover -> eval -> export -> report, those of them that it has.

        done = pyprune.run_recipe("recipes/llama-20.yaml")

    A stage is left alone when ``run.json`` in the work folder says that it ended and nothing has changed since: its
    options, pyprune's version, the bytes of what it read and of what it left. It runs when an earlier stage that it
    reads from runs. One that was interrupted goes on where it can (recover, tasks of eval, prune with stream).

    Args:
        file: the recipe. Paths in it are relative to the working directory.
        model: in place of the recipe's.
        output_dir: in place of the recipe's.
        until: the last stage to run.
        force: stages to run even so.
        dry_run: say what would run and why; nothing is written.
        say: told a line when a stage begins.

    Raises:
        PyPruneError: the recipe is wrong, an option cannot be met, or an input cannot be used. All of it that can be
            told beforehand is told before the first stage. Stages that ended stay.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        hint = "Start `pyprune recover` with several processes, and `pyprune run` with one."
        raise PyPruneError("RECIPE", str(file), "is run by one process", hint)
    recipe = read_recipe(file, model, output_dir)
    if dry_run:
        steps = _planned(recipe, Record(recipe.output_dir), Hashes(recipe.output_dir / HASHES), force, until)
        return RunResult(recipe, [_outcome(step) for step in steps], True)
    if not recipe.output_dir.exists():  # what is refused at once leaves no folder behind
        _planned(recipe, Record(recipe.output_dir), Hashes(), force, until)
    with alone(recipe.output_dir):
        record, hashes = Record(recipe.output_dir), Hashes(recipe.output_dir / HASHES)
        steps = _planned(recipe, record, hashes, force, until)
        hashes.save()
        outcomes = [_execute(step, record, hashes, say) if step.runs else _outcome(step) for step in steps]
    return RunResult(recipe, outcomes, False)


def _planned(recipe: RunRecipe, record: Record, hashes: Hashes, force: Sequence[str], until: str | None) -> list[Step]:
    """The plan, with every stage that is to run checked."""
    steps = plan(recipe, record, hashes, force, until)
    for step in steps:
        if step.runs:
            with named(step.stage):
                step.stage.check()
    return steps


def _execute(step: Step, record: Record, hashes: Hashes, say: Callable[[str], None] | None) -> Outcome:
    stage, recipe = step.stage, step.stage.run
    if say is not None:
        say(f"{stage.name}: {step.why}")
    entry = request(stage, record, hashes)
    if step.forced:
        stage.forget()
    record.put(stage.name, entry, recipe.to_dict())
    start = time.perf_counter()
    with named(step.stage):
        entry.result = stage.execute(step.action == RESUME)
    entry.seconds, entry.finished, entry.done = time.perf_counter() - start, time.time(), True
    for name, model in stage.models().items():
        if not Path(model).exists():  # a hub's commit is known once it was opened
            entry.inputs[name] = stage.inputs(hashes)[name]
    entry.outputs = {output_name(path, stage): hashes.of(path) for path in stage.outputs()}
    record.put(stage.name, entry, recipe.to_dict())
    hashes.save()
    step.entry = entry
    return _outcome(step, ran=True)


def _outcome(step: Step, ran: bool = False) -> Outcome:
    out = Outcome(step.stage.name, step.action, step.why, ran, outputs=[str(p) for p in step.stage.outputs()])
    if step.entry is not None and step.entry.done and (ran or not step.runs):
        out.seconds, out.result = step.entry.seconds, step.entry.result
    return out
