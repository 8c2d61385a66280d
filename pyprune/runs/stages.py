"""The stages of a run: what each reads, what it leaves, and how it is run through the verb of its name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyprune.errors import PyPruneError
from pyprune.runs.identity import Hashes, Identity, of_name
from pyprune.runs.recipe import RunRecipe, options_of
from pyprune.runs.record import write_json
from pyprune.units import perplexity, size

LIKELIHOODS = ".likelihoods.jsonl"  # log-likelihoods of an evaluation, kept as they come


class RunStage(ABC):
    """One stage of a run.

    Attributes:
        name: its section.
        after: the stages whose results it reads, when they are in the run.
    """

    name: str
    after: tuple[str, ...] = ()

    def __init__(self, run: RunRecipe) -> None:
        self.run = run
        self.recipe: Any = run.sections[self.name]

    @abstractmethod
    def outputs(self) -> list[Path]:
        """What it leaves: folders and files, each complete or not there."""

    @abstractmethod
    def execute(self, resume: bool) -> str:
        """Run it, replacing what is at the outputs; a line on what came of it.

        Args:
            resume: the same stage was interrupted, and may go on.
        """

    @abstractmethod
    def check(self) -> None:
        """Raises PyPruneError for what can be refused before anything runs."""

    def models(self) -> dict[str, str]:
        """Input name -> folder or hub name of the models it opens, those of earlier stages left out."""
        return {}

    def sources(self) -> dict[str, Any]:
        """Option -> file, dataset name, or a sequence of them."""
        return {}

    def options(self) -> dict[str, Any]:
        """Option -> plain value of all that its result depends on."""
        return options_of(self.name, self.recipe)

    def inputs(self, hashes: Hashes) -> dict[str, Identity]:
        """Identity of all that it reads but the results of earlier stages."""
        out = {name: identity(model, hashes, of_name) for name, model in self.models().items()}
        for option, given in self.sources().items():
            for source in given if isinstance(given, (list, tuple)) else [given]:
                if source is None:
                    continue
                if not isinstance(source, str):
                    problem = "is no file or dataset name, and a run knows its inputs by them"
                    raise PyPruneError(option, type(source).__name__, problem, "Write the values into a file.")
                out[f"{option} {source}"] = identity(source, hashes, lambda name: {"": name})
        return out

    def forget(self) -> None:
        """Remove what an interrupted execution left to go on from, where it lies outside the outputs."""
        return None

    def _check_model(self) -> None:
        """The dense model is there, the device too, and the positions of a local one hold evaluation windows."""
        from pyprune import preflight

        preflight.check_model(self.run.model)
        opening = self.recipe.model
        preflight.device(opening.device)
        if Path(self.run.model).is_dir():
            preflight.check_windows(self.recipe.evaluation, replace(opening, model_name_or_path=self.run.model))


class Prune(RunStage):
    name = "prune"

    def outputs(self) -> list[Path]:
        return [pruned(self.run)]

    def models(self) -> dict[str, str]:
        return {"model": self.run.model}

    def sources(self) -> dict[str, Any]:
        own = self.recipe
        return {"calibration": own.calibration.calibration, "eval_text": own.evaluation.eval_text,
                "scores_file": own.select.scores_file, "prompts": _file(own.page.prompts)}  # fmt: skip

    def options(self) -> dict[str, Any]:
        """As the export's profile has them, so that another profile cuts anew where it holds other widths."""
        return options_of(self.name, self._verb())

    def check(self) -> None:
        from pyprune import method, preflight
        from pyprune.streaming import run as streaming

        self._check_model()
        profile, later = self.recipe.save.profile, [s for s in ("recover", "eval", "export") if s in self.run.sections]
        if profile in ("gguf", "hetero-decilm") and later:
            problem = f"is a form that the stages {', '.join(later)} do not go on from"
            raise PyPruneError("profile", profile, problem, "Put it into section export; prune keeps to its widths.")
        verb = method.for_profile(self._verb())
        if verb.streaming.stream:
            streaming.check(verb)
        else:
            preflight.check_request(verb)

    def execute(self, resume: bool) -> str:
        from pyprune import pipeline

        report = pipeline.run(self._verb()).report
        counts = report.parameters["with_embeddings"]
        line = f"{counts['before']:,} -> {counts['after']:,} parameters (-{100 * counts['ratio']:.1f} %)"
        return line + _perplexities(report.perplexity)

    def _verb(self) -> Any:
        """The verb's recipe; the cut keeps to widths that the profile of the export holds."""
        from pyprune.method import for_profile
        from pyprune.preflight import hold_to_profile

        own = self.recipe
        own = replace(
            own, model=replace(own.model, model_name_or_path=self.run.model), select=replace(own.select),
            save=replace(own.save, output_dir=str(self.outputs()[0]), overwrite=True),
        )  # fmt: skip
        export = self.run.sections.get("export")
        if export is not None and own.save.profile is None:
            profile = export.export.profile  # type: ignore[attr-defined]
            own.select = for_profile(replace(own, save=replace(own.save, profile=profile))).select
            hold_to_profile(own.select, profile)
        return own


class Recover(RunStage):
    name = "recover"
    after = ("prune",)

    def outputs(self) -> list[Path]:
        return [recovered(self.run)]

    def models(self) -> dict[str, str]:
        out = {} if "prune" in self.run.sections else {"model": self.run.model}
        teacher, adapter = self.recipe.distill.teacher, self.recipe.adapter.adapter
        return out | {k: v for k, v in (("teacher", teacher), ("adapter", adapter)) if v is not None}

    def sources(self) -> dict[str, Any]:
        data = self.recipe.data
        return {"data": [s for s, _ in data.data or ()], "val_data": [s for s, _ in data.val_data or ()],
                "eval_text": self.recipe.evaluation.eval_text,
                "prompts": _file(self.recipe.page.prompts)}  # fmt: skip

    def check(self) -> None:
        from pyprune import preflight
        from pyprune.recover_preflight import check

        self._check_model()
        if self.recipe.distill.teacher is not None:
            preflight.check_model(self.recipe.distill.teacher, "teacher")
        check(self._verb())

    def execute(self, resume: bool) -> str:
        from pyprune import recover_pipeline

        report = recover_pipeline.run(self._verb(resume)).report
        found = report.get("validation")
        if found is None:
            return "adapter merged" + _perplexities(report["perplexity"])
        before, after = (found[k]["perplexity"] for k in ("before", "after"))
        line = f"{report['steps']:,} steps, validation perplexity {before:.2f} -> {after:.2f}"
        return line + _perplexities(report["perplexity"])

    def _verb(self, resume: bool = False) -> Any:
        own = self.recipe
        return replace(
            own, model=replace(own.model, model_name_or_path=source(self.run, self.after)),
            resuming=replace(own.resuming, resume=resume),
            save=replace(own.save, output_dir=str(self.outputs()[0]), overwrite=True),
        )  # fmt: skip


class Evaluate(RunStage):
    name = "eval"
    after = ("prune", "recover")

    def outputs(self) -> list[Path]:
        return [self.run.output_dir / "eval" / f"{name}.json" for name in self._smaller() or ("dense",)]

    def models(self) -> dict[str, str]:
        return {"model": self.run.model}

    def sources(self) -> dict[str, Any]:
        tasks = [t for t in self.recipe.tasks.tasks or () if Path(t).exists()]
        return {"eval_text": self.recipe.evaluation.eval_text, "tasks": tasks}

    def check(self) -> None:
        from pyprune import assess

        self._check_model()
        assess.check(self.recipe)

    def execute(self, resume: bool) -> str:
        from pyprune import assess

        own, files = self.recipe, self.outputs()
        own = replace(own, model=replace(own.model, model_name_or_path=self.run.model))
        files[0].parent.mkdir(parents=True, exist_ok=True)
        if own.tasks.tasks is not None and own.tasks.resume_file is None:
            own = replace(own, tasks=replace(own.tasks, resume_file=str(self._likelihoods())))
        smaller = self._smaller()
        found = assess.run_beside(own, list(smaller.values())) if smaller else [assess.run(own)]
        for file, figures in zip(files, found, strict=True):
            write_json(file, figures)
        named = [(file.stem, figures) for file, figures in zip(files, found, strict=True)]
        return evaluation_line([("dense", found[0]["compare"]), *named] if smaller else named)

    def forget(self) -> None:
        self._likelihoods().unlink(missing_ok=True)

    def _likelihoods(self) -> Path:
        return self.run.output_dir / "eval" / LIKELIHOODS

    def _smaller(self) -> dict[str, str]:
        """What the dense model is compared with."""
        places = {"prune": pruned(self.run), "recover": recovered(self.run)}
        return {places[s].name: str(places[s]) for s in self.after if s in self.run.sections}


class Export(RunStage):
    name = "export"
    after = ("prune", "recover")

    def outputs(self) -> list[Path]:
        own = self.recipe.export
        if own.output is not None:
            return [Path(own.output).absolute()]
        return [self.run.output_dir / ("model.gguf" if own.profile == "gguf" else "exported")]

    def models(self) -> dict[str, str]:
        return {} if any(s in self.run.sections for s in self.after) else {"model": self.run.model}

    def check(self) -> None:
        from pyprune import preflight
        from pyprune.checkpoint.load import open_tokenizer
        from pyprune.checkpoint.outline import open_outline
        from pyprune.checkpoint.profiles.writing import check_fits, check_output, get_profile

        for model in self.models().values():
            preflight.check_model(model)
        get_profile(self.recipe.export.profile)
        self._check_apart()
        if self.recipe.export.output is not None:  # the work folder is made by the run
            check_output(self.outputs()[0], self.recipe.export.profile, overwrite=True)
        folder = Path(self.run.model)
        if self.recipe.export.profile == "gguf" and folder.is_dir():
            # Cutting changes neither architecture nor tokenizer, so what llama.cpp lacks is known before the cut.
            allowed = self.recipe.model.trust_remote_code
            check_fits("gguf", open_outline(folder, allowed), open_tokenizer(str(folder), allowed, folder))

    def _check_apart(self) -> None:
        """The output is neither within nor around a model that the run reads, or what another stage makes."""
        output = self.outputs()[0]
        paths = [pruned(self.run), recovered(self.run), Path(self.run.model)]
        for kind in STAGES:
            if kind.name in self.run.sections and kind is not Export:
                paths += [*kind(self.run).outputs(), *map(Path, kind(self.run).models().values())]
        target = output.resolve()
        for path in (p.resolve() for p in paths):
            if path.is_relative_to(target) or target.is_relative_to(path):
                problem = f"overlaps {path}, which this run reads or makes"
                raise PyPruneError("output", str(output), problem, "Name another place.")

    def execute(self, resume: bool) -> str:
        from pyprune.checkpoint.profiles import export

        own = self.recipe.export
        path = export(
            source(self.run, self.after), self.outputs()[0], own.profile, dtype=own.dtype, overwrite=True,
            trust_remote_code=self.recipe.model.trust_remote_code,
        )  # fmt: skip
        files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
        return f"{own.profile}, {size(sum(f.stat().st_size for f in files))}"


class WriteReport(RunStage):
    name = "report"
    after = ("prune", "recover", "eval")

    def outputs(self) -> list[Path]:
        return [self.run.output_dir / "report.html"]

    def sources(self) -> dict[str, Any]:
        return {"eval": self.recipe.report.eval, "prompts": _file(self.recipe.report.prompts)}

    def check(self) -> None:
        from pyprune import preflight
        from pyprune.evaluation.generation import sample_prompts

        own = self.recipe.report
        if "prune" not in self.run.sections and "recover" not in self.run.sections:
            hint = "Add a section prune or recover, or leave section report out."
            raise PyPruneError("report", None, "shows a pruned or recovered model, and there is none", hint)
        preflight.device(self.recipe.model.device)
        if own.generations or own.prompts is not None:
            sample_prompts(own.prompts, own.generations)
        for file in own.eval or ():
            if not Path(file).is_file():
                raise PyPruneError("eval", file, "does not exist", "Give a file of `pyprune eval --output`.")

    def execute(self, resume: bool) -> str:
        from pyprune.report_pipeline import write_report

        own, opening, sections = self.recipe.report, self.recipe.model, self.run.sections
        measured = Evaluate(self.run).outputs() if "eval" in sections else []
        both = "prune" in sections and "recover" in sections
        file = write_report(
            pruned(self.run) if "prune" in sections else recovered(self.run), dense=self.run.model,
            recovered=recovered(self.run) if both else None, evaluations=[*measured, *(own.eval or ())],
            output=self.outputs()[0], overwrite=True, generations=own.generations, prompts=own.prompts,
            max_new_tokens=own.max_new_tokens, dtype=opening.dtype, device=opening.device,
            trust_remote_code=opening.trust_remote_code,
        )  # fmt: skip
        return f"{file.stat().st_size / 1e3:,.0f} kB"


STAGES: tuple[type[RunStage], ...] = (Prune, Recover, Evaluate, Export, WriteReport)
"""In the order of a run."""


def pruned(run: RunRecipe) -> Path:
    return run.output_dir / "pruned"


def recovered(run: RunRecipe) -> Path:
    return run.output_dir / "recovered"


def source(run: RunRecipe, stages: Sequence[str]) -> str:
    """The model that the last of ``stages`` in the run leaves; the dense one without any."""
    places = {"prune": pruned(run), "recover": recovered(run)}
    found = [places[s] for s in stages if s in run.sections]
    return str(found[-1]) if found else run.model


def identity(name: str, hashes: Hashes, otherwise: Any) -> Identity:
    """What is at a path; what ``otherwise`` says of a name that is none."""
    path = Path(name)
    return hashes.of(path) if path.exists() else otherwise(name)


def evaluation_line(figures: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Perplexities and mean accuracies of the models, in their order."""
    parts = []
    if figures[0][1]["perplexity"] is not None:
        found = ", ".join(f"{name} {perplexity(f['perplexity']['perplexity'])}" for name, f in figures)
        parts.append(f"perplexity: {found}")
    if figures[0][1]["tasks"]:
        means = ((name, [t["acc"] for t in f["tasks"]]) for name, f in figures)
        found = ", ".join(f"{name} {100 * sum(accs) / len(accs):.1f} %" for name, accs in means)
        parts.append(f"mean accuracy: {found}")
    if figures[0][1]["speed"] is not None:
        parts.append("decode tokens/s: " + ", ".join(f"{n} {f['speed']['decode']:.1f}" for n, f in figures))
    return "; ".join(parts) or "continuations"


def _file(prompts: Any) -> str | None:
    """Prompts by the name of their file; a list of them is an option's value and no input."""
    return prompts if isinstance(prompts, str) else None


def _perplexities(found: Any) -> str:
    if not found:
        return ""
    before, after = (found[k]["perplexity"] for k in ("before", "after"))
    return f"; perplexity {perplexity(before)} -> {perplexity(after)}"
