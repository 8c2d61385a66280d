"""Writing a model for other programs: four profiles, one way in from a checkpoint and one from pruning."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch

from pyprune.checkpoint import atomic
from pyprune.checkpoint.atomic import OTHER_FILES
from pyprune.checkpoint.card import model_card, set_opening
from pyprune.checkpoint.files import weight_files
from pyprune.checkpoint.load import has_tokenizer
from pyprune.checkpoint.profiles import decilm, gguf_file, hetero_hf, uniform
from pyprune.checkpoint.profiles.configuration import forget_build
from pyprune.checkpoint.profiles.source import Source, of_model, open_source
from pyprune.checkpoint.profiles.weights import cast_folder, copy_weights
from pyprune.checkpoint.quiet import quiet
from pyprune.checkpoint.save import save, write_records
from pyprune.checkpoint.terms import keep_terms
from pyprune.errors import PyPruneError, unknown_name
from pyprune.selection.plan import Plan
from pyprune.surgery.skeleton import is_stock

PROFILES: dict[str, ModuleType] = {
    "uniform": uniform,
    "hetero-hf": hetero_hf,
    "hetero-decilm": decilm,
    "gguf": gguf_file,
}
"""Name -> module. Each has ``check(outline)``, and what ``prune`` keeps to: ``ROLES`` that may be cut (None: any),
``ROUND_TO`` by role, and ``EVEN`` where all layers are alike."""

GGUF_NAME = "model.gguf"
"""The file in the folder that ``prune`` writes with profile ``gguf``."""

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".index.json", ".h5", ".msgpack", ".onnx")
_TEMPLATES = "additional_chat_templates"  # folder of the chat templates that have names


def export(
    model: Any, output: str | Path, profile: str = "uniform", *, tokenizer: Any = None, dtype: str = "auto",
    overwrite: bool = False, trust_remote_code: bool = False,
) -> Path:  # fmt: skip
    """Write a model in a form that other programs open; its widths do not change.

        pyprune.export("smaller", "smaller.gguf", "gguf", dtype="float16")

    A local folder is never loaded: weights go from its memory-mapped files to the output one at a time.

    Args:
        model: a checkpoint folder, a hub name, a GGUF file, or a transformers model in memory (left as it is).
        output: folder to write; a file that ends in ``.gguf`` for profile ``gguf``.
        profile: ``"uniform"`` (same widths in all layers: stock transformers), ``"hetero-hf"`` (any widths: plain
            transformers with a modelling file in the folder), ``"hetero-decilm"`` (FFN widths in multiples of 256, all
            query heads, layers without attention or FFN: vLLM's ``DeciLMForCausalLM``), ``"gguf"`` (Llama and Mistral:
            llama.cpp).
        tokenizer: of a model in memory, or in place of the folder's own.
        dtype: of the weights; ``"auto"`` keeps the checkpoint's.
        overwrite: replace what is at ``output`` once the new one is complete.
        trust_remote_code: run modelling code that comes with the model.

    Returns:
        The output's absolute path.

    Raises:
        PyPruneError: the profile cannot hold the model (with the nearest widths that fit), ``dtype`` has no room for a
            weight, the output exists, the disk is full, or the model is no complete causal language model. Nothing is
            left half-written.
    """
    module = get_profile(profile)
    if dtype != "auto" and dtype not in _DTYPES:
        raise unknown_name("dtype", str(dtype), ["auto", *_DTYPES])
    path = check_output(output, profile, overwrite)
    source = open_source(model, tokenizer, trust_remote_code)
    module.check(source.outline)
    kind = _DTYPES.get(dtype)
    with _renamed():
        atomic.check_space(path, _bytes(source, kind) + OTHER_FILES)
    if profile == "gguf":
        with _partial(path) as work:
            _write_gguf(source, work, kind)
        return path
    with _renamed():
        if source.model is not None:
            save(
                source.model, source.tokenizer, path, overwrite=overwrite,
                finish=lambda work: finish(work, profile, kind, trust_remote_code),
            )  # fmt: skip
            return path
        with atomic.complete_folder(path, overwrite) as work, quiet():
            assert source.folder is not None
            _copy_files(source.folder, work, {*weight_files(source.folder)})
            copy_weights(source.folder, work, kind)
            if tokenizer is not None:
                tokenizer.save_pretrained(work)
            elif (templates := source.folder / _TEMPLATES).is_dir() and not templates.is_symlink():
                (work / _TEMPLATES).mkdir()
                _copy_files(templates, work / _TEMPLATES)
            finish(work, profile, None, trust_remote_code)
    return path


def get_profile(name: str) -> ModuleType:
    """The module of a profile.

    Raises:
        PyPruneError: there is no such profile; or its library is not installed.
    """
    if name not in PROFILES:
        raise unknown_name("profile", str(name), PROFILES)
    if name == "gguf" and find_spec("gguf") is None:
        raise PyPruneError("profile", name, "needs the package gguf", "Install it: pip install 'pyprune[serving]'.")
    return PROFILES[name]


def own_profile(model: Any) -> str | None:
    """The profile by which plain transformers opens a model that no stock configuration holds; None where one does, or
    where there is none such.

    Args:
        model: its tensors on any device.
    """
    if is_stock(model.config):
        return None
    try:
        hetero_hf.check(model)
    except PyPruneError:
        return None
    return "hetero-hf"


def check_fits(profile: str, outline: Any, tokenizer: Any = None) -> None:
    """Raises PyPruneError when a profile cannot hold a model, its tensors on any device, or its tokenizer."""
    get_profile(profile).check(outline)
    if profile == "gguf" and tokenizer is not None:
        gguf_file.check_tokenizer(tokenizer, outline.config.vocab_size)


def save_as(
    profile: str, model: Any, tokenizer: Any, folder: str | Path, *, plan: Plan | None, report: Any,
    recipe: Mapping[str, Any] | None, overwrite: bool, max_shard_size: int | str,
) -> Path:  # fmt: skip
    """:func:`pyprune.save` in a profile, for a model that was just pruned; arguments and errors as there.

    With ``gguf`` the folder holds :data:`GGUF_NAME` in place of the safetensors files.
    """
    module = get_profile(profile)
    if profile != "gguf":
        return save(
            model, tokenizer, folder, plan=plan, report=report, recipe=recipe, overwrite=overwrite,
            max_shard_size=max_shard_size, finish=lambda work: finish(work, profile, None),
        )  # fmt: skip
    path = atomic.check_target(folder, overwrite)
    source = of_model(model, tokenizer)
    module.check(source.outline)
    details = report.to_dict() if hasattr(report, "to_dict") else report
    with atomic.complete_folder(path, overwrite) as work, quiet():
        _write_gguf(source, work / GGUF_NAME, None)
        write_records(work, plan, details, recipe)
        card = model_card(model, plan, details, recipe, keep_terms(model, work))
        (work / "README.md").write_text(card, encoding="utf-8")
        set_opening(work / "README.md", f"llama.cpp opens it: `llama-cli -m {GGUF_NAME}`.")
    return path


def finish(work: Path, profile: str, dtype: torch.dtype | None, trust_remote_code: bool = False) -> None:
    """Turns the folder of a saved model into one of a profile, in place."""
    forget_build(work)
    outline = open_source(work, trust_remote_code=trust_remote_code).outline
    module = get_profile(profile)
    module.write(work, outline)
    if dtype is not None:
        cast_folder(work, dtype)
    set_opening(work / "README.md", module.OPENING)


def check_output(output: str | Path, profile: str, overwrite: bool) -> Path:
    """The absolute path of an output that may be written.

    Raises:
        PyPruneError: it exists already, cannot be made, or has not the name that the profile needs.
    """
    if profile != "gguf":
        with _renamed():
            return atomic.check_target(output, overwrite)
    path = Path(output).expanduser().absolute()
    if path.suffix != ".gguf":
        hint = f"Name it {path.name}.gguf."
        raise PyPruneError("output", str(output), "is no name for a GGUF file, which ends in .gguf", hint)
    atomic.check_name("output", output, path)
    if path.is_dir():
        raise PyPruneError("output", str(output), "is a folder", "Name a file.")
    if path.exists() and not overwrite:
        raise PyPruneError("output", str(output), "exists already", "Set overwrite, or name another file.")
    if not path.parent.is_dir():
        raise PyPruneError("output", str(output), f"cannot be made: {path.parent} is not there", "Make that folder.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PyPruneError("output", str(output), f"cannot be made: {path.parent} is not a folder that can be written")
    return path


def _write_gguf(source: Source, file: Path, dtype: torch.dtype | None) -> None:
    kind = dtype or source.outline.dtype
    if kind not in _DTYPES.values():
        raise PyPruneError("dtype", str(kind), "is none that GGUF has", f"Choose one of {', '.join(_DTYPES)}.")
    if source.tokenizer is None:
        folder = source.folder
        gguf_file.write(source, file, kind, folder if folder is not None and has_tokenizer(folder) else None)
        return
    with TemporaryDirectory() as vocabulary:
        source.tokenizer.save_pretrained(vocabulary)
        gguf_file.write(source, file, kind, Path(vocabulary))


def _bytes(source: Source, dtype: torch.dtype | None) -> int:
    return sum(p.numel() * (dtype or p.dtype).itemsize for p in source.outline.parameters())


def _copy_files(folder: Path, work: Path, weights: Collection[Path] = ()) -> None:
    """What lies in a folder beside the weights: configuration, tokenizer, card, plan, code; no folders in it."""
    for file in sorted(folder.iterdir()):
        if file.is_file() and file not in weights and not file.name.endswith(_NOT_COPIED):
            shutil.copyfile(file, work / file.name)


@contextmanager
def _partial(file: Path) -> Iterator[Path]:
    """A file beside ``file`` that takes its name when the block ends, and is removed when it fails."""
    with _renamed(), atomic.full_disk_reported(file), atomic.partial_folder(file) as folder:
        work = folder / file.name
        yield work
        atomic.sync(folder)
        work.replace(file)


@contextmanager
def _renamed() -> Iterator[None]:
    """Errors about a folder, named after the option ``output``."""
    try:
        yield
    except PyPruneError as error:
        if error.option != "folder":
            raise
        raise PyPruneError("output", error.value, error.problem, error.hint) from error
