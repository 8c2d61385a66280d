"""Training after pruning, from a model and text to a saved folder. The only file that sees every stage of it.

Everything that can be refused is refused before training begins: options, sources, teacher, output folder, disk.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml

from pyprune import preflight
from pyprune.checkpoint.atomic import check_space, check_target, complete_folder
from pyprune.checkpoint.load import check_finite, open_model
from pyprune.checkpoint.save import PLAN, RECIPE, REPORT, save
from pyprune.config import RecoverConfig
from pyprune.errors import PyPruneError
from pyprune.evaluation.generation import continuation
from pyprune.evaluation.perplexity import perplexity, read_windows
from pyprune.evaluation.stages import Stages
from pyprune.recovery import adapter
from pyprune.recovery.examples import Encoder
from pyprune.recovery.mixture import Reading, Text, read_text
from pyprune.recovery.packing import isolates
from pyprune.recovery.processes import Processes
from pyprune.recovery.records import check_source
from pyprune.recovery.teacher import Teacher, check_vocabulary
from pyprune.recovery.train import Trainer, Training, autocast, fast_bf16
from pyprune.recovery.unfinished import History, Unfinished
from pyprune.report.data import versions
from pyprune.selection.plan import Plan

RECOVERY_RECIPE = "pyprune_recover.yaml"
ADAPTER = "adapter"


@dataclass
class RecoverResult:
    """What :func:`recover` gives.

    Attributes:
        model: the model with the adapter merged; the very object that was given, when one was.
        tokenizer: as given or opened; None without one.
        report: what was asked and measured, JSON-serialisable; ``report["validation"]`` holds before and after.
        history: losses, rates and validations of the training; None when an adapter was merged.
        recipe: every option.
        main: False in the helping processes of a run of several, which save and print nothing.
    """

    model: Any
    tokenizer: Any
    report: dict[str, Any]
    history: History | None
    recipe: RecoverConfig
    main: bool = True


@dataclass
class _Start:
    """The model as it comes, and what lies beside it in its folder."""

    model: Any
    tokenizer: Any
    name: str
    device: torch.device
    plan: Plan | None = None
    report: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] | None = None


def recover(model: Any, *, tokenizer: Any = None, config: str | Path | None = None, **options: Any) -> RecoverResult:
    """Train a pruned causal language model a little, with low-rank adapters that are merged into its weights.

        out = pyprune.recover("smaller", data="alpaca.jsonl", output_dir="recovered")
        out = pyprune.recover(model, tokenizer=tokenizer, data=[{"text": "..."}, ...], max_minutes=30)

    The perplexity on the validation text is never above the model's own: the best moment is kept, the start included.

    Args:
        model: a folder, a hub name, or a transformers model, which is trained in place.
        tokenizer: when ``model`` is an object.
        config: a YAML recipe; ``options`` win over it.
        options: those of ``pyprune recover --help`` under the same names. Here ``data`` and ``val_data`` are also lists
            of records (mappings) or token ids int64 [N, T].

    Returns:
        The model, saved too when ``output_dir`` is given.

    Raises:
        PyPruneError: an option that does not exist or cannot be met, or an input that cannot be used. Nothing is left
            behind but the checkpoints of an interrupted training.
    """
    named = isinstance(model, (str, Path))
    recipe = RecoverConfig.build({**options, "model_name_or_path": model} if named else options, config)
    return run(recipe, None if named else model, tokenizer)


def run(recipe: RecoverConfig, model: Any = None, tokenizer: Any = None) -> RecoverResult:
    """:func:`recover` with its options gathered in a recipe."""
    _check(recipe)
    stages = Stages()
    wanted = preflight.device(recipe.model.device) if model is None else next(model.parameters()).device.type
    processes = Processes(wanted)
    start = _open(recipe, stages, processes, wanted, model, tokenizer)
    _check_room(recipe, start)
    windows, text_name = _windows(recipe, start)
    merging = recipe.adapter.adapter is not None
    ready = None if merging else _prepare(recipe, start, stages, processes)
    figures = [_measure(start, recipe, windows, text_name, stages, " before")]
    facts: dict[str, Any] = {}
    history = None
    kept: dict[str, bytes] | None = None
    if ready is None:
        with stages("merge"):
            adapter.merge_adapter(start.model, str(recipe.adapter.adapter))
        facts["what"] = f"A LoRA adapter was merged: `{Path(str(recipe.adapter.adapter)).name}`."
    else:
        history, facts, kept = _train(recipe, start, ready, stages, processes)
    figures.append(_measure(start, recipe, windows, text_name, stages, " after"))
    report = {
        **facts,
        "perplexity": _paired(figures, "perplexity"),
        "continuation": _paired(figures, "continuation"),
        "recipe": recipe.to_dict(),
        "versions": versions(("accelerate", "peft")),
    }
    report["stages"] = stages.to_list()
    result = RecoverResult(start.model, start.tokenizer, report, history, recipe, processes.main)
    if recipe.save.output_dir is not None:
        if processes.main:
            _save(recipe, start, report, kept, stages)
            report["output_dir"] = str(Path(recipe.save.output_dir).absolute())
        processes.wait()
    if ready is not None and ready.unfinished is not None and processes.main:
        ready.unfinished.remove()
        _remove_own_cache(recipe)
    report["stages"] = stages.to_list()
    return result


@dataclass
class _Ready:
    """What training needs, all of it checked."""

    text: Text
    settings: Training
    lora: adapter.Lora
    positions: bool
    teacher: Teacher | None
    unfinished: Unfinished | None
    identity: str
    notes: list[str]


def _check(recipe: RecoverConfig) -> None:
    """Options fit together, sources are there, the output may be written."""
    given, merging = recipe.data, recipe.adapter.adapter
    if merging is not None and (given.data is not None or recipe.run.recipe is not None):
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
    if recipe.distill.distill_cache is not None and recipe.distill.teacher is None:
        raise PyPruneError("distill_cache", recipe.distill.distill_cache, "there is no teacher", "Give teacher too.")
    if recipe.adapter.keep_adapter and recipe.save.output_dir is None:
        raise PyPruneError("keep_adapter", None, "needs a folder to save in", "Give output_dir.")
    if recipe.run.resume and _work_folder(recipe) is None:
        raise PyPruneError("resume", None, "needs a folder that holds checkpoints", "Give output_dir.")
    if recipe.save.output_dir is not None:
        with preflight.renamed(folder="output_dir"):
            check_target(recipe.save.output_dir, recipe.save.overwrite)
    preflight.check_source("eval_text", recipe.evaluation.eval_text)


def _open(
    recipe: RecoverConfig, stages: Stages, processes: Processes, wanted: str, model: Any, tokenizer: Any
) -> _Start:
    if model is not None:
        preflight.check_object(model, recipe.model)
        name = getattr(model, "name_or_path", "") or type(model).__name__
        check_finite(model, name)
        return _Start(model, tokenizer, name, next(model.parameters()).device)
    name = recipe.model.model_name_or_path
    if name is None:
        raise PyPruneError("model_name_or_path", None, "no model is given", "Name a folder or a model on the hub.")
    device = processes.device(wanted)
    with stages("load"):
        model, own = open_model(
            name, recipe.model.dtype, None if device.type == "cpu" else device, recipe.model.trust_remote_code
        )
    start = _Start(model, own if tokenizer is None else tokenizer, name, device)
    folder = Path(name)
    with suppress(OSError, ValueError, KeyError):  # a folder that prune did not write
        start.report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    with suppress(OSError, ValueError, KeyError):
        start.plan = Plan.from_json((folder / PLAN).read_text(encoding="utf-8"))
    with suppress(OSError, yaml.YAMLError):
        start.recipe = yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8"))
    return start


def _check_room(recipe: RecoverConfig, start: _Start) -> None:
    preflight.check_length("cutoff", recipe.data.cutoff, start.model)
    if recipe.save.output_dir is not None:
        size = sum(p.numel() * p.element_size() for p in start.model.parameters())
        with preflight.renamed(folder="output_dir"):
            check_space(Path(recipe.save.output_dir).absolute(), size + preflight.OTHER_FILES)


def _work_folder(recipe: RecoverConfig) -> Path | None:
    if recipe.run.checkpoint_dir is not None:
        return Path(recipe.run.checkpoint_dir).absolute()
    if recipe.save.output_dir is None:
        return None
    path = Path(recipe.save.output_dir).absolute()
    return path.with_name(f"{path.name}.unfinished")


def _prepare(recipe: RecoverConfig, start: _Start, stages: Stages, processes: Processes) -> _Ready:
    options, notes = recipe.data, []
    positions = isolates(start.model)
    packing = options.packing and positions
    if options.packing and not positions:
        notes.append(f"{type(start.model).__name__} would mix documents of a row, so each has a row of its own.")
    encoder = Encoder(start.tokenizer, options.data_field, options.instruction_format, options.train_on_prompts)
    reading = Reading(options.cutoff, packing, recipe.train.seed, options.max_tokens)
    with stages("read text", bar=False):
        text = read_text(options.data, options.val_data, encoder, reading, options.val_tokens)
    _check_ids(text, start)
    bf16 = recipe.train.bf16
    own = {f.name: getattr(recipe.train, f.name) for f in fields(Training) if hasattr(recipe.train, f.name)}
    taught = recipe.distill.teacher is not None
    settings = Training(**{
        **own,
        "bf16": fast_bf16(start.device) if bf16 is None else bf16,
        "distill_weight": recipe.distill.distill_weight if taught else 0.0,
        "distill_temperature": recipe.distill.distill_temperature,
    })  # fmt: skip
    chosen = recipe.adapter
    lora = adapter.Lora(chosen.lora_r, chosen.lora_alpha or 2 * chosen.lora_r, chosen.lora_dropout, chosen.lora_targets)
    adapter.targets_of(start.model, lora.targets)  # for its errors
    identity = adapter.fingerprint(start.model)
    teacher = _teacher(recipe, start, settings, positions, stages) if taught else None
    unfinished = _unfinished(recipe, text, settings, lora, identity, teacher)
    return _Ready(text, settings, lora, positions, teacher, unfinished, identity, notes)


def _check_ids(text: Text, start: _Start) -> None:
    """Token ids that came as such have rows in the model's embedding."""
    rows = start.model.get_input_embeddings().num_embeddings
    for row in (*(r for source in text.sources for r in source), *text.validation):
        if row.ids.min() < 0 or row.ids.max() >= rows:
            problem = f"holds token id {int(row.ids.max())}, and the model's vocabulary has {rows} tokens"
            raise PyPruneError("data", None, problem, "Tokenise it with this model's own tokenizer.")


def _teacher(recipe: RecoverConfig, start: _Start, settings: Training, positions: bool, stages: Stages) -> Teacher:
    name = str(recipe.distill.teacher)
    device = None if start.device.type == "cpu" else start.device
    with stages("load teacher"), preflight.renamed(model_name_or_path="teacher", folder="teacher"):
        model, tokenizer = open_model(name, recipe.model.dtype, device, recipe.model.trust_remote_code)
    check_vocabulary(model, tokenizer, start.model, start.tokenizer, name)
    preflight.check_length("cutoff", recipe.data.cutoff, model)
    if positions and not isolates(model):
        problem = "would mix documents that share a row, which the model keeps apart"
        raise PyPruneError("teacher", name, problem, "Use no_packing.")
    work = _work_folder(recipe)
    cache = recipe.distill.distill_cache
    folder = Path(cache) if cache is not None else None if work is None else work / "teacher"
    if folder is None:
        hint = "Give distill_cache, or output_dir."
        raise PyPruneError("distill_cache", None, "there is no folder for the teacher's answers", hint)
    identity, k = adapter.fingerprint(model), recipe.distill.distill_top_k
    return Teacher(
        model, identity, folder, k, settings.distill_temperature, positions,
        lambda: autocast(start.device, settings.bf16),
    )  # fmt: skip


def _unfinished(
    recipe: RecoverConfig, text: Text, settings: Training, lora: adapter.Lora, identity: str, teacher: Teacher | None
) -> Unfinished | None:
    work = _work_folder(recipe)
    if work is None:
        return None
    depends = {
        "model": identity,
        "text": text.fingerprint(),
        "epochs": recipe.train.epochs,
        **{k: v for k, v in asdict(settings).items() if k not in ("micro_batch_size", "gradient_checkpointing")},
        **{f"lora_{k}": v for k, v in asdict(lora).items()},
        "teacher": None if teacher is None else teacher.folder.name,
    }
    found = Unfinished(work, depends, lambda folder: complete_folder(folder))
    if found.exists() and not recipe.run.resume:
        if not recipe.save.overwrite:
            hint = "Set resume to go on, or overwrite to begin anew."
            raise PyPruneError("checkpoint_dir", str(work), "holds an unfinished training", hint)
        found.remove()
    return found


def _train(
    recipe: RecoverConfig, start: _Start, ready: _Ready, stages: Stages, processes: Processes
) -> tuple[History, dict[str, Any], dict[str, bytes] | None]:
    """Train and merge. (history, facts for the report, files of the adapter if it is kept)."""
    rows = ready.text.order(recipe.train.epochs, recipe.train.seed)
    with adapter.adapted(start.model, ready.lora, recipe.train.seed) as wrapped:
        trainer = Trainer(
            wrapped, rows, ready.text.validation, ready.settings, positions=ready.positions, processes=processes,
            teacher=ready.teacher, unfinished=ready.unfinished,
        )  # fmt: skip
        with stages("train", bar=False):
            history = trainer.run(recipe.run.resume)
        before, after = history.validations[0]["nll"], history.best_nll
        kept = adapter.files_of(wrapped, start.name, ready.identity) if recipe.adapter.keep_adapter else None
        with stages("merge"):
            if history.best_step:
                after = _merge(wrapped, trainer, before, history)
    size = sum(p.numel() for p in trainer.parameters.values())
    facts = {
        "what": _words(history, recipe, ready),
        "validation": {
            "before": _figure(before), "after": _figure(after), "best_step": history.best_step,
            "rows": len(ready.text.validation), "tokens": sum(r.learned for r in ready.text.validation),
        },
        "adapter_parameters": size,
        "steps": history.step, "planned_steps": trainer.steps, "tokens": history.tokens,
        "seconds": history.seconds, "bf16": ready.settings.bf16, "processes": processes.count,
        "data": ready.text.facts,
        "fill": sum(len(r.ids) for r in rows) / (len(rows) * recipe.data.cutoff),
        "teacher": None if ready.teacher is None
        else {"computed": ready.teacher.computed, "reused": ready.teacher.reused},
        "losses": history.losses, "validations": history.validations,
        "warnings": [*ready.notes, *history.notes],
    }  # fmt: skip
    return history, facts, kept


def _merge(wrapped: Any, trainer: Trainer, before: float, history: History) -> float:
    """Merge the best adapter; the validation loss of what is in the weights then, never above ``before``.

    Weights of few bits round the update, so the merged model is measured too, and its old weights come back bit for
    bit if it turns out worse than the model that came.
    """
    layers = {n: m for n, m in wrapped.named_modules() if hasattr(m, "lora_A")}
    old = {n: m.get_base_layer().weight.detach().to("cpu", copy=True) for n, m in layers.items()}
    adapter.merge(wrapped)
    after = trainer.nll()
    if after <= before:
        return after
    for name, layer in layers.items():
        layer.get_base_layer().weight.data.copy_(old[name])
    history.best_step = 0
    history.notes.append("The merged weights, rounded to their type, were no better; the model stays as it came.")
    return before


def _words(history: History, recipe: RecoverConfig, ready: _Ready) -> str:
    names = ", ".join(f"`{f['source']}`" for f in ready.text.facts)
    taught = "" if ready.teacher is None else f", with `{Path(str(recipe.distill.teacher)).name}` as teacher"
    done = f"Trained after pruning: LoRA of rank {ready.lora.r} on {names}{taught}, {history.step:,} steps, "
    if history.best_step:
        return f"{done}{history.tokens:,} tokens. The best moment, step {history.best_step:,}, was merged."
    return f"{done}{history.tokens:,} tokens. Nothing better than the model as it came was found, so it stayed."


def _figure(nll: float) -> dict[str, float]:
    return {"nll": nll, "perplexity": math.exp(min(nll, 700.0))}


def _windows(recipe: RecoverConfig, start: _Start) -> tuple[Any, str]:
    config = recipe.evaluation
    if config.prompt is not None and start.tokenizer is None:
        raise PyPruneError("prompt", config.prompt, "there is no tokenizer to read it with", "Give tokenizer=.")
    if config.eval_text is None:
        return None, ""
    preflight.check_length("eval_length", config.eval_length, start.model)
    return read_windows(
        config.eval_text, start.tokenizer, length=config.eval_length, windows=config.eval_windows,
        field=config.eval_text_field,
    )  # fmt: skip


def _measure(
    start: _Start, recipe: RecoverConfig, windows: Any, text: str, stages: Stages, when: str
) -> dict[str, Any]:
    config, out = recipe.evaluation, dict[str, Any]()
    if windows is not None:
        with stages("perplexity" + when, bar=False):
            found = perplexity(start.model, windows, text=text, batch_size=config.eval_batch_size)
        out["perplexity"] = found.to_dict()
    if config.prompt is not None:
        with stages("generate" + when):
            out["continuation"] = continuation(start.model, start.tokenizer, config.prompt, config.prompt_tokens)
    return out


def _paired(figures: list[dict[str, Any]], key: str) -> dict[str, Any] | None:
    return {"before": figures[0][key], "after": figures[1][key]} if key in figures[0] else None


def _save(recipe: RecoverConfig, start: _Start, report: Mapping[str, Any], kept: Any, stages: Stages) -> None:
    """The folder of the model as it came, with other weights and what was done to them."""
    whole = copy.copy(start.report)
    whole.setdefault("model", start.name)
    whole["recovery"] = dict(report)
    plain = recipe.to_dict()

    def also(work: Path) -> None:
        (work / RECOVERY_RECIPE).write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")
        if kept is not None:
            (work / ADAPTER).mkdir()
            for name, content in kept.items():
                (work / ADAPTER / name).write_bytes(content)

    with stages("save"), preflight.renamed(folder="output_dir"):
        save(
            start.model, start.tokenizer, str(recipe.save.output_dir), plan=start.plan, report=whole,
            recipe=start.recipe, overwrite=recipe.save.overwrite, max_shard_size=recipe.save.max_shard_size, also=also,
        )  # fmt: skip


def _remove_own_cache(recipe: RecoverConfig) -> None:
    """The teacher's answers beside the checkpoints go with them."""
    work = _work_folder(recipe)
    if work is not None:
        shutil.rmtree(work / "teacher", ignore_errors=True)
        with suppress(OSError):
            work.rmdir()
