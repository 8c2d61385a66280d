"""A model whose weights stay on disk: built on the meta device, filled a few tensors at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pyprune.checkpoint.files import OPTION, check_folder, weight_files
from pyprune.checkpoint.outline import open_outline
from pyprune.checkpoint.quiet import quiet
from pyprune.errors import PyPruneError
from pyprune.surgery.buffers import computed
from pyprune.surgery.names import Tensors

IN_MEMORY = "Prune it in memory, without stream."


class DiskModel:
    """A causal language model on the meta device, and where the bytes of its tensors lie.

    Buffers that no checkpoint holds (tables of positions) have their values on ``device``; everything else is on the
    meta device except within :meth:`loaded`.

    Args:
        folder: a checkpoint of safetensors whose tensors have the names and forms of the model's class.
        dtype: of the weights; ``"auto"`` keeps the checkpoint's.
        device: where tensors are computed with.
        trust_remote_code: run modelling code that comes with the checkpoint.

    Attributes:
        model: of transformers, in evaluation mode.
        tensors: its names and shapes.
        device: where :meth:`loaded` puts tensors.
        files: the safetensors files.

    Raises:
        PyPruneError: the folder is no complete checkpoint of safetensors, or its tensors are not the model's.
    """

    def __init__(
        self, folder: Path, dtype: str = "auto", device: str | torch.device = "cpu", trust_remote_code: bool = False
    ) -> None:
        check_folder(folder)
        self.folder, self.device, self.files = folder, torch.device(device), weight_files(folder)
        where, stored = _contents(self.files)
        self.model = open_outline(folder, trust_remote_code)
        wanted = _dtype(dtype, self.model.config, stored)
        for tensor in (*self.model.parameters(), *_persistent(self.model).values()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(wanted)
        self.model.config.dtype = wanted
        _refuse_mixed(self.model, wanted, folder)
        self._generation_settings()
        _fill_buffers(self.model, self.device)
        self.tensors = Tensors.of(self.model)
        self._places = _places(self.model)
        self._where = self._sources(where, stored)

    @property
    def names(self) -> list[str]:
        """First names of all tensors that lie on disk, in the model's order."""
        return list(self._where)

    def first(self, names: Iterable[str]) -> list[str]:
        """Those of ``names`` that lie on disk, tied tensors once, by the name that plans use."""
        found = dict.fromkeys(self.tensors.first[name] for name in names)
        return [name for name in found if name in self._where]

    def under(self, prefix: str) -> list[str]:
        """First names of the tensors of a module (``prefix`` ends in a dot)."""
        return self.first(name for name in self.tensors.first if name.startswith(prefix))

    def read(self, name: str, device: torch.device | None = None) -> Tensor:
        """One tensor's values, in the model's type; a copy, so that nothing keeps its file mapped.

        Raises:
            PyPruneError: it holds NaN or infinity, or the file cannot be read.
        """
        file, key = self._where[name]
        with safe_open(file, framework="pt") as content:
            mapped = content.get_tensor(key)
            out = mapped.to(device or "cpu", self._held(name).dtype, copy=True)
            del mapped
        if out.is_floating_point() and out.numel():
            low, high = torch.aminmax(out)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                bad = int((~torch.isfinite(out)).sum())
                problem = f"{name} has {bad:,} weights that are not finite"
                raise PyPruneError(OPTION, str(self.folder), problem, "The checkpoint is damaged.")
        return out

    @contextmanager
    def loaded(self, names: Iterable[str], gradients: Iterable[str] = ()) -> Iterator[dict[str, Tensor]]:
        """Within it these tensors have their values, tied ones under every name; afterwards they are on meta again.

        Args:
            names: first names; those of ``gradients`` require gradients.
        """
        graded = set(gradients)
        before: dict[str, Tensor] = {}
        try:
            for name in names:
                before[name] = held = self._held(name)
                values = self.read(name, self.device)
                if isinstance(held, nn.Parameter):
                    values = nn.Parameter(values, requires_grad=name in graded)
                self._put(name, values)
            yield {name: self._held(name) for name in before}
        finally:
            for name, held in before.items():
                self._put(name, held)

    def _held(self, name: str) -> Tensor:
        module, last, parameter = self._places[name][0]
        held = (module._parameters if parameter else module._buffers)[last]
        assert held is not None
        return held

    def _put(self, name: str, tensor: Tensor) -> None:
        for module, last, parameter in self._places[name]:
            held: dict[str, Any] = module._parameters if parameter else module._buffers
            held[last] = tensor

    def _sources(self, where: dict[str, Path], stored: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Path, str]]:
        """First name -> (file, key there)."""
        prefix = f"{self.model.base_model_prefix}."
        wanted = self.model.state_dict().keys()
        out: dict[str, tuple[Path, str]] = {}
        known = set()
        for name, first in self.tensors.first.items():
            if name not in wanted:
                continue
            key = next((k for k in (name, name.removeprefix(prefix)) if k in where), None)
            if key is None:
                continue
            known.add(key)
            shape = self.tensors.shapes[name]
            if tuple(stored[key][0]) != shape:
                problem = f"{key} has shape {list(stored[key][0])} where its config.json says {list(shape)}"
                raise PyPruneError(OPTION, str(self.folder), problem)
            if first in out and not self._equal(out[first], (where[key], key)):
                problem = f"{key} and {out[first][1]} differ, and the model's class ties them"
                raise PyPruneError(OPTION, str(self.folder), problem, IN_MEMORY)
            out.setdefault(first, (where[key], key))
        order = dict.fromkeys(first for name, first in self.tensors.first.items() if name in wanted)
        missing = [name for name in order if name not in out]
        if missing:
            problem = f"lacks {len(missing)} of the model's tensors under their own names, among them {missing[0]}"
            hint = f"Checkpoints that are converted when they are opened cannot be streamed. {IN_MEMORY}"
            raise PyPruneError("stream", str(self.folder), problem, hint)
        return {name: out[name] for name in order}

    @staticmethod
    def _equal(one: tuple[Path, str], other: tuple[Path, str]) -> bool:
        with safe_open(one[0], framework="pt") as a, safe_open(other[0], framework="pt") as b:
            return torch.equal(a.get_tensor(one[1]), b.get_tensor(other[1]))

    def _generation_settings(self) -> None:
        from transformers import GenerationConfig

        if (self.folder / "generation_config.json").is_file():
            with quiet():
                self.model.generation_config = GenerationConfig.from_pretrained(self.folder)


def _contents(files: list[Path]) -> tuple[dict[str, Path], dict[str, tuple[Any, ...]]]:
    """Key -> file, and key -> (shape, type's name)."""
    where: dict[str, Path] = {}
    stored: dict[str, tuple[Any, ...]] = {}
    for file in files:
        with safe_open(file, framework="pt") as content:
            for key in content.keys():
                part = content.get_slice(key)
                where[key], stored[key] = file, (part.get_shape(), part.get_dtype())
    return where, stored


_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _dtype(asked: str, config: Any, stored: dict[str, tuple[Any, ...]]) -> torch.dtype:
    """As transformers decides for ``dtype="auto"``: what the configuration says, else the first stored weight's."""
    if asked != "auto":
        return getattr(torch, asked)
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    return next((_FLOATS[kind] for _, kind in stored.values() if kind in _FLOATS), torch.float32)


def _persistent(model: nn.Module) -> dict[str, Tensor]:
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def _refuse_mixed(model: Any, dtype: torch.dtype, folder: Path) -> None:
    """Some classes keep a few modules in float32, which only their own loading knows."""
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    usual = getattr(model, "_keep_in_fp32_modules", None) or ()
    kept = [*strict, *(usual if dtype == torch.float16 else ())] if dtype in (torch.float16, torch.bfloat16) else []
    if kept:
        problem = (
            f"{type(model).__name__} keeps {sorted(kept)[0]} in float32 beside {str(dtype).removeprefix('torch.')}"
        )
        raise PyPruneError("stream", str(folder), problem, "Give dtype float32, or prune it in memory, without stream.")


def _fill_buffers(model: Any, device: torch.device) -> None:
    """Values for the buffers that no checkpoint holds, from the class's own initialisation, as when it is opened."""
    saved, found = model.state_dict().keys(), computed(model)
    for path, module in model.named_modules():
        for last, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:
                problem = f"{path}.{last} is a tensor that is neither parameter nor buffer"
                raise PyPruneError("stream", type(model).__name__, problem, IN_MEMORY)
        for last, buffer in module._buffers.items():
            name = f"{path}.{last}" if path else last
            if buffer is None or not buffer.is_meta or name in saved:
                continue
            if name not in found:
                problem = f"{name} is in no checkpoint, and its class does not say how it is filled"
                raise PyPruneError("stream", type(model).__name__, problem, IN_MEMORY)
            module._buffers[last] = found[name].to(device)


def _places(model: nn.Module) -> dict[str, list[tuple[nn.Module, str, bool]]]:
    """First name of every tensor -> (module, name there, whether it is a parameter) wherever it is held."""
    first = Tensors.of(model).first
    out: dict[str, list[tuple[nn.Module, str, bool]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        held = [*((n, p, True) for n, p in module._parameters.items())]
        held += [(n, b, False) for n, b in module._buffers.items()]
        for last, tensor, parameter in held:
            if tensor is not None:
                out.setdefault(first[f"{path}.{last}" if path else last], []).append((module, last, parameter))
    return out
