"""Training after pruning, from a model and text to a saved folder. The only file that sees every stage of it.

Everything that can be refused is refused before training begins: options, sources, teacher, output folder, disk.
"""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pyprune import preflight
from pyprune.checkpoint.files import read_config
from pyprune.checkpoint.load import BUILD
from pyprune.checkpoint.profiles import writing
from pyprune.checkpoint.save import IMPORTANCE, save
from pyprune.config import RecoverConfig
from pyprune.evaluation.generation import paired_samples
from pyprune.evaluation.stages import Stages
from pyprune.importance.modes import own_modes
from pyprune.opening import measure
from pyprune.recover_preflight import Ready, Start, check, check_room, open_start, prepare, work_folder
from pyprune.recovery import adapter
from pyprune.recovery.processes import Processes
from pyprune.recovery.train import Trainer
from pyprune.recovery.unfinished import History
from pyprune.report.data import versions
from pyprune.report_pipeline import RECOVERY_RECIPE, add_page, ask
from pyprune.texts import evaluation_windows, page_prompts

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


@own_modes()
def run(
    recipe: RecoverConfig, model: Any = None, tokenizer: Any = None, say: Callable[[str], None] = lambda line: None
) -> RecoverResult:
    """:func:`recover` with its options gathered in a recipe.

    Args:
        say: takes a line for the user before long work begins.
    """
    check(recipe)
    stages = Stages()
    wanted = preflight.device(recipe.model.device) if model is None else next(model.parameters()).device.type
    processes = Processes(wanted)
    start = open_start(recipe, stages, processes, wanted, model, tokenizer)
    check_room(recipe, start)
    has_code = model is None and _has_modelling_file(start.name)
    windows, text_name = evaluation_windows(recipe.evaluation, start.model, start.tokenizer)
    prompts = page_prompts(recipe, start.tokenizer, start.report.get("samples") or ())
    merging = recipe.adapter.adapter is not None
    ready = None if merging else prepare(recipe, start, stages)
    if recipe.save.output_dir is None:
        say(preflight.UNSAVED)
    figures = [measure(start.model, start.tokenizer, recipe.evaluation, windows, text_name, stages, " before")]
    said = [ask(start.model, start.tokenizer, prompts, recipe, stages, " before")]
    prompts = prompts[: len(said[0])]
    facts: dict[str, Any] = {}
    history = None
    kept: dict[str, bytes] | None = None
    if ready is None:
        with stages("merge"):
            adapter.merge_adapter(start.model, str(recipe.adapter.adapter))
        facts["what"] = f"A LoRA adapter was merged: `{Path(str(recipe.adapter.adapter)).name}`."
    else:
        history, facts, kept = _train(recipe, start, ready, stages, processes)
    figures.append(measure(start.model, start.tokenizer, recipe.evaluation, windows, text_name, stages, " after"))
    said.append(ask(start.model, start.tokenizer, prompts, recipe, stages, " after"))
    report = {
        **facts,
        "perplexity": _paired(figures, "perplexity"),
        "continuation": _paired(figures, "continuation"),
        "samples": paired_samples(prompts, *said),
        "recipe": recipe.to_dict(),
        "versions": versions(("accelerate", "peft")),
    }
    report["stages"] = stages.to_list()
    result = RecoverResult(start.model, start.tokenizer, report, history, recipe, processes.main)
    if recipe.save.output_dir is not None:
        if processes.main:
            _save(recipe, start, report, kept, stages, has_code)
            report["output_dir"] = str(Path(recipe.save.output_dir).absolute())
            if recipe.page.report:
                add_page(recipe.save.output_dir)
        processes.wait()
    if ready is not None and ready.unfinished is not None and processes.main:
        ready.unfinished.remove()
        _remove_own_cache(recipe)
    report["stages"] = stages.to_list()
    return result


def _train(
    recipe: RecoverConfig, start: Start, ready: Ready, stages: Stages, processes: Processes
) -> tuple[History, dict[str, Any], dict[str, bytes] | None]:
    """Train and merge. (history, facts for the report, files of the adapter if it is kept)."""
    rows = ready.text.order(recipe.train.epochs, recipe.train.seed)
    with adapter.adapted(start.model, ready.lora, recipe.train.seed) as wrapped:
        trainer = Trainer(
            wrapped, rows, ready.text.validation, ready.settings, positions=ready.positions, processes=processes,
            teacher=ready.teacher, unfinished=ready.unfinished,
        )  # fmt: skip
        with stages("train", bar=False):
            history = trainer.run(recipe.resuming.resume)
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
            "rows": len(trainer.validation_rows), "tokens": sum(r.learned for r in trainer.validation_rows),
        },
        "adapter_parameters": size,
        "steps": history.step, "planned_steps": trainer.steps, "tokens": history.tokens,
        "seconds": history.seconds, "bf16": ready.settings.bf16, "processes": processes.count,
        "data": ready.text.facts,
        "cutoff": ready.cutoff, "learning_rate": ready.settings.learning_rate,
        "fill": sum(len(r.ids) for r in rows) / (len(rows) * ready.cutoff),
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
    after = math.inf
    try:
        adapter.merge(wrapped)
        after = trainer.nll()
    finally:  # an interrupt, too, leaves the model that came
        if not after <= before:
            for name, layer in layers.items():
                layer.get_base_layer().weight.data.copy_(old[name])
    if after <= before:
        return after
    history.best_step = 0
    history.notes.append("The merged weights, rounded to their type, were no better; the model stays as it came.")
    return before


def _words(history: History, recipe: RecoverConfig, ready: Ready) -> str:
    names = ", ".join(f"`{f['source']}`" for f in ready.text.facts)
    taught = "" if ready.teacher is None else f", with `{Path(str(recipe.distill.teacher)).name}` as teacher"
    done = f"Trained after pruning: LoRA of rank {ready.lora.r} on {names}{taught}, {history.step:,} steps, "
    if history.best_step:
        return f"{done}{history.tokens:,} tokens. The best moment, step {history.best_step:,}, was merged."
    return f"{done}{history.tokens:,} tokens. Nothing better than the model as it came was found, so it stayed."


def _figure(nll: float) -> dict[str, float]:
    return {"nll": nll, "perplexity": math.exp(min(nll, 700.0))}


def _paired(figures: list[dict[str, Any]], key: str) -> dict[str, Any] | None:
    return None if figures[0][key] is None else {"before": figures[0][key], "after": figures[1][key]}


def _has_modelling_file(name: str) -> bool:
    """Whether a model, in a folder or on the hub, is one of profile ``hetero-hf``."""
    from transformers import PretrainedConfig

    path = Path(name).expanduser()
    if path.is_file():  # a GGUF file
        return False
    return BUILD in (read_config(path) if path.is_dir() else PretrainedConfig.get_config_dict(name)[0])


def _save(
    recipe: RecoverConfig, start: Start, report: Mapping[str, Any], kept: Any, stages: Stages, has_code: bool
) -> None:
    """The folder of the model as it came, with other weights and what was done to them.

    Args:
        has_code: plain transformers opens it with the modelling file of profile ``hetero-hf``, which is written again.
    """
    whole = copy.copy(start.report)
    whole.setdefault("model", start.name)  # else the card names the dense model that all began with
    whole["recovery"] = dict(report)
    plain = recipe.to_dict()

    def also(work: Path) -> None:
        if has_code:
            writing.finish(work, "hetero-hf", None, recipe.model.trust_remote_code)
        (work / RECOVERY_RECIPE).write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")
        if start.importance is not None:
            (work / IMPORTANCE).write_text(start.importance, encoding="utf-8")
        if kept is not None:
            (work / ADAPTER).mkdir()
            for name, content in kept.items():
                (work / ADAPTER / name).write_bytes(content)

    with stages("save"), preflight.renamed(folder="output_dir"):
        save(
            start.model, start.tokenizer, str(recipe.save.output_dir), plan=start.plan, report=whole,
            recipe=start.recipe, overwrite=recipe.save.overwrite, max_shard_size=recipe.save.max_shard_size,
            finish=also,
        )  # fmt: skip


def _remove_own_cache(recipe: RecoverConfig) -> None:
    """The teacher's answers beside the checkpoints go with them."""
    work = work_folder(recipe)
    if work is not None:
        shutil.rmtree(work / "teacher", ignore_errors=True)
        with suppress(OSError):
            work.rmdir()
