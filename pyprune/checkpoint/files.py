"""What lies in a checkpoint folder, checked before anything is loaded from it."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from pyprune.errors import PyPruneError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
OPTION = "model_name_or_path"

_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
_HEADER_LIMIT = 100_000_000


def check_folder(folder: Path) -> None:
    """Raises PyPruneError unless ``folder`` holds a configuration and complete safetensors weights."""
    read_config(folder)
    for shard in weight_files(folder):
        _check_safetensors(folder, shard)


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` as it stands."""
    path = folder / "config.json"
    if not path.is_file():
        gguf = next(iter(sorted(folder.glob("*.gguf"))), None)
        hint = "Name a folder with a checkpoint of transformers." if gguf is None else f"Name its GGUF file: {gguf}."
        raise PyPruneError(OPTION, str(folder), "has no config.json", hint)
    config = _json(path)
    if not isinstance(config, dict):
        raise PyPruneError(OPTION, str(path), "is not a configuration")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint, all present."""
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if index.is_file():
        content = _json(index)
        mapped = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(mapped, dict) or not all(isinstance(name, str) for name in mapped.values()):
            raise PyPruneError(OPTION, str(index), "does not say which file holds which weight", "Download it again.")
        shards = sorted(set(mapped.values()))
        missing = [s for s in shards if not (folder / s).is_file()]
        if missing:
            named = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise PyPruneError(
                OPTION,
                str(folder),
                f"{len(missing)} of {len(shards)} shards are missing: {named}",
                "Download them again.",
            )
        return [folder / s for s in shards]
    pickles = [p.name for pattern in _PICKLES for p in sorted(folder.glob(pattern))]
    if pickles:
        raise PyPruneError(
            OPTION,
            str(folder),
            f"has its weights in a pickle only ({pickles[0]}), which can run any code when it is opened",
            "If you trust it, convert it once: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other).",
        )
    raise PyPruneError(OPTION, str(folder), f"has no weights ({SINGLE} or {INDEX})")


def _check_safetensors(folder: Path, path: Path) -> None:
    """The header is whole and the data is as long as it says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _HEADER_LIMIT
        header = file.read(length) if length < min(_HEADER_LIMIT, size) else b""
    try:
        entries = json.loads(header)
        end = max((v["data_offsets"][1] for k, v in entries.items() if k != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise PyPruneError(
            OPTION, str(folder), f"{path.name} is not a whole safetensors file", "Download it again."
        ) from None
    if size != 8 + length + end:
        raise PyPruneError(
            OPTION,
            str(folder),
            f"{path.name} is cut short: {size:,} bytes where its header says {8 + length + end:,}",
            "Download it again.",
        )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PyPruneError(OPTION, str(path), f"is not JSON ({error})") from None
