"""What the dense model says about the training text, worked out once for each row and kept on the disk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyprune.errors import PyPruneError
from pyprune.files import whole_file
from pyprune.recovery.loss import Answers, teacher_answers
from pyprune.recovery.packing import Row, collate


class Teacher:
    """The dense model and its cache of answers.

    A row's answers lie in a safetensors file of their own, named by a digest of the row, in a folder named by the
    teacher's weights and the settings; so runs that share rows share the work, whatever else they mix in, and several
    processes may fill one cache. ``tokens`` [positions, k] in the narrowest type, ``log_probs`` float16 [positions, k].

    Args:
        model: a causal LM in evaluation mode, on the device of the training.
        identity: of its weights and the types that it computes in, a part of a folder's name.
        folder: where the cache lies.
        k: tokens kept of each position.
        temperature: that its distribution is softened with.
        positions: whether documents of a row are told apart by positions.
        autocast: makes the context in which it is run.
    """

    def __init__(
        self, model: nn.Module, identity: str, folder: Path, k: int, temperature: float, positions: bool, autocast: Any
    ) -> None:
        settings = f"{identity}-top{k}-t{temperature:g}" + ("" if positions else "-nopos")
        self.model, self.k, self.temperature, self.folder = model, k, temperature, folder / settings
        self.positions, self.autocast = positions, autocast
        self.reused = self.computed = 0
        vocabulary = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
        self._type = torch.int32 if vocabulary > 2**15 else torch.int16

    def __call__(self, rows: Sequence[Row], device: torch.device) -> Answers:
        """Answers at the learned positions of ``rows``, in the order of their batch."""
        parts = [self._row(row, device) for row in rows]
        tokens = torch.cat([p.tokens for p in parts]).to(device, torch.int64)
        return Answers(tokens, torch.cat([p.log_probs for p in parts]).to(device, torch.float32))

    def _row(self, row: Row, device: torch.device) -> Answers:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = self._file(row)
        with suppress(OSError, SafetensorError, KeyError):  # absent or damaged: worked out anew
            held = load_file(file)
            self.reused += 1
            return Answers(held["tokens"], held["log_probs"])
        batch = collate([row], self.positions, device)
        labels = batch.pop("labels")
        with torch.no_grad(), self.autocast():
            logits = self.model(**batch, use_cache=False).logits
        answers = teacher_answers(logits, labels, self.k, self.temperature)
        found = Answers(answers.tokens.to("cpu", self._type), answers.log_probs.to("cpu", torch.float16))
        self._write(file, found)
        self.computed += 1
        return found

    def _file(self, row: Row) -> Path:
        digest = hashlib.sha256()
        for part in (row.ids, row.labels, row.positions):
            digest.update(part.tobytes())
        name = digest.hexdigest()[:32]
        return self.folder / name[:2] / f"{name}.safetensors"

    def _write(self, file: Path, answers: Answers) -> None:
        """The file appears whole or not at all."""
        from safetensors.torch import save_file

        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(file) as work:
                save_file({"tokens": answers.tokens.contiguous(), "log_probs": answers.log_probs.contiguous()}, work)
        except Exception as error:  # the system's, or safetensors' own for a full disk
            reason = getattr(error, "strerror", None) or str(error)
            problem = f"cannot be written: {reason}"
            raise PyPruneError("distill_cache", str(self.folder.parent), problem, "Free some space.") from error


def check_vocabulary(teacher: Any, teacher_tokenizer: Any, model: Any, tokenizer: Any, name: str) -> None:
    """Teacher and student mean the same by a token id.

    Raises:
        PyPruneError: their heads have different widths, or their tokenizers different tokens.
    """
    widths = [m.get_output_embeddings().weight.shape[0] for m in (teacher, model)]
    hint = "Use the dense model that this one was pruned from, or another with the same tokenizer."
    if widths[0] != widths[1]:
        problem = f"has a vocabulary of {widths[0]:,} tokens, and the model one of {widths[1]:,}"
        raise PyPruneError("teacher", name, problem, hint)
    if teacher_tokenizer is None or tokenizer is None:
        return
    theirs, ours = teacher_tokenizer.get_vocab(), tokenizer.get_vocab()
    if theirs != ours:
        different = len(set(theirs.items()) ^ set(ours.items()))
        raise PyPruneError("teacher", name, f"has another vocabulary: {different:,} tokens differ", hint)
