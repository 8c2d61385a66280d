"""How good, how fast and how large a model is, alone or beside another one.

Models are opened and measured one after the other, so that the memory seen is that of one model. Only speed is measured
with all of them open, in turn, so that all of them see the same machine.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pyprune import preflight
from pyprune.checkpoint.save import RECIPE
from pyprune.config import EvaluationConfig, read_yaml
from pyprune.errors import PyPruneError, unknown_name
from pyprune.evaluation.footprint import footprint
from pyprune.evaluation.loglikelihood import Likelihood, loglikelihoods
from pyprune.evaluation.overlap import overlap_notes
from pyprune.evaluation.resume import Store, check_file
from pyprune.evaluation.speed import speeds
from pyprune.evaluation.stages import Stages
from pyprune.evaluation.stock import STOCK, check_installed, stock_accuracies
from pyprune.evaluation.tasks import Accuracy, Task, accuracy, is_task_file, read_task, requests_of
from pyprune.files import write_text
from pyprune.importance.modes import own_modes
from pyprune.importance.sources import NO_TOKENIZER
from pyprune.opening import Opened, measure, open_or_take
from pyprune.report.data import versions
from pyprune.stage_options import ModelConfig, ResultConfig, SpeedConfig, TaskConfig
from pyprune.texts import evaluation_windows

FOOTPRINT = ("cache_bytes_per_token", "state_bytes", "macs_per_token", "attention_macs_per_position", "peak_memory")


def evaluate(
    model: Any, *, tokenizer: Any = None, config: str | Path | None = None, compare: Any = None, **options: Any
) -> dict[str, Any]:
    """Measure a causal language model: what ``pyprune eval`` does.

        found = pyprune.evaluate("smaller", eval_text="test.txt", tasks=["piqa.jsonl.gz"], speed=True, compare="dense")
        found["perplexity"]["perplexity"], found["tasks"][0]["acc_norm"], found["ratios"]["decode"]

    Args:
        model: a folder, a hub name, or a transformers model.
        tokenizer: for texts and tasks, when ``model`` or ``compare`` is an object.
        config: a YAML recipe; ``options`` win over it.
        compare: a second model, given like ``model``.
        options: those of ``pyprune eval --help`` under the same names: ``eval_text`` (also token ids), ``protocol``,
            ``tasks``, ``limit``, ``resume_file``, ``speed``, ``prompt``, ``output``, ...

    Returns:
        JSON-serialisable figures: ``model``, ``model_class``, ``parameters``, ``weights_bytes``, ``perplexity``,
        ``continuation``, ``tasks``, ``speed``, ``footprint``, ``stages``, ``warnings``, ``recipe``, ``versions``; what
        was not asked for is None. With ``compare`` also ``compare`` (the same of that model) and ``ratios`` (model /
        compare).

    Raises:
        PyPruneError: an option that does not exist or cannot be met, or an input that cannot be used.
    """
    given = dict(options)
    for name, value in (("model_name_or_path", model), ("compare", compare)):
        if isinstance(value, (str, Path)):
            given[name] = value
    objects = [None if isinstance(m, (str, Path)) else m for m in (model, compare)]
    return run(EvaluationConfig.build(given, config), objects[0], tokenizer, objects[1])


@dataclass
class _Subject:
    """A model to measure: how to open it, or the object itself."""

    source: ModelConfig
    given: Any
    tokenizer: Any
    option: str = "model_name_or_path"

    def open(self, stages: Stages) -> Opened:
        with preflight.renamed(model_name_or_path=self.option):
            return open_or_take(self.source, stages, self.given, self.tokenizer)


@own_modes()
def run(recipe: EvaluationConfig, model: Any = None, tokenizer: Any = None, compare: Any = None) -> dict[str, Any]:
    """:func:`evaluate` with its options gathered in a recipe."""
    tasks = check(recipe)
    subjects = [_Subject(recipe.model, model, tokenizer)]
    other = recipe.result.compare
    if compare is not None or other is not None:
        source = recipe.model if compare is None else ModelConfig()
        subjects.append(_Subject(replace(source, model_name_or_path=other), compare, tokenizer, "compare"))
    found = _measure_all(recipe, subjects, tasks)
    result = {**found[0], "recipe": recipe.to_dict(), "versions": versions()}
    if len(found) > 1:
        result["compare"], result["ratios"] = found[1], ratios(found[0], found[1])
    if recipe.result.output is not None:
        _write(result, recipe.result)
    return result


def run_beside(recipe: EvaluationConfig, models: Sequence[str]) -> list[dict[str, Any]]:
    """Each of ``models`` beside the recipe's own one: what :func:`run` gives with ``compare``, all measured once."""
    tasks = check(recipe)
    sources = [recipe.model, *(replace(recipe.model, model_name_or_path=name) for name in models)]
    first, *others = _measure_all(recipe, [_Subject(source, None, None) for source in sources], tasks)
    out = []
    for source, figures in zip(sources[1:], others, strict=True):
        result = replace(recipe.result, compare=recipe.model.model_name_or_path)
        plain = replace(recipe, model=source, result=result).to_dict()
        more = {"recipe": plain, "versions": versions(), "compare": first, "ratios": ratios(figures, first)}
        out.append({**figures, **more})
    return out


def _measure_all(
    recipe: EvaluationConfig, subjects: Sequence[_Subject], tasks: Sequence[Task | str]
) -> list[dict[str, Any]]:
    """The figures of each model, in order."""
    found, opened, stages = [], [], []
    for subject in subjects:
        stages.append(Stages())
        one = subject.open(stages[-1])
        found.append(_figures(recipe, one, tasks, stages[-1]))
        if len(subjects) > 1 and one.mine:
            one.model = None  # the next one shall be alone in memory
        opened.append(one)
    if recipe.speed.speed:
        _add_speed(recipe, subjects, opened, found, stages)
    for figures, done in zip(found, stages, strict=True):
        figures["stages"] = done.to_list()
    return found


def ratios(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float | None]:
    """Figures of a model divided by those of another; None where the other's is 0 or unknown."""
    pairs: dict[str, tuple[Any, Any]] = {k: (one[k], other[k]) for k in ("parameters", "weights_bytes")}
    for part, keys in (
        ("perplexity", ("perplexity",)), ("speed", ("prefill", "decode", "first_token")), ("footprint", FOOTPRINT),
    ):  # fmt: skip
        if one[part] is not None and other[part] is not None:
            pairs.update({k: (one[part][k], other[part][k]) for k in keys})
    for a, b in zip(one["tasks"] or (), other["tasks"] or (), strict=True):
        pairs.update({f"{a['task']} {k}": (a[k], b[k]) for k in ("acc", "acc_norm")})
    return {k: a / b if a is not None and b else None for k, (a, b) in pairs.items()}


def check(recipe: EvaluationConfig) -> list[Task | str]:
    """The tasks, once something is asked for and it is sure that the results can be written.

    Raises:
        PyPruneError: otherwise, or a task or the second model is not there or cannot be read.
    """
    asked = recipe.evaluation
    if asked.eval_text is None and asked.prompt is None and recipe.tasks.tasks is None and not recipe.speed.speed:
        hint = "Give eval_text, tasks, speed, or a prompt."
        raise PyPruneError("eval_text", None, "there is nothing to measure on", hint)
    preflight.check_evaluation(asked)
    if asked.prompt is None:
        preflight.check_effect(asked, "prompt", ["max_new_tokens"])
    for part, switch in ((recipe.tasks, "tasks"), (recipe.speed, "speed")):
        if not getattr(part, switch):
            preflight.check_effect(part, switch, list(vars(part)))
    if recipe.tasks.resume_file is not None:
        check_file(Path(recipe.tasks.resume_file))
    if recipe.result.output is not None:
        _check_output(Path(recipe.result.output), recipe.result.overwrite)
    tasks = _read_tasks(recipe.tasks)
    other = recipe.result.compare
    if other is not None:  # it is opened when the first one is measured
        preflight.check_model(other, "compare")
        with preflight.renamed(model_name_or_path="compare"):
            preflight.check_windows(asked, replace(recipe.model, model_name_or_path=other))
    return tasks


def _check_output(path: Path, overwrite: bool) -> None:
    if path.is_dir():
        raise PyPruneError("output", str(path), "is a folder", "Name a file, such as results.json.")
    if path.exists() and not overwrite:
        raise PyPruneError("output", str(path), "exists already", "Set overwrite, or name another file.")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise PyPruneError("output", str(path), f"cannot be made in {path.parent}", "Name a folder that is there.")


def _read_tasks(config: TaskConfig) -> list[Task | str]:
    """Tasks in order: questions of files, names of lm-eval's. Two files of one name are called by their paths."""
    out: list[Task | str] = []
    names: set[str] = set()
    for given in config.tasks or ():
        if (config.tasks or ()).count(given) > 1:
            raise PyPruneError("tasks", given, "is given twice", "Name each task once.")
        if is_task_file(given):
            task = read_task(given, config.limit)
            task = replace(task, name=given) if task.name in (*names, *(config.tasks or ())) else task
            names.add(task.name)
            out.append(task)
        elif given in STOCK:
            check_installed(given)
            out.append(given)
        elif Path(given).exists():
            raise PyPruneError("tasks", given, "is not a task file", "Task files end in .jsonl or .jsonl.gz.")
        else:
            raise unknown_name("tasks", given, (*STOCK, "a .jsonl file"))
    return out


def _figures(recipe: EvaluationConfig, one: Opened, tasks: Sequence[Task | str], stages: Stages) -> dict[str, Any]:
    with stages("read text"):
        windows, text = evaluation_windows(recipe.evaluation, one.model, one.tokenizer)
    speed = recipe.speed
    if speed.speed:
        _check_prompt(speed, one.model)
    measured = measure(one.model, one.tokenizer, recipe.evaluation, windows, text, stages)
    said = measured["continuation"]
    accuracies = None if not tasks else _accuracies(recipe.tasks, one, tasks, stages)
    size = None
    if speed.speed:
        with stages("memory and arithmetic"):
            size = footprint(one.model, prompt_tokens=speed.speed_prompt, new_tokens=speed.speed_tokens).to_dict()
    return {
        "model": one.name,
        "model_class": type(one.model).__name__,
        "parameters": sum(p.numel() for p in one.model.parameters()),
        "weights_bytes": one.weights_bytes,
        "perplexity": measured["perplexity"],
        "continuation": None if said is None else {"prompt": recipe.evaluation.prompt, "text": said},
        "tasks": accuracies,
        "speed": None,
        "footprint": size,
        "warnings": overlap_notes(_pruned_with(one), None, recipe.evaluation.eval_text, None),
        "stages": [],
    }


def _pruned_with(one: Opened) -> str | None:
    """The calibration text in the recipe that lies in a pruned model's folder; None where there is none."""
    try:
        given = read_yaml(Path(one.name) / RECIPE).get("calibration")
    except PyPruneError:
        return None
    return given if isinstance(given, str) else None


def _check_prompt(config: SpeedConfig, model: Any) -> None:
    """The prompt and what is generated after it fit the model's positions."""
    try:
        preflight.check_length("speed_prompt", config.speed_prompt + config.speed_tokens, model)
    except PyPruneError as error:
        problem = f"with speed_tokens {config.speed_tokens} {error.problem}"
        raise PyPruneError("speed_prompt", config.speed_prompt, problem, "Use smaller ones.") from None


def _accuracies(config: TaskConfig, one: Opened, tasks: Sequence[Task | str], stages: Stages) -> list[dict[str, Any]]:
    """Accuracy.to_dict() of each task, in order."""
    if one.tokenizer is None:
        raise PyPruneError("tasks", None, f"{one.name} has no tokenizer to read them with", NO_TOKENIZER)
    found: dict[str, Accuracy] = {}
    with nullcontext() if config.resume_file is None else Store(config.resume_file, one.model) as store:

        def score(pairs: Sequence[tuple[str, str]], label: str) -> list[Likelihood]:
            return loglikelihoods(
                one.model, one.tokenizer, pairs, batch_size=config.task_batch_size, store=store, label=label
            )

        for task in tasks:
            if isinstance(task, Task):
                with stages(f"task {task.name}", bar=False):
                    values = [v.total for v in score(requests_of(task), f"task {task.name}")]
                    found[task.name] = accuracy(task, values, "file")
        names = [t for t in tasks if isinstance(t, str)]
        if names:
            with stages("tasks by lm-eval", bar=False):
                found.update({a.task: a for a in stock_accuracies(score, names, config.limit)})
    return [found[t if isinstance(t, str) else t.name].to_dict() for t in tasks]


def _add_speed(
    recipe: EvaluationConfig, subjects: Sequence[_Subject], opened: Sequence[Opened], found: Sequence[dict[str, Any]],
    stages: Sequence[Stages],
) -> None:  # fmt: skip
    config = recipe.speed
    for subject, one, own in zip(subjects, opened, stages, strict=True):
        if one.model is None:
            one.model = subject.open(own).model
    with stages[0]("speed", bar=False):
        measured = speeds(
            {str(n): one.model for n, one in enumerate(opened)}, prompt_tokens=config.speed_prompt,
            new_tokens=config.speed_tokens, batch=config.speed_batch_size, rounds=config.speed_rounds,
        )  # fmt: skip
    for n, figures in enumerate(found):
        figures["speed"] = measured[str(n)].to_dict()


def _write(result: dict[str, Any], config: ResultConfig) -> None:
    """The file appears complete or not at all."""
    path = Path(str(config.output))
    try:
        write_text(path, json.dumps(result, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise PyPruneError("output", str(path), f"cannot be written: {error.strerror}", "Free some space.") from error
