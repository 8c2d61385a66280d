"""How far a cut model is from the dense one: the Kullback-Leibler divergence of next-token distributions.

    KL(p || q) = sum_i p_i log(p_i / q_i),   p: dense, q: cut

over the dense model's most likely tokens and one class for all others together, in nats per token
(:mod:`pyprune.importance.divergence`).

Of a larger vocabulary than ``WORDS`` only the tokens to which the dense model gives most over the whole text take part:
both distributions are those given that one of them follows. Logits of a large vocabulary cost more than the layers of a
small model, and tokens of other languages tell nothing of the widths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.errors import PyPruneError
from pyprune.importance.blocks import Call, intercepted, like, stream_of
from pyprune.importance.divergence import divergence, real_tokens, scored, summary
from pyprune.importance.steps import Forward, Step
from pyprune.importance.words import WORDS, can_narrow, head_of, mass, narrowed
from pyprune.search.masking import Masking
from pyprune.search.refits import Refits

STREAM_BYTES = 64 << 20  # of residual streams at the borders of blocks


class Fitness:
    """Divergence of candidates from the dense model.

    A candidate that equals the base (:meth:`rebase`) in the first blocks is computed behind them only, from the base's
    residual streams, with the same result.

    Attributes:
        words: how many tokens of the vocabulary take part.

    Args:
        model: in evaluation mode, its weights as they are.
        blocks: its decoder blocks; None where it cannot be run block by block.
        refits: what matrices are exchanged for.
        masking: exchanges them.
        steps: held-out text.
        stream_bytes: memory for the base's streams; with less, fewer borders are kept.

    Raises:
        PyPruneError: the dense model gives NaN or infinity.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[nn.Module] | None, refits: Refits, masking: Masking,
        steps: Sequence[Step], stream_bytes: int = STREAM_BYTES,
    ) -> None:  # fmt: skip
        self._forward, self._refits, self._masking = Forward(model), refits, masking
        self._blocks = [] if blocks is None else list(blocks)
        self.steps = list(steps)
        self._bound = stream_bytes
        self._forms: dict[int, Any] = {}
        self._base: dict[str, int] | None = None
        self._streams: list[dict[int, Tensor]] = [{} for _ in self.steps]
        self._dense: list[tuple[Tensor, Tensor]] = []
        self._real = [real_tokens(step) for step in self.steps]
        self._narrowed = narrowed(model, None)
        refits.at({}, masking)
        total, head = torch.zeros(0), head_of(model)
        for number in range(len(self.steps)):
            logits = self._scored(number, self._logits(number, 0, None, learn=True))
            if not bool(logits.isfinite().all()):
                hint = "Load the model in float32 or bfloat16, and look at the calibration text."
                raise PyPruneError("model", type(model).__name__, "gives logits with NaN or infinity", hint)
            if logits.shape[-1] > WORDS and head is not None:
                total = mass(logits) if number == 0 else total + mass(logits)
            else:
                self._dense.append(summary(logits))
        self.words = logits.shape[-1]
        if len(total):
            self._narrow(model, total.topk(WORDS).indices.sort().values)

    @torch.no_grad()
    def _narrow(self, model: nn.Module, words: Tensor) -> None:
        """Only ``words`` take part from now on, if the logits are those of the head and nothing else."""
        if can_narrow(self._forward, words, self.steps[0]):
            self._narrowed = narrowed(model, words)
        for number in range(len(self.steps)):
            logits = self._scored(number, self._logits(number, 0, None))
            self._dense.append(summary(logits))
        self.words = logits.shape[-1]

    def _scored(self, number: int, logits: Tensor) -> Tensor:
        """Those of the tokens that count, [tokens, vocabulary]; no copy where all of them do."""
        return scored(logits, self._real[number])

    @property
    def tokens(self) -> list[int]:
        """Tokens that count, by step."""
        return [int(mask.sum()) for mask in self._real]

    @torch.no_grad()
    def total(self, widths: Mapping[str, int], first: int, last: int) -> float:
        """Sum of the divergence, in nats, over the tokens of steps ``first`` to ``last - 1``; infinite where the model
        gives NaN."""
        self._refits.at(widths, self._masking)
        changed = self._first_changed(widths)
        total = 0.0
        for number in range(first, last):
            start = max((j for j in self._streams[number] if j <= changed), default=0)
            logits = self._logits(number, start, self._streams[number].get(start))
            total += divergence(self._scored(number, logits), *self._dense[number])
        return total if math.isfinite(total) else math.inf

    def of(self, widths: Mapping[str, int]) -> float:
        """Mean divergence over all steps, nats a token."""
        return self.total(widths, 0, len(self.steps)) / sum(self.tokens)

    @torch.no_grad()
    def rebase(self, widths: Mapping[str, int]) -> None:
        """Keep the streams of the model with ``widths``."""
        if not self._blocks or widths == self._base:
            return
        self._refits.at(widths, self._masking)
        first = self._first_changed(widths)
        for number, streams in enumerate(self._streams):
            start = max((j for j in streams if j <= first), default=0)
            saved = {j: x for j, x in streams.items() if j <= start}
            self._logits(number, start, streams.get(start), saved)
            self._streams[number] = saved
        self._base = dict(widths)

    def forget(self) -> None:
        """Drop the base's streams: matrices are exchanged for others now."""
        self._base, self._streams = None, [{} for _ in self.steps]

    def _first_changed(self, widths: Mapping[str, int]) -> int:
        """The first block in which ``widths`` differ from the base's."""
        if self._base is None:
            return 0
        last = len(self._blocks)
        changed = (b for g, b in self._refits.sites.block_of.items() if widths.get(g) != self._base.get(g))
        return min(changed, default=last - 1)

    def _kept_borders(self, stream: Tensor) -> set[int]:
        """In front of which blocks streams are kept, so that all of them stay below the bound."""
        size = stream.element_size() * stream.shape[-1] * sum(s.targets.numel() for s in self.steps)
        count = min(len(self._blocks) - 1, self._bound // max(1, size))
        return {round((k + 1) * len(self._blocks) / (count + 1)) for k in range(count)}

    def _logits(
        self, number: int, start: int, stream: Tensor | None, save: dict[int, Tensor] | None = None, learn: bool = False
    ) -> Tensor:
        """Logits of one step, blocks before ``start`` left out; ends behind the last kept border with ``save``."""
        if not self._blocks:
            return self._run(number)
        borders: set[int] = set()

        def handler(j: int, given: Tensor, call: Call, rest: list[Any]) -> Any:
            nonlocal borders
            if j < start:
                return self._forms[j](given)
            x = stream if j == start and stream is not None else given
            if save is not None:
                borders = borders or self._kept_borders(x)
                if j in borders:
                    save[j] = x
                if j >= max(borders, default=0):
                    raise _Behind
            out = call(x)
            if learn:
                stream_of(out)
                self._forms[j] = like(out)
            return out

        with intercepted(self._blocks, handler):
            try:
                return self._run(number)
            except _Behind:
                return torch.empty(0)

    def _run(self, number: int) -> Tensor:
        with torch.no_grad(), self._masking, self._narrowed:
            return self._forward(self.steps[number])


def check_finite(best: float) -> None:
    """Raises PyPruneError unless the divergence of the best candidate is a number."""
    if not math.isfinite(best):
        problem = "gives NaN or infinity on the calibration text, whichever way it is cut"
        hint = "Load it in float32 or bfloat16, look at the calibration text, or cut less."
        raise PyPruneError("model", None, problem, hint)


def figure(value: float | None) -> float | None:
    """As reports have it: JSON knows neither NaN nor infinity."""
    return value if value is not None and math.isfinite(value) else None


class _Behind(Exception):
    """Ends a forward pass of which no more is needed."""
