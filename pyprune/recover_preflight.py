"""What a recovery begins with: the model, the text as rows, the teacher, the folder of checkpoints; all checked."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml

from pyprune import preflight
from pyprune.checkpoint.atomic import OTHER_FILES, check_space, check_target, complete_folder
from pyprune.checkpoint.load import check_finite, open_model
from pyprune.checkpoint.save import IMPORTANCE, PLAN, RECIPE, REPORT, check_ties
from pyprune.config import RecoverConfig
from pyprune.errors import PyPruneError
from pyprune.evaluation.generation import sample_prompts
from pyprune.evaluation.loglikelihood import known_positions
from pyprune.evaluation.stages import Stages
from pyprune.importance.calibration import check_ids
from pyprune.importance.fingerprint import fingerprint_of_weights
from pyprune.importance.modes import in_memory
from pyprune.ops.product import fast_bf16
from pyprune.recovery import adapter
from pyprune.recovery.examples import Encoder
from pyprune.recovery.mixture import Reading, Text, read_text
from pyprune.recovery.packing import isolates
from pyprune.recovery.processes import Processes
from pyprune.recovery.records import check_source
from pyprune.recovery.teacher import Teacher, check_vocabulary
from pyprune.recovery.train import Training, autocast
from pyprune.recovery.unfinished import Unfinished
from pyprune.recovery_options import DistillConfig
from pyprune.selection.plan import Plan
from pyprune.surgery.apply import bare

HIGHEST_RATE = 2e-3
CUTOFF = 512  # tokens of a training sequence, when nothing is said


@dataclass
class Start:
    """The model as it comes, and what lies beside it in its folder."""

    model: Any
    tokenizer: Any
    name: str
    device: torch.device
    plan: Plan | None = None
    report: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] | None = None
    importance: str | None = None


@dataclass
class Ready:
    """What training needs, all of it checked."""

    text: Text
    settings: Training
    lora: adapter.Lora
    cutoff: int
    positions: bool
    teacher: Teacher | None
    unfinished: Unfinished | None
    identity: str
    notes: list[str]


def check(recipe: RecoverConfig) -> None:
    """Options fit together, sources are there, the output may be written."""
    if find_spec("peft") is None:
        raise PyPruneError("recover", None, "needs the package peft", "pip install 'pyprune[recovery]'.")
    given, merging = recipe.data, recipe.adapter.adapter
    if merging is not None and (given.data is not None or recipe.resuming.preset is not None):
        problem = "merges an adapter that is there, while data trains a new one"
        raise PyPruneError("adapter", merging, problem, "Give one of them.")
    if merging is not None:
        adapter.check_adapter(Path(merging))
    elif given.data is None:
        hint = "Give a file or a dataset, such as yahma/alpaca-cleaned, or an adapter to merge."
        raise PyPruneError("data", None, "there is nothing to learn from", hint)
    for option in ("data", "val_data"):
        for source, _ in getattr(given, option) or ():
            check_source(source, option)
    for name, value in vars(recipe.distill).items():
        if recipe.distill.teacher is None and value != getattr(DistillConfig(), name):
            raise PyPruneError(name, value, "there is no teacher", "Give teacher too.")
    if recipe.adapter.keep_adapter and recipe.save.output_dir is None:
        raise PyPruneError("keep_adapter", None, "needs a folder to save in", "Give output_dir.")
    if recipe.resuming.resume and work_folder(recipe) is None:
        raise PyPruneError("resume", None, "needs a folder that holds checkpoints", "Give output_dir.")
    work = work_folder(recipe)
    if work is not None and not next(p for p in (work, *work.parents) if p.exists()).is_dir():
        problem = "cannot be made: there is a file in its place"
        raise PyPruneError("checkpoint_dir", str(work), problem, "Name another folder.")
    if recipe.save.output_dir is not None:
        preflight.check_apart(
            recipe.save.output_dir,
            read={
                "model_name_or_path": recipe.model.model_name_or_path,
                "teacher": recipe.distill.teacher,
                "adapter": merging,
                **{o: [source for source, _ in getattr(given, o) or ()] for o in ("data", "val_data")},
                "eval_text": recipe.evaluation.eval_text,
                "prompts": recipe.page.prompts,
            },
            kept={"checkpoint_dir": recipe.resuming.checkpoint_dir, "distill_cache": recipe.distill.distill_cache},
        )
        with preflight.renamed(folder="output_dir"):
            check_target(recipe.save.output_dir, recipe.save.overwrite)
    preflight.check_evaluation(recipe.evaluation)
    if recipe.page.generations is not None or recipe.page.prompts is not None:
        sample_prompts(recipe.page.prompts, recipe.page.generations)


def open_start(
    recipe: RecoverConfig, stages: Stages, processes: Processes, wanted: str, model: Any, tokenizer: Any
) -> Start:
    if model is not None:
        preflight.check_object(model, recipe.model)
        in_memory(bare(model))
        name = getattr(model, "name_or_path", "") or type(model).__name__
        check_finite(model, name)
        return Start(model, tokenizer, name, next(model.parameters()).device)
    name = preflight.named(recipe.model.model_name_or_path)
    device = processes.device(wanted)
    with stages("load"):
        model, own = open_model(
            name, recipe.model.dtype, None if device.type == "cpu" else device, recipe.model.trust_remote_code
        )
    start = Start(model, own if tokenizer is None else tokenizer, name, device)
    folder = Path(name)
    with suppress(OSError, ValueError, KeyError):  # a folder that prune did not write
        start.report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    with suppress(OSError, ValueError, KeyError):
        start.plan = Plan.from_json((folder / PLAN).read_text(encoding="utf-8"))
    with suppress(OSError, ValueError):
        start.importance = (folder / IMPORTANCE).read_text(encoding="utf-8")
    with suppress(OSError, yaml.YAMLError):
        start.recipe = yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8"))
    return start


def cutoff_of(recipe: RecoverConfig, model: Any) -> int:
    """Tokens in a training sequence: as asked, else 512, or as many as the model has positions.

    Raises:
        PyPruneError: more than that were asked.
    """
    if recipe.data.cutoff is not None:
        preflight.check_length("cutoff", recipe.data.cutoff, model)
        return recipe.data.cutoff
    known = known_positions(model)
    return CUTOFF if known is None else min(CUTOFF, known)


def usual_rate(model: Any) -> float:
    """1 / hidden size, at most 0.002: Adam's best rate falls with the width of what it trains (Yang et al. 2022)."""
    return min(HIGHEST_RATE, 1 / int(model.get_input_embeddings().embedding_dim))


def check_room(recipe: RecoverConfig, start: Start) -> None:
    if recipe.save.output_dir is not None:
        check_ties(start.model)
        size = sum(p.numel() * p.element_size() for p in start.model.parameters())
        with preflight.renamed(folder="output_dir"):
            check_space(Path(recipe.save.output_dir).absolute(), size + OTHER_FILES)


def work_folder(recipe: RecoverConfig) -> Path | None:
    if recipe.resuming.checkpoint_dir is not None:
        return Path(recipe.resuming.checkpoint_dir).absolute()
    if recipe.save.output_dir is None:
        return None
    path = Path(recipe.save.output_dir).absolute()
    return path.with_name(f"{path.name}.unfinished")


def prepare(recipe: RecoverConfig, start: Start, stages: Stages) -> Ready:
    options, notes, cutoff = recipe.data, [], cutoff_of(recipe, start.model)
    positions = isolates(start.model)
    packing = options.packing and positions
    if options.packing and not positions:
        notes.append(f"{type(start.model).__name__} would mix documents of a row, so each has a row of its own.")
    encoder = Encoder(start.tokenizer, options.data_field, options.instruction_format, options.train_on_prompts)
    reading = Reading(cutoff, packing, recipe.train.seed, options.max_tokens)
    with stages("read text", bar=False):
        text = read_text(options.data, options.val_data, encoder, reading, options.val_tokens)
    _check_ids(text, start)
    bf16 = recipe.train.bf16
    own = {f.name: getattr(recipe.train, f.name) for f in fields(Training) if hasattr(recipe.train, f.name)}
    taught = recipe.distill.teacher is not None
    settings = Training(**{
        **own,
        "learning_rate": recipe.train.learning_rate or usual_rate(start.model),
        "bf16": fast_bf16(start.device) if bf16 is None else bf16,
        "distill_weight": recipe.distill.distill_weight if taught else 0.0,
        "distill_temperature": recipe.distill.distill_temperature,
    })  # fmt: skip
    chosen = recipe.adapter
    lora = adapter.Lora(chosen.lora_r, chosen.lora_alpha or 2 * chosen.lora_r, chosen.lora_dropout, chosen.lora_targets)
    adapter.targets_of(start.model, lora.targets)  # for its errors
    identity = adapter.fingerprint(start.model)
    teacher = _teacher(recipe, start, settings, positions, stages) if taught else None
    unfinished = _unfinished(recipe, text, settings, lora, start.model, teacher)
    return Ready(text, settings, lora, cutoff, positions, teacher, unfinished, identity, notes)


def _check_ids(text: Text, start: Start) -> None:
    """Token ids that came as such have rows in the model's embedding."""
    rows = start.model.get_input_embeddings().num_embeddings
    for row in (*(r for source in text.sources for r in source), *text.validation):
        check_ids(torch.from_numpy(row.ids), rows, "data", None)


def _teacher(recipe: RecoverConfig, start: Start, settings: Training, positions: bool, stages: Stages) -> Teacher:
    name = str(recipe.distill.teacher)
    device = None if start.device.type == "cpu" else start.device
    with stages("load teacher"), preflight.renamed(model_name_or_path="teacher", folder="teacher"):
        model, tokenizer = open_model(name, recipe.model.dtype, device, recipe.model.trust_remote_code)
    check_vocabulary(model, tokenizer, start.model, start.tokenizer, name)
    preflight.check_length("cutoff", cutoff_of(recipe, start.model), model)
    if positions and not isolates(model):
        problem = "would mix documents that share a row, which the model keeps apart"
        raise PyPruneError("teacher", name, problem, "Use no_packing.")
    work = work_folder(recipe)
    cache = recipe.distill.distill_cache
    folder = Path(cache) if cache is not None else None if work is None else work / "teacher"
    if folder is None:
        hint = "Give distill_cache, or output_dir."
        raise PyPruneError("distill_cache", None, "there is no folder for the teacher's answers", hint)
    identity = fingerprint_of_weights(model)[:16] + ("-bf16" if settings.bf16 else "")
    return Teacher(
        model, identity, folder, recipe.distill.distill_top_k, settings.distill_temperature, positions,
        lambda: autocast(start.device, settings.bf16),
    )  # fmt: skip


def _unfinished(
    recipe: RecoverConfig, text: Text, settings: Training, lora: adapter.Lora, model: Any, teacher: Teacher | None
) -> Unfinished | None:
    work = work_folder(recipe)
    if work is None:
        return None
    depends = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "model": fingerprint_of_weights(model)[:16],
        "text": text.fingerprint(),
        "epochs": recipe.train.epochs,
        **{k: v for k, v in asdict(settings).items() if k not in ("micro_batch_size", "gradient_checkpointing")},
        **{f"lora_{k}": v for k, v in asdict(lora).items()},
        "teacher": None if teacher is None else teacher.folder.name,
    }
    found = Unfinished(work, depends, complete_folder)
    if not recipe.resuming.resume:
        if found.exists() and not recipe.save.overwrite:
            hint = "Set resume to go on, or overwrite to begin anew."
            raise PyPruneError("checkpoint_dir", str(work), "holds an unfinished training", hint)
        found.remove()
    return found
