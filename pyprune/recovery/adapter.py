"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) on a model's linear layers, through peft.

A layer's output W x becomes W x + alpha / r * B A x, with A [r, in] random and B [out, r] zero at the start; merging
adds alpha / r * B A to W, so that the result is the same model with other weights.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.errors import PyPruneError
from pyprune.importance.modes import evaluating
from pyprune.recovery.opened import MATRIX, close_narrow, open_narrow
from pyprune.surgery.decoder import layers_path
from pyprune.surgery.narrow import NarrowLinear

ALL = "all-linear"
IDENTITY = "pyprune_adapter.json"
WEIGHTS = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"


@dataclass(frozen=True)
class Lora:
    """Settings of an adapter: rank, alpha, dropout, and target names (``all-linear`` or names with commas)."""

    r: int
    alpha: float
    dropout: float
    targets: str


def linear_layers(model: nn.Module) -> list[str]:
    """Paths of the linear layers (``nn.Linear``, transformers' ``Conv1D``) inside the decoder layers, in order."""
    from transformers.pytorch_utils import Conv1D

    path = layers_path(model)
    inside = f"{path}." if path else ""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and not isinstance(module, NarrowLinear)  # a special kind that could not be opened
        and module is not head
        and name.startswith(inside)
    ]


def targets_of(model: nn.Module, targets: str) -> list[str]:
    """Paths of the layers that get an adapter.

    Raises:
        PyPruneError: a name that no linear layer has, or a model without any.
    """
    layers = linear_layers(model)
    if not layers:
        raise PyPruneError("model", type(model).__name__, "has no linear layers that an adapter could go on")
    if targets == ALL:
        return layers
    wanted = [name.strip() for name in targets.split(",") if name.strip()]
    chosen: set[str] = set()
    for name in wanted:
        found = {path for path in layers if f".{path.removesuffix(MATRIX)}".endswith(f".{name}")}
        if not found:
            known = sorted({_last(path.removesuffix(MATRIX)) for path in layers})
            raise PyPruneError("lora_targets", name, "is no linear layer of the model", f"It has: {', '.join(known)}.")
        chosen |= found
    return [path for path in layers if path in chosen]


@contextmanager
def adapted(model: nn.Module, lora: Lora, seed: int) -> Iterator[Any]:
    """Inside, ``model`` carries a new adapter, the only thing that trains; yields peft's model around it.

    Afterwards the model is as it was, except for what was merged into its weights (:func:`merge`).
    """
    from peft import LoraConfig, get_peft_model

    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    opened = open_narrow(model)
    try:
        paths = targets_of(model, lora.targets)
        settings = LoraConfig(
            r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=_short(paths, model),  # type: ignore[arg-type]
            bias="none", task_type="CAUSAL_LM",
        )  # fmt: skip
        gpus = range(torch.cuda.device_count())
        with warnings.catch_warnings(), torch.random.fork_rng(devices=gpus):
            warnings.simplefilter("ignore")  # peft notes that a Conv1D's weight is transposed, which it sees to
            torch.manual_seed(seed)
            wrapped = get_peft_model(model, settings)
        try:
            with evaluating(model):  # until it is trained
                yield wrapped
        finally:
            wrapped.unload()
    finally:
        close_narrow(model, opened)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained.get(name, False))


def merge(wrapped: Any) -> None:
    """Adds the adapter into the weights, computed in float32 or wider; the layers then skip the adapter's own pass."""
    wrapped.merge_adapter()


def state(wrapped: Any) -> dict[str, Tensor]:
    """The adapter's tensors, under the names of peft's files; no copies."""
    return {n: p for n, p in wrapped.named_parameters() if p.requires_grad}


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU."""
    return {n: t.detach().to("cpu", copy=True) for n, t in tensors.items()}


@torch.no_grad()
def put(wrapped: Any, tensors: Mapping[str, Tensor]) -> None:
    """Fills the adapter; names and shapes must be its own."""
    own = state(wrapped)
    if own.keys() != tensors.keys():
        raise ValueError("these are tensors of another adapter")
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def fingerprint(model: nn.Module) -> str:
    """Changes with the model's weights: names, shapes and up to 1024 values of every parameter, as float32."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // 1024) | 1  # an odd one meets every column of most matrices
        picked = flat[::step][:1024].to("cpu", torch.float32)
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(picked.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def files_of(wrapped: Any, base: str, base_fingerprint: str) -> dict[str, bytes]:
    """The files of an adapter folder: as peft writes them, and a note of the weights that the adapter belongs to."""
    wrapped.peft_config["default"].base_model_name_or_path = base
    with TemporaryDirectory() as folder:
        wrapped.save_pretrained(folder, save_embedding_layers=False)
        files = {name: (Path(folder) / name).read_bytes() for name in (SETTINGS, WEIGHTS)}
    note = {"format": "pyprune-adapter", "version": 1, "base_model": base, "base_fingerprint": base_fingerprint}
    return {**files, IDENTITY: (json.dumps(note, indent=2) + "\n").encode()}


def merge_adapter(model: nn.Module, folder: str) -> None:
    """Adds a saved LoRA adapter into the model's weights.

    Raises:
        PyPruneError: the folder holds no LoRA adapter, or one that was made for another model: other layers, other
            shapes, or (for adapters of pyprune) other weights.
    """
    from peft import PeftModel

    path = Path(folder)
    made_for = check_adapter(path)
    now = fingerprint(model)
    if made_for not in (None, now):
        problem = "was trained on a model with other weights"
        raise PyPruneError("adapter", folder, problem, f"It belongs to {_note(path).get('base_model')}.")
    opened = open_narrow(model)
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        _check_fit(model, path, folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = PeftModel.from_pretrained(model, str(path), is_trainable=False)
        wrapped.merge_and_unload()
    finally:
        close_narrow(model, opened)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained.get(name, False))


def check_adapter(path: Path) -> str | None:
    """The fingerprint of the weights that an adapter belongs to; None when it does not say.

    Raises:
        PyPruneError: the folder is missing or holds no LoRA adapter in safetensors.
    """
    hint = "Name a folder with adapter_config.json and adapter_model.safetensors, such as OUTPUT_DIR/adapter."
    if not path.is_dir() or not (path / SETTINGS).is_file():
        raise PyPruneError("adapter", str(path), "is no adapter folder" if path.exists() else "does not exist", hint)
    if not (path / WEIGHTS).is_file():
        raise PyPruneError("adapter", str(path), f"has no {WEIGHTS}", hint)
    settings = _json(path / SETTINGS)
    if settings.get("peft_type") != "LORA":
        raise PyPruneError("adapter", str(path), f"is of kind {settings.get('peft_type')}, not LORA", hint)
    return _note(path).get("base_fingerprint")


def _check_fit(model: nn.Module, path: Path, folder: str) -> None:
    """Every pair of matrices has a layer of its shape."""
    from safetensors import SafetensorError, safe_open
    from transformers.pytorch_utils import Conv1D

    try:
        with safe_open(path / WEIGHTS, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise PyPruneError("adapter", folder, f"cannot be read: {error}") from None
    modules = dict(model.named_modules())
    for name, shape in shapes.items():
        layer_name, found, rest = name.removeprefix("base_model.model.").partition(".lora_")
        layer = modules.get(layer_name)
        weight = getattr(layer, "weight", None)
        if not found or not isinstance(layer, (nn.Linear, Conv1D)) or weight is None:
            raise PyPruneError("adapter", folder, f"was made for another model: this one has no layer {layer_name}")
        inputs, outputs = tuple(weight.shape) if isinstance(layer, Conv1D) else tuple(weight.shape)[::-1]
        side, width = (1, inputs) if rest.startswith("A") else (0, outputs)
        if len(shape) != 2 or shape[side] != width:
            problem = f"was made for another model: {layer_name} is {outputs} x {inputs} here, not of {shape[side]}"
            raise PyPruneError("adapter", folder, problem, "Name the model that it was trained on.")


def _note(path: Path) -> dict[str, Any]:
    return _json(path / IDENTITY) if (path / IDENTITY).is_file() else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PyPruneError("adapter", str(path), f"cannot be read: {error}") from None
    return data if isinstance(data, dict) else {}


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _short(paths: list[str], model: nn.Module) -> list[str]:
    """Last names where they mean just these layers, else whole paths."""
    names = {_last(path) for path in paths}
    meant = [path for path, _ in model.named_modules() if _last(path) in names]
    return sorted(names) if len(meant) == len(paths) else paths
