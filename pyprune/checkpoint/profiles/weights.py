"""Weight files of a folder, copied, cast or thinned out, one file at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pyprune.checkpoint.files import INDEX, weight_files
from pyprune.checkpoint.profiles.configuration import edit_config
from pyprune.errors import PyPruneError
from pyprune.progress import track


def copy_weights(folder: Path, work: Path, dtype: torch.dtype | None) -> None:
    """Copies the safetensors files of ``folder`` (and their index) to ``work``; None keeps their type."""
    if (folder / INDEX).is_file():
        shutil.copyfile(folder / INDEX, work / INDEX)
    for file in track(weight_files(folder), "copy weights"):
        shutil.copyfile(file, work / file.name) if dtype is None else _cast(file, work / file.name, dtype)
    if dtype is not None:
        _note(work, dtype)


def cast_folder(work: Path, dtype: torch.dtype) -> None:
    """Turns the weights of a folder into another type, in place. At most one file's weights are in memory."""
    for file in track(weight_files(work), "cast weights"):
        other = file.with_name(f".{file.name}")
        _cast(file, other, dtype)
        other.replace(file)
    _note(work, dtype)


def drop_tensors(work: Path, names: Collection[str]) -> None:
    """Takes tensors out of a folder's weights, in place; a file that holds none of them stays as it is."""
    for file in weight_files(work) if names else []:
        with safe_open(file, "pt") as opened:
            held = set(opened.keys())
            kept = {name: opened.get_tensor(name) for name in held.difference(names)} if held & set(names) else None
        if kept is not None:
            other = file.with_name(f".{file.name}")
            save_file(kept, other, metadata={"format": "pt"})
            other.replace(file)
    index = work / INDEX
    if names and index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["weight_map"] = {name: file for name, file in content["weight_map"].items() if name not in names}
        _write_index(work, content)


def in_type(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in another type.

    Raises:
        PyPruneError: a number of it would become infinite.
    """
    made = value.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(value.dtype).max:
        lost = int((value.isfinite() & ~made.isfinite()).sum())
        if lost:
            hint = "Use bfloat16." if dtype == torch.float16 else "Use auto, which keeps the type."
            problem = f"has no room for {lost:,} weights of {name}"
            raise PyPruneError("dtype", str(dtype).removeprefix("torch."), problem, hint)
    return made


def _cast(file: Path, target: Path, dtype: torch.dtype) -> None:
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    for name, value in tensors.items():
        if value.is_floating_point():
            tensors[name] = in_type(name, value, dtype)
    save_file(tensors, target, metadata={"format": "pt"})


def _note(work: Path, dtype: torch.dtype) -> None:
    """Configuration and index say what the files hold now."""
    edit_config(work, {"dtype": str(dtype).removeprefix("torch."), "torch_dtype": None})
    index = work / INDEX
    if index.is_file():
        _write_index(work, json.loads(index.read_text(encoding="utf-8")))


def _write_index(work: Path, content: dict[str, Any]) -> None:
    """The index of a folder's weights, with their size as it is now."""
    size = 0
    for file in weight_files(work):
        with safe_open(file, "pt") as opened:
            size += sum(opened.get_tensor(name).nbytes for name in opened.keys())
    content.setdefault("metadata", {})["total_size"] = size
    (work / INDEX).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
