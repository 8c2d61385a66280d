"""The whole line: open, prepare, measure, cut, measure again, report, save.

Everything that can be refused is refused before scoring begins: options, names, texts and their length, the output
folder, the disk's room, and whether the size asked for can be reached at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pyprune import layer_removal, method, preflight
from pyprune.checkpoint.outline import open_outline
from pyprune.checkpoint.profiles import check_fits, save_as
from pyprune.checkpoint.save import check_ties, save
from pyprune.compensation.checks import check_plan, check_samples, judged_roles
from pyprune.config import InspectConfig, PruneConfig, ScoringConfig
from pyprune.cutting import Job, cut_down, judge_of, scored
from pyprune.discovery.groups import Groups
from pyprune.evaluation.generation import paired_samples
from pyprune.evaluation.overlap import overlap_notes
from pyprune.evaluation.stages import Stages
from pyprune.importance.calibration import Calibration
from pyprune.importance.modes import in_memory, own_modes
from pyprune.importance.scores import Scores
from pyprune.opening import Opened, calibration_for, groups_of, measure, open_or_take, tensor_bytes
from pyprune.report.data import Report, versions
from pyprune.report_pipeline import add_page, ask
from pyprune.schedule import forget_search
from pyprune.score_files import blamed_on, check_file, scores_of, write_scores
from pyprune.search.plan import check_roles
from pyprune.search.plan import check_samples as check_search_samples
from pyprune.selection.plan import Plan
from pyprune.selection.requests import parse_layers
from pyprune.selection.scope import layer_count, roles_to_share
from pyprune.selection.searched import ON_MODEL
from pyprune.selection.select import goal_of
from pyprune.stage_options import AUTO, SaveConfig
from pyprune.streaming.run import prune_from_disk
from pyprune.surgery.apply import bare, check_model
from pyprune.surgery.skeleton import is_stock
from pyprune.surgery.writable import check_writable, saved_as
from pyprune.texts import evaluation_windows, page_prompts
from pyprune.trial import first_that_fits


@dataclass
class PruneResult:
    """What :func:`prune` gives.

    Attributes:
        model: the smaller model, of the same class; None with ``stream``, which leaves it on disk.
        tokenizer: as given or opened; None without one.
        groups: what is coupled in the dense model.
        scores: of the dense model, for the roles and layers that could be cut; with ``remove_layers`` of the model that
            it leaves, or, when nothing else goes, what each layer is worth.
        plan: over the dense model's groups, also when it was made in several steps.
        report: what was asked and measured.
        recipe: every option.
    """

    model: Any
    tokenizer: Any
    groups: Groups
    scores: Scores
    plan: Plan
    report: Report
    recipe: PruneConfig


def prune(
    model: Any, *, tokenizer: Any = None, config: str | Path | None = None, copy: bool = False, **options: Any
) -> PruneResult:
    """Prune a causal language model: the whole line.

        out = pyprune.prune("folder", ratio=0.2, calibration="train.txt", eval_text="test.txt", output_dir="smaller")
        out = pyprune.prune(model, ratio=0.2, calibration=token_ids)  # int64 [samples, length]

    Args:
        model: a folder, a hub name, or a transformers model. **A model's weights are used up**: they move to the
            smaller one.
        tokenizer: for texts, when ``model`` is an object.
        config: a YAML recipe; ``options`` win over it.
        copy: leave a model object as it is, at the price of memory for both.
        options: those of ``pyprune prune --help`` under the same names: ``ratio``, ``target_params``, ``widths``,
            ``criterion``, ``calibration``, ``samples``, ``length``, ``allocation``, ``roles``, ``layers``,
            ``iterative_steps``, ``eval_text``, ``output_dir``, ... Here ``calibration`` is also token ids or any
            iterable of batches, and ``eval_text`` also token ids.

    Returns:
        The smaller model, its plan and report; saved too when ``output_dir`` is given.

    Raises:
        PyPruneError: an option that does not exist or cannot be met, or an input that cannot be used. Nothing is left
            behind.
    """
    by_name = isinstance(model, (str, Path))
    recipe = PruneConfig.build({**options, "model_name_or_path": model} if by_name else options, config)
    return run(recipe, None if by_name else model, tokenizer, copy)


@own_modes()
def run(
    recipe: PruneConfig, model: Any = None, tokenizer: Any = None, copy: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> PruneResult:  # fmt: skip
    """:func:`prune` with its options gathered in a recipe.

    Args:
        say: takes a line for the user before long work begins.
    """
    recipe = method.for_profile(recipe)
    if recipe.streaming.stream:
        streamed = PruneResult(None, *prune_from_disk(recipe, model, tokenizer), recipe)
        if recipe.page.report:
            add_page(str(recipe.save.output_dir), streamed.groups, streamed.scores, streamed.plan)
        return streamed
    preflight.check_request(recipe)
    stages = Stages()
    dense = open_or_take(recipe.model, stages, model, tokenizer)
    dense.model = in_memory(bare(dense.model))
    check_model(dense.model)
    job, texts = _prepare(recipe, dense, stages)
    recipe = job.recipe
    if recipe.save.output_dir is None:
        say(preflight.UNSAVED)
    before = _figures(dense.model, dense.tokenizer, recipe, texts, stages, " before")
    texts.prompts = texts.prompts[: len(before["samples"])]
    cut = cut_down(job, dense, stages, copy)
    recipe = method.for_saving(recipe, cut.model)
    notes = _complete(cut.plan, recipe)
    after = _figures(cut.model, dense.tokenizer, recipe, texts, stages, " after")
    report = Report(
        model=dense.name,
        model_class=type(cut.model).__name__,
        parameters=cut.plan.details["achieved"],
        weights_bytes={"before": dense.weights_bytes, "after": tensor_bytes(cut.model)},
        perplexity=_paired(before, after, "perplexity"),
        continuation=_paired(before, after, "continuation", prompt=recipe.evaluation.prompt),
        samples=paired_samples(texts.prompts, before["samples"], after["samples"]),
        stages=stages.to_list(),
        plan=cut.plan.details,
        scores={"criterion": cut.scores.criterion, **cut.scores.details},
        depth=cut.depth,
        basis=None if cut.basis is None else cut.basis.to_dict(),
        compensation=[c.to_dict() for c in cut.compensations] or None,
        recipe=recipe.to_dict(),
        versions=versions(),
        warnings=[
            *job.groups.warnings,
            *overlap_notes(recipe.calibration.calibration, job.batches, recipe.evaluation.eval_text, texts.windows),
            *notes,
            *cut.notes,
            *_how_to_open(cut.model, recipe.save),
        ],
    )
    if recipe.save.output_dir is not None:
        _save(cut.model, dense.tokenizer, cut.plan, report, recipe, stages)
        if recipe.page.report:
            add_page(recipe.save.output_dir, job.groups, cut.scores, cut.plan)
        if recipe.select.allocation == "search":
            forget_search(recipe)
    return PruneResult(cut.model, dense.tokenizer, job.groups, cut.scores, cut.plan, report, recipe)


@dataclass
class _Texts:
    """What the dense and the smaller model are measured on: windows [windows, length] or None, the name of their text,
    and prompts."""

    windows: Tensor | None
    name: str
    prompts: list[str]


def _prepare(recipe: PruneConfig, dense: Opened, stages: Stages) -> tuple[Job, _Texts]:
    """What is to be done, once nothing that can be known before scoring stands against it.

    Raises:
        PyPruneError: something does.
    """
    recipe, ready = scores_of(recipe)
    with stages("read text"):
        batches = None
        if _reads_batches(recipe, scored=ready is None):
            batches = calibration_for(dense, recipe.calibration)
        windows, name = evaluation_windows(recipe.evaluation, dense.model, dense.tokenizer)
    with stages("discover"):
        groups = groups_of(dense.model)
        ways = method.ways(recipe, groups, 0 if batches is None else batches.samples)
        with blamed_on(recipe.select.scores_file):
            settled, requests, trial, smallest = first_that_fits(ways, dense.model, groups, batches, ready)
        method.tell(recipe, settled)
        recipe = settled
        roles, layers = trial.details["roles"], trial.details["layers"]
        if batches is not None:
            _check_batches(recipe, trial, batches)
        if recipe.save.profile is not None:
            check_fits(recipe.save.profile, smallest, dense.tokenizer)
        if recipe.save.is_folder:
            check_ties(dense.model)
            if recipe.select.allocation == "uniform":  # others may do without common widths that the class refuses
                check_writable(smallest.config)
        preflight.check_space(recipe.save, trial.details["achieved"]["with_embeddings"]["after"], dense.model)
    texts = _Texts(windows, name, page_prompts(recipe, dense.tokenizer))
    judge = judge_of(recipe)
    if judge is not None:
        judged_roles(roles, judge.criterion)
    return Job(recipe, groups, batches, ready, requests, roles, layers), texts


def _check_batches(recipe: PruneConfig, trial: Plan, batches: Calibration) -> None:
    """Raises PyPruneError: the text, or what goes, is not one that widths can be measured on or a cut made up for."""
    if recipe.select.allocation in ON_MODEL:
        check_roles([r for r in trial.details["roles"] if r not in ("layers", "sublayers")])
        check_search_samples(batches)
    how = recipe.compensate
    if how.compensation != "none":
        whole = recipe.depth.remove_layers is None
        check_plan(trial if whole else layer_removal.inside(trial), how.compensation)
        check_samples(batches, how.compensation, how.compensation_gains)


def _figures(
    model: Any, tokenizer: Any, recipe: PruneConfig, texts: _Texts, stages: Stages, when: str
) -> dict[str, Any]:
    """Perplexity, continuation and samples of one model."""
    found = measure(model, tokenizer, recipe.evaluation, texts.windows, texts.name, stages, when)
    return {**found, "samples": ask(model, tokenizer, texts.prompts, recipe, stages, when)}


def _complete(plan: Plan, recipe: PruneConfig) -> list[str]:
    """Adds what was asked to a plan; what it has to say to the user."""
    wanted, size = recipe.to_dict(), recipe.select
    plan.details["asked"] = {k: wanted[k] for k in ("ratio", "target_params", "widths", "iterative_steps")}
    if "steps" in plan.details and (size.ratio or size.target_params) is not None:
        found = plan.details["achieved"]["with_embeddings" if size.count_embeddings else "without_embeddings"]
        goal = goal_of(size.ratio, size.target_params, found["before"])
        plan.details["notes"] += goal.missed_by(found["after"])
    return plan.details["notes"]


def inspect_model(recipe: InspectConfig) -> tuple[str, Groups]:
    """Class name and groups of a model; only its configuration is read."""
    model = open_outline(preflight.named(recipe.model.model_name_or_path), recipe.model.trust_remote_code)
    return type(model).__name__, groups_of(model)


@own_modes()
def score_model(recipe: ScoringConfig, model: Any = None) -> tuple[Groups, Scores]:
    """Groups and scores of a model; the scores are saved too when ``output_file`` is given."""
    preflight.check_scoring(recipe.score, recipe.calibration.calibration)
    check_file(recipe.save)
    stages = Stages()
    dense = open_or_take(recipe.model, stages, model)
    with stages("read text"):
        batches = calibration_for(dense, recipe.calibration) if preflight.needs_batches(recipe.score) else None
    with stages("discover"):
        groups = groups_of(dense.model)
        roles = roles_to_share(groups, recipe.scope.roles, ())
        layers = None if recipe.scope.layers is None else parse_layers(recipe.scope.layers, layer_count(groups))
    with stages("score", bar=False):
        scores = scored(dense.model, groups, batches, recipe.score, roles, layers, recipe.calibration.seed)
    if recipe.save.output_file is not None:
        write_scores(scores, recipe.save.output_file)
    return groups, scores


def _reads_batches(recipe: PruneConfig, scored: bool) -> bool:
    """Whether any stage reads calibration; ``scored``: criterion included."""
    second = recipe.select.allocation_criterion
    if second == AUTO:  # whichever it comes to
        return True
    asked = [recipe.score] * scored + ([] if second is None else [replace(recipe.score, criterion=second, route=None)])
    if recipe.depth.remove_layers is not None or recipe.compensate.compensation != "none":
        return True
    if recipe.basis.value_basis == "principal":
        return True
    return recipe.select.allocation in ON_MODEL or any(preflight.needs_batches(c) for c in asked)


def _paired(before: dict[str, Any], after: dict[str, Any], key: str, **more: Any) -> dict[str, Any] | None:
    return None if before[key] is None else {**more, "before": before[key], "after": after[key]}


def _save(model: Any, tokenizer: Any, plan: Plan, report: Report, recipe: PruneConfig, stages: Stages) -> None:
    """Save, and complete the report with what is known only afterwards: the files' size and the time it took."""
    target, plain = str(recipe.save.output_dir), recipe.to_dict()
    report.output_dir = str(Path(target).absolute())
    with stages("save"), preflight.renamed(folder="output_dir"):
        options: dict[str, Any] = {
            "plan": plan, "report": report, "recipe": plain, "overwrite": recipe.save.overwrite,
            "max_shard_size": recipe.save.max_shard_size,
        }  # fmt: skip
        if recipe.save.profile is None:
            folder = save(model, tokenizer, target, **options)
        else:
            folder = save_as(recipe.save.profile, model, tokenizer, target, **options)
    written = [*folder.glob("*.safetensors"), *folder.glob("*.gguf")]
    report.weights_bytes["after"] = sum(f.stat().st_size for f in written)
    report.stages = stages.to_list()


def _how_to_open(model: Any, config: SaveConfig) -> list[str]:
    other = saved_as(model) if config.is_folder else None
    if other is not None:
        return [other[2]]
    if is_stock(model.config) or config.profile is not None:
        return []
    return ["Layers have sizes that plain transformers cannot build, so only pyprune.load opens the result."]
