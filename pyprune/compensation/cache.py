"""Sums of the calibration on the disk: a refit that was made before needs no forward pass.

What enters a matrix depends on the model, the text, and all that was changed in front of it. The key of a matrix's sums
is therefore a chain: it begins with the weights, the calibration and how tokens count, and goes on with every changed
tensor, bit for bit. Runs share what they compute until their models first differ, whatever made them differ: a width,
a penalty, another version of the refit.

``sums-KEY.safetensors`` holds a matrix's sums, Gram matrices as upper triangles, or the weights that an inner refit
found; ``walk-KEY.json`` what a few tokens were run to learn: the order in which blocks use their matrices, and whose
output is added to the stream as it is.
"""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pyprune.compensation.gather import Gathered
from pyprune.compensation.refit import Sums
from pyprune.compensation.triangle import mirrored, upper
from pyprune.files import PARTIAL
from pyprune.importance.cache import keep_file, running_versions
from pyprune.importance.fingerprint import fingerprint
from pyprune.importance.taps import Key

log = logging.getLogger(__name__)
T = TypeVar("T")

LIMIT = 16.0  # GiB of sums in a folder
_STALE = 3600.0  # seconds after which a file that is not written to is never finished
_KINDS = ("sums", "walk", "scores", "measured")  # of files in a cache folder, whoever writes them
_NAME = 40  # characters of a fingerprint in a file's name


@dataclass
class Folder:
    """A folder of sums, and which of its files a run has used: those it does not remove."""

    path: Path
    used: set[Path] = field(default_factory=set)


class SumsCache:
    """What one run of the compensation reads from a folder and leaves there.

    Damaged files, and files of something else under such a name, are named in a warning and made anew. Files appear
    complete or not at all, so that several runs may share a folder.

    Args:
        folder: None keeps nothing and finds nothing; a :class:`Folder` is shared by all that a run keeps there.
        limit: GiB that all sums in the folder may take. For new ones those go that were not used for longest, of this
            run none: what finds no room is not kept.
        start: what the first sums depend on, as values for :func:`fingerprint`; called where there is a folder.

    Attributes:
        read: how often sums were found.
    """

    def __init__(self, folder: str | Path | Folder | None, limit: float, start: Callable[[], Any]) -> None:
        shared = folder if folder is None or isinstance(folder, Folder) else Folder(Path(folder))
        self.folder = None if shared is None else shared.path
        self.read = 0
        self._limit = int(limit * 2**30)
        self._used: set[Path] = set() if shared is None else shared.used
        self._chain = "" if folder is None else fingerprint([start(), running_versions()])
        self._first = self._chain
        self._answers: dict[str, Any] = self._read_answers(warn=True)

    def follow(self, *changes: Any) -> None:
        """The model was changed so: all that is asked from now on depends on it."""
        if self.folder is not None:
            self._chain = fingerprint([self._chain, list(changes)])

    def answer(self, question: Any, find: Callable[[], Any]) -> Any:
        """What ``find`` gives for the model as it is now: plain JSON."""
        if self.folder is None:
            return find()
        key = fingerprint([self._chain, question])[:_NAME]
        if key not in self._answers:
            self._answers[key] = find()
            self._answers = {**self._read_answers(warn=False), **self._answers}
            plain = json.dumps({"sum": fingerprint([self._first, self._answers]), "answers": self._answers})
            keep_file(self._answers_file(), lambda work: _write_text(work, plain), "it is not kept")
        return self._answers[key]

    def sums(self, name: str, parameters: Mapping[str, nn.Parameter]) -> Gathered | None:
        """The sums of parameter ``name``, in the model as it is now; None where they are not there."""
        return self._read("sums", name, lambda about, t: _opened(about, t, parameters, parameters[name].device))

    def keep(self, name: str, gathered: Gathered, parameters: Mapping[str, nn.Parameter]) -> None:
        """Keep the sums of parameter ``name`` in the model as it is now, unless they are not finite."""
        if self.folder is not None and all(
            bool(s.gram.isfinite().all()) for part in (gathered.train, gathered.held) for s in part.values()
        ):
            self._write("sums", name, *_closed(gathered, parameters))

    def weights(self, name: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """What :meth:`keep_weights` was given for ``name``, in the model as it is now; None where that is not there."""
        return self._read("weights", name, lambda about, tensors: (dict(about), dict(tensors)))

    def keep_weights(self, name: str, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Keep weights that were found for ``name`` in the model as it is now, with figures about them."""
        if self.folder is not None:
            self._write(
                "weights", name, json.dumps(about), {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
            )

    def _read(self, kind: str, name: str, opened: Callable[[Any, Mapping[str, Tensor]], T]) -> T | None:
        from safetensors import SafetensorError, safe_open

        if self.folder is None:
            return None
        key, path = self._place(kind, name)
        try:
            with safe_open(str(path), framework="pt") as file:
                meta = file.metadata()
                tensors = {k: file.get_tensor(k) for k in file.keys()}
            if meta["sum"] != fingerprint([key, meta["about"], tensors]):
                raise ValueError("a checksum does not agree")
            found = opened(json.loads(meta["about"]), tensors)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError):
            warnings.warn(f"{path} is damaged; it is made anew.", stacklevel=3)
            return None
        with suppress(OSError):
            os.utime(path)
        self._used.add(path)
        self.read += 1
        log.info("%s of %s read from %s", kind, name, path)
        return found

    def _write(self, kind: str, name: str, about: str, tensors: dict[str, Tensor]) -> None:
        from safetensors.torch import save_file

        key, path = self._place(kind, name)
        if not self._make_room(sum(t.numel() * t.element_size() for t in tensors.values())):
            log.info("no room for the %s of %s within %d bytes", kind, name, self._limit)
            return
        meta = {"about": about, "sum": fingerprint([key, about, tensors])}
        keep_file(path, lambda work: save_file(tensors, str(work), metadata=meta), "the sums are not kept")
        self._used.add(path)

    def _place(self, kind: str, name: str) -> tuple[str, Path]:
        assert self.folder is not None
        key = fingerprint([self._chain, kind, name])
        return key, self.folder / f"sums-{key[:_NAME]}.safetensors"

    def _make_room(self, needed: int) -> bool:
        """Whether ``needed`` bytes fit, after what was not used for longest has gone."""
        assert self.folder is not None
        for path in (p for kind in _KINDS for p in self.folder.glob(f".{kind}-*{PARTIAL}")):
            with suppress(OSError):  # of a run that was killed while it wrote
                if time.time() - path.stat().st_mtime > _STALE:
                    path.unlink()
        there = []
        for path in self.folder.glob("sums-*.safetensors"):
            with suppress(OSError):  # another run removed it
                there.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        over = sum(size for _, size, _ in there) + needed - self._limit
        others = sorted(entry for entry in there if entry[2] not in self._used)
        if over > sum(size for _, size, _ in others):
            return False
        for _, size, path in others:
            if over <= 0:
                break
            with suppress(OSError):
                path.unlink()
            over -= size
        return True

    def _answers_file(self) -> Path:
        assert self.folder is not None
        return self.folder / f"walk-{self._first[:_NAME]}.json"

    def _read_answers(self, warn: bool) -> dict[str, Any]:
        if self.folder is None:
            return {}
        try:
            given = json.loads(self._answers_file().read_text(encoding="utf-8"))
            if given["sum"] == fingerprint([self._first, given["answers"]]):
                return dict(given["answers"])
        except FileNotFoundError:
            return {}
        except (OSError, KeyError, TypeError, ValueError):
            pass
        if warn:
            warnings.warn(f"{self._answers_file()} is damaged; it is made anew.", stacklevel=4)
        return {}


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _closed(gathered: Gathered, parameters: Mapping[str, nn.Parameter]) -> tuple[str, dict[str, Tensor]]:
    """What :func:`_opened` opens: JSON, and tensors on the CPU."""
    tensors: dict[str, Tensor] = {}
    entries = []
    for key, train in gathered.train.items():
        place = "" if key.expert is None else f"{key.expert}."
        entry: dict[str, Any] = {"expert": key.expert, "bias": _where(gathered.biases.get(key), parameters)}
        for part, sums in (("train", train), ("held", gathered.held[key])):
            gram = sums.gram.cpu()
            tensors[f"{place}{part}.gram"] = upper(gram) if torch.equal(gram, gram.t()) else gram.contiguous()
            if sums.cross is not None:
                tensors[f"{place}{part}.cross"] = sums.cross.cpu().contiguous()
            entry[part] = {"inputs": len(gram), "power": sums.power, "rows": sums.rows}
        entries.append(entry)
    name = next(iter(gathered.train)).name if gathered.train else ""
    return json.dumps({"name": name, "transposed": gathered.transposed, "matrices": entries}), tensors


def _opened(
    about: Mapping[str, Any], tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter],
    device: torch.device,
) -> Gathered:  # fmt: skip
    found = Gathered(transposed=bool(about["transposed"]))
    for entry in about["matrices"]:
        key = Key(about["name"], entry["expert"])
        place = "" if key.expert is None else f"{key.expert}."
        for part, into in (("train", found.train), ("held", found.held)):
            gram, cross = tensors[f"{place}{part}.gram"], tensors.get(f"{place}{part}.cross")
            gram = gram if gram.dim() == 2 else mirrored(gram, entry[part]["inputs"])
            cross = None if cross is None else cross.to(device)
            into[key] = Sums(gram.to(device), cross, entry[part]["power"], entry[part]["rows"])
        if entry["bias"] is not None:
            found.biases[key] = _there(entry["bias"], parameters)
    return found


def _where(bias: Tensor | None, parameters: Mapping[str, nn.Parameter]) -> list[Any] | None:
    """Where a bias lies: [parameter's name, elements from its beginning, sizes, strides]."""
    if bias is None:
        return None
    for name, p in parameters.items():
        offset = bias.storage_offset() - p.storage_offset()
        same = p.untyped_storage().data_ptr() == bias.untyped_storage().data_ptr()
        if same and 0 <= offset < p.numel():
            return [name, offset, list(bias.shape), list(bias.stride())]
    raise ValueError("a bias lies in no parameter")


def _there(place: list[Any], parameters: Mapping[str, nn.Parameter]) -> Tensor:
    name, offset, sizes, strides = place
    p = parameters[name]
    return torch.as_strided(p.detach(), sizes, strides, p.storage_offset() + offset)
