"""The whole line from disk to disk: discover, score, select, slice, save."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

from pyprune import preflight
from pyprune.checkpoint.atomic import OTHER_FILES, check_space, check_target, disk_full
from pyprune.checkpoint.load import open_tokenizer
from pyprune.checkpoint.profiles import finish, own_profile
from pyprune.checkpoint.save import save
from pyprune.config import PruneConfig
from pyprune.discovery.groups import Groups
from pyprune.errors import PyPruneError
from pyprune.evaluation.loglikelihood import known_positions
from pyprune.evaluation.stages import Stages
from pyprune.importance.blocks import NotSweepable, find_blocks
from pyprune.importance.cache import own_code
from pyprune.importance.calibration import Calibration, load_calibration
from pyprune.importance.fingerprint import fingerprint
from pyprune.importance.registry import get_criterion
from pyprune.importance.scores import Scores
from pyprune.opening import groups_of
from pyprune.report.data import Report, versions
from pyprune.schedule import equal_scores, requests, without_scores
from pyprune.score_files import blamed_on, scores_of
from pyprune.selection.plan import Plan
from pyprune.selection.select import select
from pyprune.streaming.disk import DiskModel
from pyprune.streaming.scores import score_from_disk
from pyprune.streaming.shards import Slicer, write_shards
from pyprune.streaming.workspace import Workspace, workspace_path
from pyprune.surgery.apply import notice
from pyprune.surgery.skeleton import is_stock

# Of the settings: no result depends on it, or on its contents.
_LEFT_OUT = ("overwrite", "report", "calibration", "scores_file")
_WITHOUT = {
    "eval_text": "Measure with `pyprune eval` what fits into memory.",
    "prompt": "Measure with `pyprune eval` what fits into memory.",
    "generations": "Use `pyprune report --generations` on the result.",
    "prompts": "Use `pyprune report --prompts` on the result.",
    "profile": "Use `pyprune export` on the result.",
    "remove_layers": "Remove layers of a model that fits into memory, or leave it out.",
    "cache": "Finished work is kept beside the output in any case.",
    "activation_memory": "Leave it out: everything is recomputed.",
    "allocation_criterion": "Leave it out: one criterion is measured.",
    "score_tokens": "Bound what is read with samples and length.",
}


class Streamed(NamedTuple):
    """What :func:`prune_from_disk` gives; the smaller model itself lies in the output folder."""

    tokenizer: Any
    groups: Groups
    scores: Scores
    plan: Plan
    report: Report


def prune_from_disk(recipe: PruneConfig, model: Any = None, tokenizer: Any = None) -> Streamed:
    """Prune a model that need not fit into memory: from a folder of safetensors to another one.

    The plan is the one that pruning in memory makes (scores agree to rounding), and for one plan the files are the same
    bytes. Work that is finished is kept in a folder beside the output, and goes when the output is complete: a run that
    was killed goes on behind it when it is started again with the same settings.

    Args:
        recipe: with ``output_dir``, and a model that is a local folder.
        model: must be None.
        tokenizer: for texts; None takes the folder's own.

    Raises:
        PyPruneError: what cannot be streamed is asked for, a shard is missing, weights lie in a pickle only, the disk
            is full, an unfinished run with other settings lies beside the output, and all that ``prune`` refuses.
    """
    folder = check(recipe, model)
    target = check_target(str(recipe.save.output_dir), recipe.save.overwrite)
    recipe, ready = scores_of(recipe)
    stages = Stages()
    with stages("open"):
        options = recipe.model
        disk = DiskModel(folder, options.dtype, preflight.device(options.device), options.trust_remote_code)
        tokenizer = open_tokenizer(str(folder), options.trust_remote_code, folder) if tokenizer is None else tokenizer
    with stages("read text"):
        batches = None if ready is not None else _calibration(recipe, tokenizer, disk.model)
    with stages("discover"):
        groups = groups_of(disk.model)
        (asked,) = requests(recipe.select, groups)
        if ready is None:
            trial = select(groups, equal_scores(groups), **without_scores(asked))
        else:
            with blamed_on(recipe.select.scores_file):
                trial = select(groups, ready, **asked)
        Slicer(disk, trial)  # for its errors: the class must be able to have such widths
        if not workspace_path(target).exists():
            after = trial.details["achieved"]["with_embeddings"]["after"]
            needed = after * disk.model.dtype.itemsize + _stream_bytes(disk, batches) + OTHER_FILES
            with preflight.renamed(folder="output_dir"):
                check_space(target, needed)

    space = Workspace(target, _settings(recipe, disk, batches, ready), recipe.save.overwrite)
    try:
        out = _finish(recipe, disk, groups, batches, ready, asked, trial, space, stages, tokenizer)
    except BaseException as error:
        if disk_full(error) or disk_full(error.__cause__):
            space.close()
            hint = "Free some space and start it again with the same settings: finished layers are kept."
            raise PyPruneError("output_dir", str(target), "the disk is full", hint) from error
        if isinstance(error, PyPruneError):
            space.remove()
        else:  # an interrupt: what is finished stays for the next run
            space.close()
        raise
    space.remove()
    return out


def _finish(
    recipe: PruneConfig, disk: DiskModel, groups: Groups, batches: Calibration | None, ready: Scores | None, asked: Any,
    trial: Plan, space: Workspace, stages: Stages, tokenizer: Any,
) -> Streamed:  # fmt: skip
    """From scores to the folder."""
    with stages("score", bar=False):
        scores = ready or score_from_disk(
            disk, groups, batches, space, recipe.score.criterion, recipe.score.aggregation, trial.details["roles"],
            trial.details["layers"], route=recipe.score.route, seed=recipe.calibration.seed,
        )  # fmt: skip
    with stages("apply"):
        plan = select(groups, scores, **asked)
        slicer = Slicer(disk, plan)
        kinds = ((slicer.resized, "modules are resized"), (slicer.narrowed, "layers become narrow"))
        for names, how in kinds:
            if names:
                warnings.warn(notice(names, type(disk.model.config).__name__, how), stacklevel=2)
    wanted = recipe.to_dict()
    plan.details["asked"] = {k: wanted[k] for k in ("ratio", "target_params", "widths", "iterative_steps")}
    profile = own_profile(slicer.model)
    stock = profile is not None or is_stock(slicer.model.config)
    opening = (
        [] if stock else ["Layers have sizes that plain transformers cannot build; pyprune.load opens the result."]
    )
    report = Report(
        model=str(recipe.model.model_name_or_path),
        model_class=type(slicer.model).__name__,
        parameters=plan.details["achieved"],
        weights_bytes={
            "before": sum(f.stat().st_size for f in disk.files),
            "after": sum(p.numel() * p.element_size() for p in slicer.model.parameters()),
        },
        stages=stages.to_list(),
        plan=plan.details,
        scores={"criterion": scores.criterion, **scores.details},
        recipe=wanted,
        output_dir=str(Path(str(recipe.save.output_dir)).absolute()),
        versions=versions(),
        warnings=[*groups.warnings, *plan.details["notes"], *opening],
    )
    with stages("save", bar=False), preflight.renamed(folder="output_dir"):
        folder = save(
            slicer.model, tokenizer, str(recipe.save.output_dir), plan=plan, report=report, recipe=wanted,
            overwrite=recipe.save.overwrite,
            weights=lambda written, work: write_shards(slicer, written, work, space, recipe.save.max_shard_size),
            finish=None if profile is None else lambda work: finish(work, profile, None),
        )  # fmt: skip
    report.weights_bytes["after"] = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    report.stages = stages.to_list()
    return Streamed(tokenizer, groups, scores, plan, report)


def check(recipe: PruneConfig, model: Any = None) -> Path:
    """What can be refused from the options alone; returns the model's folder."""
    preflight.check_request(recipe)
    if model is not None:
        raise PyPruneError("stream", True, "is for a model on disk, and this one is in memory", "Name its folder.")
    if recipe.save.output_dir is None:
        raise PyPruneError("output_dir", None, "is missing: stream writes from file to file", "Name a folder.")
    if recipe.select.iterative_steps > 1:
        problem = "wants the smaller model of each step in memory"
        raise PyPruneError("iterative_steps", recipe.select.iterative_steps, problem, "Leave it or stream out.")
    criterion = recipe.score.criterion
    if recipe.select.scores_file is None and get_criterion(criterion).of_units:
        hint = "Choose random, l1, l2 or one of the Taylor and Fisher criteria."
        raise PyPruneError("criterion", criterion, "does not go with stream", hint)
    if recipe.compensate.compensation != "none":
        how = recipe.compensate.compensation
        raise PyPruneError("compensation", how, "does not go with stream", "Leave it out, or leave stream out.")
    given = recipe.to_dict()
    for name, hint in _WITHOUT.items():
        if given[name]:
            raise PyPruneError(name, given[name], "does not go with stream", hint)
    name = str(recipe.model.model_name_or_path or "")
    folder = Path(name).expanduser()
    if not name:
        raise PyPruneError("model_name_or_path", None, "no model is given", "Name a folder with safetensors.")
    if not folder.is_dir():
        problem = "does not go with stream, which reads a local folder of safetensors"
        raise PyPruneError("model_name_or_path", name, problem, "Download the model first, and name its folder.")
    return folder


def _calibration(recipe: PruneConfig, tokenizer: Any, model: Any) -> Calibration | None:
    """The batches, or None for a criterion that reads none."""
    if not preflight.needs_batches(recipe.score):
        return None
    asked = recipe.calibration
    found = load_calibration(
        asked.calibration, tokenizer, samples=asked.samples, length=asked.length, batch_size=asked.batch_size,
        seed=asked.seed, field=asked.text_field, longest=known_positions(model), bos=asked.bos,
    )  # fmt: skip
    preflight.check_length("length", found.length, model)
    return found


def _stream_bytes(disk: DiskModel, batches: Calibration | None) -> int:
    """What the residual streams at all borders take on the disk, at the most."""
    if batches is None:
        return 0
    try:
        borders = len(find_blocks(disk.model)) + 3  # and the gradients at two borders
    except NotSweepable:
        return 0  # scoring will say so
    table = disk.model.get_input_embeddings()
    width = 0 if table is None else table.weight.shape[-1] * table.weight.element_size()
    return int(borders * batches.samples * batches.length * width)


def _settings(
    recipe: PruneConfig, disk: DiskModel, batches: Calibration | None, ready: Scores | None
) -> dict[str, Any]:
    """All that the results depend on, under the options' names."""
    given = {name: value for name, value in recipe.to_dict().items() if name not in _LEFT_OUT}
    files = {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in disk.files}
    return {
        **given,
        "model_name_or_path": str(disk.folder.resolve()),
        "files of the model": fingerprint([files, disk.model.config.to_dict()]),
        "calibration": None if batches is None else fingerprint(list(batches.batches)),
        "scores_file": None if ready is None else fingerprint(ready.by_group),
        "versions": {**versions(), "code of pyprune": own_code()},
    }
