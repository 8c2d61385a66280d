"""Greedy continuations, to see what a model still says."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pyprune import progress
from pyprune.errors import PyPruneError
from pyprune.evaluation.loglikelihood import known_positions
from pyprune.importance.modes import evaluating
from pyprune.importance.sources import well_formed

USUAL = 3
"""Prompts that are asked when nobody says how many."""
PATIENCE = 60.0
"""Seconds that prompts which nobody asked for may take; the one that is begun then is finished."""
DEFAULT_PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "To make a good cup of tea, first",
    "The difference between weather and climate is",
    "def fibonacci(n):",
)


def sample_prompts(prompts: Any, count: int | None) -> list[str]:
    """The prompts to ask: at most ``count`` of those given, or of :data:`DEFAULT_PROMPTS`; None asks all given ones.

    Args:
        prompts: a list of texts, the path of a UTF-8 text file with one a line, or None for the default ones.

    Raises:
        PyPruneError: the file cannot be read or is empty, or ``count`` is more than there are.
    """
    if prompts is None:
        found, wanted = list(DEFAULT_PROMPTS), USUAL if count is None else count
    else:
        found = _read_prompts(os.fspath(prompts)) if isinstance(prompts, (str, os.PathLike)) else list(prompts)
        wanted = len(found) if count is None else count
    if wanted > len(found):
        raise PyPruneError("generations", wanted, f"there are {len(found)} prompts", "Give prompts with more of them.")
    return found[:wanted]


def _read_prompts(file: str) -> list[str]:
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        hint = "Give a text file, one prompt a line."
        raise PyPruneError("prompts", file, f"cannot be read: {reason}", hint) from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise PyPruneError("prompts", file, "holds no prompts", "Write one a line.")
    return found


def paired_samples(prompts: Sequence[str], before: Sequence[str], after: Sequence[str]) -> list[dict[str, str]] | None:
    """{"prompt", "before", "after"} of each prompt, as reports hold them; None without prompts."""
    found = zip(prompts, before, after, strict=True)
    return [{"prompt": p, "before": b, "after": a} for p, b, a in found] or None


def continuations(
    model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int, label: str, patience: float = math.inf
) -> list[str]:
    """:func:`continuation` of every prompt, in order, under a progress bar called ``label``.

    Args:
        patience: seconds after which no further prompt is begun; there are fewer answers then, but one at least.
    """
    out: list[str] = []
    start = time.monotonic()
    with progress.bar(label, len(prompts)) as bar:
        for prompt in prompts:
            if out and time.monotonic() - start > patience:
                break
            out.append(continuation(model, tokenizer, prompt, tokens))
            bar.advance()
    return out


@contextmanager
def generating_by(model: Any, settings: Any) -> Iterator[None]:
    """``model`` generates by ``settings`` alone within it; its own generation settings are back afterwards.

    Given to ``generate`` only, they would be filled up from the model's own: penalties, beams, forbidden tokens.
    """
    kept, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = kept


@torch.no_grad()
def continuation(model: Any, tokenizer: Any, prompt: str, tokens: int = 32) -> str:
    """What ``model`` says after ``prompt``: at most ``tokens`` tokens, greedy, without special tokens.

    Where both together are more than the positions that the model knows, the prompt loses its beginning.

    Generation settings that came with the checkpoint are not used, but for its end marks.

    Args:
        model: a transformers causal LM; its mode (train or eval) is restored afterwards.
    """
    from transformers import GenerationConfig

    with evaluating(model):
        inputs = tokenizer(well_formed(prompt), return_tensors="pt").to(model.device)
        known = known_positions(model)
        if known is not None:
            tokens = min(tokens, known - 1)
            inputs = {name: inputs[name][:, tokens - known :] for name in ("input_ids", "attention_mask")}
        kept = model.generation_config
        greedy = GenerationConfig(
            do_sample=False, max_new_tokens=tokens, bos_token_id=kept.bos_token_id, eos_token_id=kept.eos_token_id,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )  # fmt: skip
        with generating_by(model, greedy):
            out = model.generate(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=greedy
            )
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
