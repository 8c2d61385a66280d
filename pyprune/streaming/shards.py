"""Slicing from file to file: the smaller model's safetensors, byte for byte what saving it from memory writes."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyprune import progress as bars
from pyprune.checkpoint.files import INDEX, SINGLE
from pyprune.selection.plan import Plan
from pyprune.streaming.disk import DiskModel
from pyprune.streaming.workspace import Workspace, put
from pyprune.surgery.apply import carry
from pyprune.surgery.names import Tensors
from pyprune.surgery.rebuild import Rebuilt, rebuild
from pyprune.surgery.transfer import slices

# The order of types in a safetensors file: the library sorts by type, last of these first, then by name.
_TYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip
_ORDER = {dtype: place for place, dtype in enumerate(_TYPES)}


class Slicer:
    """The smaller model without weights, and every one of its tensors on demand.

    Args:
        disk: the dense model.
        plan: over its groups.

    Attributes:
        model: the smaller model: all of it on the meta device, ties as in the dense one.
        resized: names of the groups that no configuration expresses, cut by resized modules.
        narrowed: of those that those cannot cut either, cut by narrow layers.
    """

    def __init__(self, disk: DiskModel, plan: Plan) -> None:
        self._disk = disk
        self._rebuilt: Rebuilt = rebuild(disk.model, plan)
        self.model = self._rebuilt.model
        self.resized, self.narrowed = self._rebuilt.resized, self._rebuilt.narrowed
        _tie(self.model, disk.tensors, self._rebuilt.names.old)
        carry(disk.model, self.model, self._rebuilt.names.old)

    def read(self, name: str) -> Tensor:
        """One tensor of the smaller model, contiguous, on the CPU."""
        positions = self._rebuilt.positions.get(name)
        if positions is not None:
            return torch.from_numpy(positions.copy())
        first = self._disk.tensors.first[self._rebuilt.names.old(name)]
        source = self._disk.read(first)
        kept = self._rebuilt.kept.get(first)
        return source if not kept else slices([source], [kept])[0].contiguous()


def _tie(model: nn.Module, tensors: Tensors, old_name: Callable[[str], str]) -> None:
    """Places of ``model`` whose tensors are one in the dense model hold one parameter."""
    held: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for last, parameter in list(module._parameters.items()):
            first = tensors.first.get(old_name(f"{path}.{last}" if path else last))
            if parameter is not None and first is not None:
                module._parameters[last] = held.setdefault(first, parameter)


def write_shards(slicer: Slicer, written: Any, work: Path, space: Workspace, max_shard_size: int | str) -> None:
    """The weight files of ``written`` in the folder ``work``, as its ``save_pretrained`` splits and names them.

    Shards are made in ``space``, one tensor in memory at a time; those that an earlier run finished are taken as they
    are.

    Args:
        slicer: where values come from.
        written: the model as it is saved: that of ``slicer``, or one of another class with the same tensors.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state = written.state_dict()
    for name in written._keys_to_ignore_on_save or ():
        state.pop(name, None)
    state = remove_tied_weights_from_state_dict(state, written)
    split = split_torch_state_dict_into_shards(
        state, filename_pattern=SINGLE.replace(".safetensors", "{suffix}.safetensors"), max_shard_size=max_shard_size
    )
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    folder = space.path / "shards"
    folder.mkdir(exist_ok=True)
    with bars.bar("writing", len(shapes)) as bar:
        for file, names in split.filename_to_tensors.items():
            if not (folder / file).is_file():
                _write(folder / file, {name: shapes[name] for name in names}, slicer.read, bar)
            else:
                bar.advance(len(names))
    if split.is_sharded:
        index = {
            "metadata": {"total_parameters": written.num_parameters(), **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        (work / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for file in split.filename_to_tensors:
        os.replace(folder / file, work / file)


def _write(
    target: Path,
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    read: Callable[[str], Tensor],
    bar: bars.Bar,
) -> None:
    """One safetensors file, a tensor at a time (the library's own writer wants all of a file's tensors in memory)."""
    order = sorted(shapes, key=lambda name: (-_ORDER[shapes[name][1]], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        shape, dtype = shapes[name]
        start, end = end, end + dtype.itemsize * int(torch.Size(shape).numel())
        header[name] = {"dtype": _TYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    work = target.with_suffix(".partial")
    with work.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            values = read(name)
            if (tuple(values.shape), values.dtype) != shapes[name]:
                raise RuntimeError(f"{name} was sliced to {list(values.shape)} {values.dtype}, not {shapes[name]}")
            file.write(values.reshape(-1).view(torch.uint8).numpy().data)
            bar.advance()
    put(work, target)
