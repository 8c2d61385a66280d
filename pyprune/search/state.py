"""What a search has found so far, in a JSON file that is always whole, so that a killed search goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.errors import PyPruneError
from pyprune.importance.cache import _NAMES, running_versions

FORMAT = "pyprune-search"
VERSION = 1
SAMPLED = 4096  # elements of each tensor that a model's fingerprint reads


@dataclass
class State:
    """Everything that the next generation depends on.

    Attributes:
        fingerprint: of model, calibration, order of removal, limits, target and options.
        seeds: name, widths and divergence on the screening tokens and on all (None where screening sufficed), in the
            order in which they were tried.
        best: widths of the best genome, in the order of the groups.
        anchor: widths at which the inputs of refits were collected.
        verified: the best genome that was measured with refits of its own: widths, divergence, screening.
        kl: divergence of the best on all held-out tokens, nats a token.
        screened: the same on the screening tokens.
        scale: size of the next moves.
        generation: generations that are over.
        points, kls: every genome that was tried, with its divergence on the screening tokens, brought to the scale of
            the best genome's last measure.
        evaluations: of candidates, on whatever tokens.
        seconds: spent, in all runs.
        history: generation, evaluations, divergence of the best, whether it was measured with refits of its own, and
            seconds, where the best changed or was measured anew.
    """

    fingerprint: str
    seeds: list[dict[str, Any]] = field(default_factory=list)
    best: list[int] = field(default_factory=list)
    anchor: list[int] = field(default_factory=list)
    verified: dict[str, Any] | None = None
    kl: float = float("inf")
    screened: float = float("inf")
    scale: float = 1.0
    generation: int = 0
    points: list[list[int]] = field(default_factory=list)
    kls: list[float] = field(default_factory=list)
    evaluations: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)

    def save(self, file: Path | None) -> None:
        """Write it; nothing without a file.

        Raises:
            PyPruneError: it cannot be written.
        """
        if file is not None:
            write_json(file, {"format": FORMAT, "version": VERSION, **asdict(self)}, "search_file")


def write_json(file: Path, data: Any, option: str) -> None:
    """A JSON file that is whole at any time.

    Raises:
        PyPruneError: it cannot be written; ``option`` is what the user named it by.
    """
    work = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with work.open("w", encoding="utf-8") as out:
            json.dump(data, out)
            out.flush()
            os.fsync(out.fileno())
        os.replace(work, file)
    except OSError as error:
        with suppress(OSError):
            work.unlink()
        hint = "Name a file in a folder that can be written, on a disk with room."
        raise PyPruneError(option, str(file), f"cannot be written: {error.strerror}", hint) from error


def load_state(file: Path | None, fingerprint: str, overwrite: bool = False) -> State:
    """The state in ``file``, or a new one where there is none.

    Raises:
        PyPruneError: the file holds something else, or another search and ``overwrite`` is off.
    """
    if file is None or not file.exists():
        return State(fingerprint)
    hint = "Remove it, name another file, or set overwrite to begin anew."
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT or data.pop("version", None) != VERSION:
            raise ValueError
        found = State(**data)
    except (OSError, ValueError, TypeError):
        if overwrite and file.is_file():
            return State(fingerprint)
        raise PyPruneError("search_file", str(file), "does not hold the state of a search", hint) from None
    if found.fingerprint == fingerprint:
        return found
    if overwrite:
        return State(fingerprint)
    problem = "holds a search of another model, calibration or request, or is of other versions of the packages"
    raise PyPruneError("search_file", str(file), problem, hint)


def fingerprint(model: nn.Module, values: Any) -> str:
    """SHA-256 over the model's class, configuration and tensors (names, shapes, some of the elements), the versions
    that run, and nested plain values and tensors."""
    digest = hashlib.sha256()
    given: dict[str, Any] = getattr(getattr(model, "config", None), "to_dict", dict)()
    config = json.dumps({k: v for k, v in given.items() if k not in _NAMES}, sort_keys=True, default=str)
    _feed(digest, [type(model).__name__, config, running_versions()])
    for name, p in (*model.named_parameters(), *model.named_buffers()):  # a state dict lacks some of the buffers
        flat = p.detach().reshape(-1)
        places = torch.linspace(0, max(0, flat.numel() - 1), min(SAMPLED, flat.numel()), dtype=torch.float64)
        _feed(digest, [name, list(p.shape), str(p.dtype), flat[places.long().to(flat.device)]])
    _feed(digest, values)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{value.dtype}{list(value.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for name in sorted(value):
            digest.update(f"{name}=".encode())
            _feed(digest, value[name])
    elif isinstance(value, Sequence) and not isinstance(value, str):
        digest.update(f"[{len(value)}".encode())
        for item in value:
            _feed(digest, item)
    else:
        digest.update(f"{value!r};".encode())
