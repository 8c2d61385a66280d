"""Saving a model as a folder that stock transformers opens, complete or not at all."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from pyprune.checkpoint.atomic import OTHER_FILES, check_space, check_target, complete_folder
from pyprune.checkpoint.card import model_card
from pyprune.checkpoint.files import SINGLE
from pyprune.checkpoint.load import check_finite
from pyprune.checkpoint.quiet import quiet
from pyprune.checkpoint.terms import keep_terms
from pyprune.errors import PyPruneError
from pyprune.importance.modes import check_weights
from pyprune.selection.plan import Plan
from pyprune.surgery import gguf, skeleton
from pyprune.surgery.apply import bare
from pyprune.surgery.decoder import structure
from pyprune.surgery.writable import saved_as

PLAN = "pyprune_plan.json"
REPORT = "pyprune_report.json"
RECIPE = "pyprune_recipe.yaml"
IMPORTANCE = "pyprune_importance.json"


def save(
    model: Any,
    tokenizer: Any,
    folder: str | Path,
    *,
    plan: Plan | None = None,
    report: Any = None,
    recipe: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    finish: Callable[[Path], None] | None = None,
    weights: Callable[[Any, Path], None] | None = None,
) -> Path:
    """Writes ``model`` as safetensors with ``config.json``, generation settings, tokenizer and a model card.

    The folder appears when everything in it is on the disk; an error, a full disk or an interrupt leaves what was there
    before. A model with the same widths in every layer is opened by plain transformers; others by
    :func:`pyprune.load`, while plain transformers stops at the first mismatched shape, and fills blocks that are gone
    with random numbers, which it says.

    A model whose own configuration class refuses its widths (Llama, when the number of heads does not divide the
    hidden size) is saved as a class that computes the same and does not: the card and a warning say so.

    Args:
        tokenizer: saved alongside; None saves none.
        plan: written as ``pyprune_plan.json``.
        report: written as ``pyprune_report.json``: a mapping, or something with ``to_dict()``.
        recipe: every option's value, written as ``pyprune_recipe.yaml`` and into the card.
        overwrite: replace an existing folder once the new one is complete.
        max_shard_size: larger models are split into files of at most this size (``"5GB"`` or bytes).
        finish: called with the temporary folder when it is complete, before it takes its name.
        weights: called with the model as it is written and the temporary folder, to write the weight files into it in
            place of the model's own tensors, which may be on the meta device then. Room on the disk is its affair.

    Returns:
        The folder's absolute path.

    Raises:
        PyPruneError: the folder exists (without ``overwrite``), the disk is or would get full, the model's weights are
            not in memory, not finite or tied otherwise than its class ties them, it carries an adapter, or no
            configuration describes it.
    """
    model = bare(model)
    path = check_target(folder, overwrite)
    if weights is None:
        size = sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())
        check_weights(model)
        check_finite(model, type(model).__name__, "model", "Nothing was written.")
        check_ties(model)
        check_space(path, size + OTHER_FILES)
    if gguf.drop_marks(model):
        warnings.warn("The model came from a GGUF file; it is saved in full precision.", stacklevel=2)
    written = _writable(model)
    details = report.to_dict() if hasattr(report, "to_dict") else report
    with complete_folder(path, overwrite) as work, quiet():
        if weights is None:
            written.save_pretrained(work, max_shard_size=max_shard_size)
        else:
            written.save_pretrained(work, state_dict={})  # configuration, generation settings, modelling code
            (work / SINGLE).unlink(missing_ok=True)
            weights(written, work)
        if tokenizer is not None:
            tokenizer.save_pretrained(work)
        write_records(work, plan, details, recipe)
        card = model_card(written, plan, details, recipe, keep_terms(model, work))
        (work / "README.md").write_text(card, encoding="utf-8")
        _check_reopens(written, work)
        if finish is not None:
            finish(work)
    return path


def write_records(
    work: Path, plan: Plan | None, report: Mapping[str, Any] | None, recipe: Mapping[str, Any] | None
) -> None:
    """Writes what there is of plan, report and recipe into a folder."""
    if plan is not None:
        (work / PLAN).write_text(plan.to_json() + "\n", encoding="utf-8")
    if report is not None:
        (work / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if recipe is not None:
        (work / RECIPE).write_text(yaml.safe_dump(dict(recipe), sort_keys=False), encoding="utf-8")


def check_ties(model: Any) -> None:
    """Raises PyPruneError when two modules share a tensor that the model's class has twice: its files hold it once, and
    an opened model would lack the second."""
    declared = [
        f"{path}.{pattern}" if path else pattern
        for path, module in model.named_modules()
        for pattern in getattr(module, "_tied_weights_keys", None) or ()
    ]
    first: dict[Any, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or not tensor.numel() or any(re.search(d, name) for d in declared):
            continue
        other = first.setdefault(id(tensor) if tensor.is_meta else (tensor.device, tensor.data_ptr()), name)
        if other != name:
            problem = f"is one tensor with {other}, and {type(model).__name__} has two in their places"
            hint = "Give each module a tensor of its own (copy.deepcopy)."
            raise PyPruneError("model", name, problem, hint)


def _writable(model: Any) -> Any:
    """``model``, or a twin with the same weights whose configuration can be saved and read again."""
    other = saved_as(model)
    if other is None:
        return model
    cls, config, said = other
    warnings.warn(said, stacklevel=3)
    return _with_weights_of(model, cls, config)


def _with_weights_of(model: Any, cls: type, config: Any) -> Any:
    """A model of another class that shares ``model``'s tensors, which have the same names there."""
    config.name_or_path = model.config.name_or_path
    twin = skeleton.build(cls, config)
    twin.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    for name, buffer in model.named_buffers():
        owner, _, last = name.rpartition(".")
        twin.get_submodule(owner)._buffers[last] = buffer
    twin.tie_weights()
    twin.generation_config = copy.deepcopy(model.generation_config)
    return twin


def _check_reopens(model: Any, work: Path) -> None:
    """The written configuration describes the written weights; written out in full where shortening lost something."""
    wanted = {n: s for n, s in structure(model).items() if n in dict(model.named_parameters(remove_duplicate=False))}
    for full in (False, True):
        if full:
            model.config.to_json_file(work / "config.json", use_diff=False)
        config = type(model.config).from_pretrained(work)
        made = structure(skeleton.build(type(model), config))
        if all(made.get(name) == shape for name, shape in wanted.items()):
            return
    name = next(n for n, s in wanted.items() if made.get(n) != s)
    raise PyPruneError(
        "model", name, f"its configuration, written and read again, gives shape {list(made.get(name, ()))}"
    )
