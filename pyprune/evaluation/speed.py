"""Tokens a second of stock ``generate``, greedy, of one or several models side by side.

A round generates ``new_tokens + 1`` tokens after a prompt of random tokens. The logits of the first appear after ``t``
seconds (the prompt in one pass), those of the others after another ``d`` seconds, one pass each:

    prefill = batch * prompt_tokens / t        decode = batch * new_tokens / d        first token = t

Every model runs once to warm up; then each round runs every model in turn, so that all of them see the same machine.
Figures are medians over the rounds, spreads the distance between the quartiles.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pyprune.evaluation.generation import generating_by
from pyprune.importance.modes import evaluating
from pyprune.progress import bar


@dataclass(frozen=True)
class Speed:
    """How fast a model reads and writes.

    Attributes:
        prefill: tokens of the prompt read in a second.
        decode: tokens written in a second, after the first.
        first_token: seconds until the first token.
        prefill_spread, decode_spread, first_token_spread: distance between the quartiles, in the figure's own unit.
        prompt_tokens, new_tokens, batch, rounds: what a round is.
        threads: CPU threads of PyTorch.
        device, dtype: where and in which type the model runs.
    """

    prefill: float
    prefill_spread: float
    decode: float
    decode_spread: float
    first_token: float
    first_token_spread: float
    prompt_tokens: int
    new_tokens: int
    batch: int
    rounds: int
    threads: int
    device: str
    dtype: str

    @property
    def protocol(self) -> str:
        return (
            f"stock generate, greedy, batch {self.batch}, prompt {self.prompt_tokens} tokens, {self.new_tokens} tokens "
            f"after the first, median of {self.rounds} rounds after a warm-up, {self.threads} threads, {self.device}, "
            f"{self.dtype}"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {**asdict(self), "protocol": self.protocol}


def speeds(
    models: Mapping[str, Any], *, prompt_tokens: int = 128, new_tokens: int = 32, batch: int = 1, rounds: int = 5
) -> dict[str, Speed]:
    """Measure models in turn; the same prompt of random tokens for all of them.

    Args:
        models: name -> transformers causal LM that ``generate`` runs; modes are restored afterwards.
        prompt_tokens: tokens of the prompt.
        new_tokens: tokens generated after the first, at least 1.
        batch: prompts at once.
        rounds: measured runs of each model.
    """
    vocabulary = min(int(m.get_output_embeddings().weight.shape[0]) for m in models.values())
    prompt = torch.randint(vocabulary, (batch, prompt_tokens), generator=torch.Generator().manual_seed(0))
    first: dict[str, list[float]] = {name: [] for name in models}
    later: dict[str, list[float]] = {name: [] for name in models}
    with evaluating(*models.values()):
        for model in models.values():
            generate(model, prompt, new_tokens + 1)
        with bar("speed", rounds) as line:
            for _ in range(rounds):
                for name, model in models.items():
                    stamps, _ = generate(model, prompt, new_tokens + 1)
                    first[name].append(stamps[1] - stamps[0])
                    later[name].append(stamps[-1] - stamps[1])
                line.advance()
    return {
        name: _speed(model, first[name], later[name], prompt_tokens, new_tokens, batch)
        for name, model in models.items()
    }


@torch.no_grad()
def generate(model: Any, prompt: torch.Tensor, tokens: int) -> tuple[list[float], Any]:
    """Greedy generation of exactly ``tokens`` tokens, on the model's device.

    Args:
        prompt: int64 [batch, length].

    Returns:
        (clock at the start and when each token's logits were there, ``tokens + 1`` values in seconds; what ``generate``
        returns).
    """
    from transformers import GenerationConfig, LogitsProcessorList

    ids = prompt.to(model.device)
    clock = _Clock(ids.device)
    # No end-of-sequence token: every model shall write as many tokens.
    config = GenerationConfig(do_sample=False, max_new_tokens=tokens, pad_token_id=0, return_dict_in_generate=True)
    with generating_by(model, config):
        clock.tick()
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config,
            logits_processor=LogitsProcessorList([clock]),
        )  # fmt: skip
    return clock.stamps, out


class _Clock:
    """Notes the time whenever logits are there; changes nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.stamps: list[float] = []

    def tick(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.stamps.append(time.perf_counter())

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.tick()
        return scores


def _speed(
    model: Any, first: Sequence[float], later: Sequence[float], prompt_tokens: int, new_tokens: int, batch: int
) -> Speed:
    weight = next(model.parameters())
    prefill, prefill_spread = _middle([batch * prompt_tokens / t for t in first])
    decode, decode_spread = _middle([batch * new_tokens / t for t in later])
    first_token, first_spread = _middle(first)
    return Speed(
        prefill, prefill_spread, decode, decode_spread, first_token, first_spread, prompt_tokens, new_tokens, batch,
        len(first), torch.get_num_threads(), str(weight.device), str(weight.dtype).removeprefix("torch."),
    )  # fmt: skip


def _middle(values: Sequence[float]) -> tuple[float, float]:
    """Median, and the distance between the quartiles."""
    if len(values) < 2:
        return values[0], 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return statistics.median(values), high - low
