"""One step: a batch that goes through the model in one piece, and the call itself."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.importance.calibration import batch_rows, batch_tokens, take
from pyprune.importance.losses import logits_of, targets_of


@dataclass(frozen=True)
class Step:
    """Inputs of one forward pass, on the model's device, and what each position predicts (int64 [batch, length])."""

    inputs: dict[str, Any]
    targets: Tensor

    @property
    def rows(self) -> int:
        """Sequences in it."""
        return int(self.targets.shape[0])

    def part(self, rows: slice) -> Step:
        """Some of its sequences."""
        return Step(take({**self.inputs, "labels": self.targets}, rows), self.targets[rows]).unlabelled()

    def unlabelled(self) -> Step:
        """The model computes no loss of its own when it sees no labels."""
        return Step({k: v for k, v in self.inputs.items() if k != "labels"}, self.targets)


def make_steps(
    batches: Iterable[Mapping[str, Any]], device: torch.device, single: bool = False, tokens: int = 0
) -> list[Step]:
    """The batches as steps.

    Args:
        device: where the model is.
        single: cut them into one sample each.
        tokens: join neighbours of equal length until a step has this many tokens. Scores do not depend on batches, and
            matrix products on few rows are slow.
    """
    steps = []
    for batch in [dict(b) for b in batches] if single else _joined(batches, tokens):
        whole = Step(
            {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}, targets_of(batch).to(device)
        )
        count = batch_rows(batch)
        pieces = [slice(i, i + 1) for i in range(count)] if single and count > 1 else [slice(0, count)]
        steps += [whole.part(piece) for piece in pieces]
    return steps


def _joined(batches: Iterable[Mapping[str, Any]], tokens: int) -> list[dict[str, Any]]:
    out: list[list[Mapping[str, Any]]] = []
    for batch in batches:
        size = sum(batch_tokens(b) for b in (*out[-1], batch)) if out else 0
        if out and size <= tokens and _form(batch) is not None and _form(batch) == _form(out[-1][0]):
            out[-1].append(batch)
        else:
            out.append([batch])
    return [dict(p[0]) if len(p) == 1 else {k: torch.cat([b[k] for b in p]) for k in p[0]} for p in out]


def _form(batch: Mapping[str, Any]) -> list[tuple[str, Any]] | None:
    """What batches must have in common to be joined along their first dimension; None if this one cannot be."""
    rows = batch_rows(batch)
    if not all(isinstance(v, Tensor) and v.dim() > 1 and v.shape[0] == rows for v in batch.values()):
        return None
    return [(k, (v.shape[1:], v.dtype, v.device)) for k, v in batch.items()]


class Forward:
    """Calls the model for its logits, without a cache.

    Args:
        model: anything that returns logits [batch, length, vocabulary], or an output or tuple that holds them.

    Attributes:
        around: makes the context manager that every piece of a forward pass runs in.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.around: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._here = threading.local()
        signature = inspect.signature(model.forward).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.values())
        cached = hasattr(getattr(model, "config", None), "use_cache")
        self._options = {"use_cache": False} if "use_cache" in signature or (open_ended and cached) else {}

    def __call__(self, step: Step) -> Tensor:
        """Logits [batch, length, vocabulary] of a step."""
        with self._entered():
            return logits_of(self.model(**step.inputs, **self._options))

    def again(self, call: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        """``call`` as it runs in a forward pass, for when it is computed once more in a backward pass.

        Contexts belong to a thread, and the backward pass of a GPU has threads of its own.
        """

        def run(x: Tensor) -> Any:
            with self._entered():
                return call(x)

        return run

    @contextmanager
    def _entered(self) -> Iterator[None]:
        if getattr(self._here, "inside", False):
            yield
            return
        self._here.inside = True
        try:
            with self.around():
                yield
        finally:
            self._here.inside = False
