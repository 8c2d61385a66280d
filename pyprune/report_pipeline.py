"""The page of a checkpoint, made of what lies beside it. Models are opened only where samples are asked for."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pyprune import preflight
from pyprune.checkpoint.save import IMPORTANCE, PLAN, RECIPE, REPORT
from pyprune.config import EvaluationConfig, PruneConfig, Recipe, RecoverConfig, ReportingConfig
from pyprune.errors import PyPruneError
from pyprune.evaluation.generation import PATIENCE, continuations, sample_prompts
from pyprune.evaluation.stages import Stages
from pyprune.files import write_text
from pyprune.repeat import command
from pyprune.report.html import Sources, page
from pyprune.report.html.page import DENSE, PRUNED, RECOVERED
from pyprune.report.importance import FORMAT, importance_summary, widths_of_plan
from pyprune.selection.plan import Plan

PAGE = "report.html"
RECOVERY_RECIPE = "pyprune_recover.yaml"
EVALUATIONS = "pyprune_eval*.json"
EVALUATED = ("model", "parameters", "perplexity", "tasks", "speed")  # keys of every evaluation


def write_report(
    folder: str | Path, *, dense: str | Path | None = None, recovered: str | Path | None = None,
    evaluations: Sequence[str | Path | Mapping[str, Any]] = (), output: str | Path | None = None,
    overwrite: bool = False, generations: int | None = None, prompts: Any = None, max_new_tokens: int = 32,
    dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False,
) -> Path:  # fmt: skip
    """Write the page of a folder that ``prune`` or ``recover`` wrote: one self-contained HTML file.

        pyprune.write_report("smaller", recovered="recovered", evaluations=["tasks.json"])

    Args:
        dense: the model before pruning, where it is not where it was: a folder or hub name.
        recovered: what ``recover`` made of ``folder``.
        evaluations: files of ``pyprune eval --output``, or what :func:`pyprune.evaluate` returned; those that lie in
            the folders as ``pyprune_eval*.json`` are found. Later ones win over earlier ones.
        output: the file; None is ``report.html`` in the folder, which is always replaced.
        overwrite: replace another file that is there.
        generations: prompts that the models continue; their answers are in the page only. None and 0 open no model
            unless ``prompts`` are given.
        prompts: other prompts: a text file with one a line, or a list.
        max_new_tokens: tokens of each continuation.
        dtype, device, trust_remote_code: how models are opened for that.

    Returns:
        The file's absolute path. It appears complete or not at all.

    Raises:
        PyPruneError: ``folder`` holds no report of pyprune, a file holds no evaluation, the output exists or cannot be
            written, or a model that shall speak cannot be opened.
    """
    home = _Home.read(folder, "folder")
    after = None if recovered is None else _Home.read(recovered, "recovered")
    if after is not None and after.recovery is None:
        raise PyPruneError("recovered", str(recovered), "is no result of `pyprune recover`", "Leave it out.")
    if after is not None and home.recovery is not None:
        raise PyPruneError("recovered", str(recovered), f"goes with a pruned folder, and {folder} is recovered itself")
    target = _target(home, output, overwrite)
    asked = [] if not generations and prompts is None else sample_prompts(prompts, generations)
    columns = _Columns(home, after, None if dense is None else str(dense))
    sources = columns.sources()
    sources.evaluations = [*_beside(columns), *_given(evaluations, columns)]
    sources.columns.update(columns.others)
    sources.commands = [*sources.commands, *_evaluation_commands(one for _, one in sources.evaluations)]
    if asked:
        opening = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
        sources.samples = _ask(columns, sources.samples, asked, max_new_tokens, opening)
    try:
        write_text(target, page(sources))
    except OSError as error:
        raise PyPruneError("output", str(target), f"cannot be written: {error.strerror}") from error
    return target


def run(recipe: ReportingConfig) -> Path:
    """:func:`write_report` with its options gathered in a recipe."""
    if recipe.model.model_name_or_path is None:
        raise PyPruneError("model_name_or_path", None, "no folder is given", "Name what `pyprune prune` wrote.")
    asked = recipe.report
    with preflight.renamed(folder="model_name_or_path", evaluations="eval"):
        return write_report(
            recipe.model.model_name_or_path, dense=asked.dense, recovered=asked.recovered,
            evaluations=asked.eval or (), output=asked.output, overwrite=asked.overwrite,
            generations=asked.generations, prompts=asked.prompts, max_new_tokens=asked.max_new_tokens,
            dtype=recipe.model.dtype, device=recipe.model.device, trust_remote_code=recipe.model.trust_remote_code,
        )  # fmt: skip


def add_page(folder: str | Path, groups: Any = None, scores: Any = None, plan: Plan | None = None) -> None:
    """The page into a checkpoint folder that was just written, with the importance summary where there are scores.

    The checkpoint is worth more than its page: whatever goes wrong is a warning.
    """
    try:
        if scores is not None and plan is not None:
            summary = importance_summary(groups, scores, plan)
            write_text(Path(folder) / IMPORTANCE, json.dumps(summary, separators=(",", ":")) + "\n")
        write_report(folder)
    except Exception as error:
        again = f"The checkpoint is complete; `pyprune report {folder}` tries again."
        warnings.warn(f"{PAGE} could not be written ({error}). {again}", stacklevel=2)


def ask(model: Any, tokenizer: Any, prompts: list[str], recipe: Any, stages: Stages, when: str) -> list[str]:
    """The answers of a model in a run of prune or recover, in order, under a stage of its own.

    Those " before" are fewer where they take long and nobody asked for them.
    """
    if not prompts:
        return []
    asked = recipe.page.generations is not None or recipe.page.prompts is not None
    patience = PATIENCE if when == " before" and not asked else math.inf
    with stages("samples" + when, bar=False):
        tokens = recipe.evaluation.max_new_tokens
        return continuations(model, tokenizer, prompts, tokens, "samples" + when, patience)


@dataclass
class _Home:
    """A checkpoint folder and what lies beside its weights."""

    folder: Path
    report: dict[str, Any]
    importance: dict[str, Any] | None = None
    plan: Plan | None = None
    recipes: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: str | Path, option: str) -> _Home:
        """Raises PyPruneError about ``option`` unless the folder holds a report."""
        path = Path(folder).expanduser().absolute()
        if not path.is_dir():
            raise PyPruneError(option, str(folder), "is not a folder", "Name what `pyprune prune` wrote.")
        report = _json(path / REPORT)
        if not isinstance(report, dict):
            raise PyPruneError(option, str(folder), f"has no {REPORT}", "Name what `pyprune prune` or recover wrote.")
        importance = _json(path / IMPORTANCE)
        if not isinstance(importance, dict) or any(importance.get(k) != v for k, v in FORMAT.items()):
            importance = None
        home = cls(path, report, importance)
        try:
            home.plan = Plan.from_json((path / PLAN).read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError):
            home.plan = None
        for name in (RECIPE, RECOVERY_RECIPE):
            try:
                found = yaml.safe_load((path / name).read_text(encoding="utf-8"))
            except (OSError, ValueError, yaml.YAMLError):
                continue
            if isinstance(found, dict):
                home.recipes[name] = found
        return home

    @property
    def recovery(self) -> dict[str, Any] | None:
        return self.report.get("recovery")

    def weights_bytes(self) -> int:
        return sum(f.stat().st_size for ending in ("safetensors", "gguf") for f in self.folder.glob(f"*.{ending}"))


class _Columns:
    """The models of a page: which there are, by which names they go, and where they lie."""

    def __init__(self, home: _Home, after: _Home | None, dense: str | None) -> None:
        self.homes = {RECOVERED: after} if after is not None else {}
        self.homes[RECOVERED if home.recovery else PRUNED] = home
        self.last, self.dense = after or home, dense
        self.recovery = self.last.recovery
        self.others: dict[str, str] = {}
        report, recipe = home.report, home.report.get("recipe") or {}
        trained = (self.recovery or {}).get("recipe") or {}
        pruned = bool(report.get("parameters"))
        began = trained.get("model_name_or_path")
        names: dict[str, list[Any]] = {
            DENSE: [dense, report.get("model"), recipe.get("model_name_or_path"), None if pruned else began],
            PRUNED: [began, report.get("output_dir"), recipe.get("output_dir")] if pruned else [],
            RECOVERED: [trained.get("output_dir")] if self.recovery else [],
        }
        for key, one in self.homes.items():
            names[key].insert(0, str(one.folder))
        self.names = {key: [str(n) for n in each if n] for key, each in names.items() if any(each)}

    def sources(self) -> Sources:
        """All but evaluations and new samples."""
        first = next(iter(reversed(self.homes.values())))
        home = self.homes.get(PRUNED, first)
        importance = home.importance or self.last.importance
        plan = home.plan or self.last.plan
        recipes = {**home.recipes, **self.last.recipes}
        kinds: tuple[tuple[str, type[Recipe], str], ...] = (
            (RECIPE, PruneConfig, "prune"), (RECOVERY_RECIPE, RecoverConfig, "recover"),
        )  # fmt: skip
        return Sources(
            columns={key: key for key in (DENSE, PRUNED, RECOVERED) if key in self.names},
            report=home.report, recovery=self.recovery, importance=importance,
            widths=importance["widths"] if importance else widths_of_plan(plan) if plan else [],
            sizes={key: one.weights_bytes() for key, one in self.homes.items() if one.weights_bytes()},
            samples=_samples(home.report, self.recovery, PRUNED if PRUNED in self.names else DENSE),
            recipes=[(n, yaml.safe_dump(r, sort_keys=False, allow_unicode=True)) for n, r in recipes.items()],
            commands=[(verb, command(verb, cls, recipes[n], n)) for n, cls, verb in kinds if n in recipes],
            notes=_notes(home.report),
        )  # fmt: skip

    def of(self, name: str, fallback: str | None = None) -> str:
        """The column of a model that goes by ``name``: the same path or name, else the end of one that is known or the
        other way round, else ``fallback``, else a column of its own."""
        same = [key for key, names in self.names.items() if any(_place(n) == _place(name) for n in names)]
        alike = [key for key, names in self.names.items() if any(_ends_alike(n, name) for n in names)]
        for found in (same, alike):
            if len(found) == 1:
                return found[0]
        if fallback is not None:
            return fallback
        return self.others.setdefault(name, Path(name).name or name)


def _place(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name.rstrip("/")


def _ends_alike(one: str, other: str) -> bool:
    """Whether the shorter of two paths, seen from another folder, may be the longer one."""
    a, b = (Path(n).parts for n in (one, other))
    shared = min(len(a), len(b))
    return shared > 0 and a[-shared:] == b[-shared:]


def _target(home: _Home, output: str | Path | None, overwrite: bool) -> Path:
    if output is None:
        return home.folder / PAGE
    path = Path(output).expanduser().absolute()
    if path.is_dir():
        raise PyPruneError("output", str(output), "is a folder", "Name a file, such as report.html.")
    if path.exists() and not overwrite and path != home.folder / PAGE:
        raise PyPruneError("output", str(output), "exists already", "Set overwrite, or name another file.")
    if not path.parent.is_dir():
        raise PyPruneError("output", str(output), f"cannot be made in {path.parent}", "Name a folder that is there.")
    return path


def _beside(columns: _Columns) -> list[tuple[str, Mapping[str, Any]]]:
    """Evaluations that lie in the folders; a name that nobody goes by is then the folder's former one."""
    out = []
    for key, one in columns.homes.items():
        for file in sorted(one.folder.glob(EVALUATIONS)):
            result = _json(file)
            if _is_evaluation(result):
                out += _both(result, columns, key)
    return out


def _given(evaluations: Sequence[Any], columns: _Columns) -> list[tuple[str, Mapping[str, Any]]]:
    out = []
    for one in evaluations:
        result = one if isinstance(one, Mapping) else _json(Path(one).expanduser())
        if not _is_evaluation(result):
            shown = "a result" if isinstance(one, Mapping) else str(one)
            there = isinstance(one, Mapping) or Path(one).expanduser().is_file()
            problem = "is not what `pyprune eval --output` writes" if there else "does not exist"
            raise PyPruneError("evaluations", shown, problem, "Give JSON files that it wrote.")
        out += _both(result, columns, None)
    return out


def _both(result: Any, columns: _Columns, fallback: str | None) -> list[tuple[str, Mapping[str, Any]]]:
    """The evaluation of a model, and of the one beside it."""
    found = [(columns.of(str(result["model"]), fallback), result)]
    other = result.get("compare")
    return [*found, (columns.of(str(other["model"])), other)] if _is_evaluation(other) else found


def _evaluation_commands(results: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The commands of those that were run from a recipe; the model beside one has none of its own."""
    lines = [command("eval", EvaluationConfig, one["recipe"], "") for one in results if one.get("recipe")]
    return [("eval", line) for line in dict.fromkeys(lines)]


def _is_evaluation(result: Any) -> bool:
    return isinstance(result, Mapping) and all(key in result for key in EVALUATED)


def _json(file: Path) -> Any:
    """What a JSON file holds; None when it cannot be read or is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _samples(report: Mapping[str, Any], recovery: Mapping[str, Any] | None, start: str) -> list[dict[str, str]]:
    """Answers that are stored, joined by their prompts; the prompt of ``--prompt`` comes first."""
    found: dict[str, dict[str, str]] = {}
    for one, (before, after) in ((report, (DENSE, PRUNED)), (recovery or {}, (start, RECOVERED))):
        pair = one.get("continuation") or {}
        prompt = pair.get("prompt") or ((one.get("recipe") or {}).get("prompt") if pair else None)
        for sample in [*([{**pair, "prompt": prompt}] if prompt else []), *(one.get("samples") or ())]:
            texts = found.setdefault(sample["prompt"], {"prompt": sample["prompt"]})
            said = ((before, sample.get("before")), (after, sample.get("after")))
            texts |= {key: text for key, text in said if text is not None}
    return list(found.values())


def _ask(
    columns: _Columns, stored: Sequence[Mapping[str, str]], prompts: list[str], tokens: int, opening: dict[str, Any]
) -> list[dict[str, str]]:
    """Stored samples and answers to ``prompts``, of every model whose folder is there; one in memory at a time."""
    from pyprune.checkpoint.load import open_model

    out = {one["prompt"]: dict(one) for one in stored}
    for prompt in prompts:
        out.setdefault(prompt, {"prompt": prompt})
    device = preflight.device(opening["device"])
    for key, names in columns.names.items():
        missing = [p for p in prompts if key not in out[p]]
        place = next((n for n in names if Path(n).expanduser().is_dir()), None)
        option = "model_name_or_path"
        if key == DENSE and columns.dense is not None:
            place, option = columns.dense, "dense"
        if not missing or place is None:
            continue
        with preflight.renamed(model_name_or_path=option):
            model, tokenizer = open_model(
                place, opening["dtype"], None if device == "cpu" else device, opening["trust_remote_code"]
            )
        if tokenizer is None:
            raise PyPruneError("generations", None, f"{place} has no tokenizer to read prompts with")
        for prompt, text in zip(missing, continuations(model, tokenizer, missing, tokens, f"ask {key}"), strict=True):
            out[prompt][key] = text
        del model
    return list(out.values())


def _notes(report: Mapping[str, Any]) -> list[str]:
    read = (report.get("scores") or {}).get("calibration")
    if read and not (report.get("recipe") or {}).get("calibration"):
        return ["The calibration was given as an object in Python, so the command line below lacks it."]
    return []
