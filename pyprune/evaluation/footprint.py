"""What a model needs, measured on the model itself: bytes of weights and cache, multiply-accumulates of a token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pyprune.caching import cache_of
from pyprune.evaluation.loglikelihood import max_positions
from pyprune.evaluation.speed import generate
from pyprune.evaluation.stages import measured
from pyprune.importance import arithmetic
from pyprune.importance.modes import evaluating

CACHE_TOKENS = (16, 32)
PASS_TOKENS = (64, 128)  # linear-attention models work in pieces of 64


@dataclass(frozen=True)
class Footprint:
    """Memory and arithmetic of a model.

    Attributes:
        parameters: tied ones count once.
        weights_bytes: of the parameters in memory.
        cache_bytes_per_token: by which the KV cache grows with a token of one sequence, over all layers.
        state_bytes: of the cache that do not grow, for one sequence (recurrent states); 0 for plain attention.
        macs_per_token: multiply-accumulates of a token in products with weights, output head included.
        attention_macs_per_position: those that a token needs in addition for every position that it attends to.
        peak_memory: largest resident size of the process while the model generated, in bytes (weights included).
        peak_gpu_memory: largest size of PyTorch's allocations on the GPU meanwhile, or None without one.
    """

    parameters: int
    weights_bytes: int
    cache_bytes_per_token: float
    state_bytes: int
    macs_per_token: int
    attention_macs_per_position: int
    peak_memory: int
    peak_gpu_memory: int | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return asdict(self)


def footprint(model: Any, *, prompt_tokens: int = 128, new_tokens: int = 32) -> Footprint:
    """Measure a model; its mode (train or eval) is restored afterwards.

    The peak covers whatever else the process holds, so nothing large should be there besides the model.

    Args:
        prompt_tokens, new_tokens: what is generated while the memory is watched.
    """
    with evaluating(model):
        with measured("generate") as stage:
            generate(model, torch.zeros(1, prompt_tokens, dtype=torch.int64), new_tokens)
        growing, constant = cache_bytes(model)
        weights, attention = macs(model)
    return Footprint(
        parameters=sum(p.numel() for p in model.parameters()),
        weights_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        cache_bytes_per_token=growing,
        state_bytes=constant,
        macs_per_token=weights,
        attention_macs_per_position=attention,
        peak_memory=stage.peak_memory,
        peak_gpu_memory=stage.peak_gpu_memory,
    )


def cache_bytes(model: Any) -> tuple[float, int]:
    """(bytes by which the cache of one sequence grows with a token, bytes that stay the same).

    Read off the caches that ``generate`` leaves after two prompts, so layers may differ in their KV heads. Below the
    length of a sliding window; from there on its layers no longer grow.
    """
    sizes = []
    for tokens in CACHE_TOKENS:
        _, out = generate(model, torch.zeros(1, tokens, dtype=torch.int64), 1)
        sizes.append(sum(t.untyped_storage().nbytes() for t in _tensors(cache_of(out))))
    growing = (sizes[1] - sizes[0]) / (CACHE_TOKENS[1] - CACHE_TOKENS[0])
    return growing, round(sizes[0] - growing * CACHE_TOKENS[0])


def macs(model: Any) -> tuple[int, int]:
    """:func:`pyprune.importance.arithmetic.macs` over lengths that the model has positions for."""
    positions = max_positions(model)
    return arithmetic.macs(model, PASS_TOKENS if positions >= PASS_TOKENS[1] else (positions // 2, positions))


def _tensors(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """The distinct tensors in an object's attributes, lists and mappings."""
    seen = set() if seen is None else seen
    if id(value) in seen or value is None:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, dict):
        inner: Any = value.values()
    elif isinstance(value, (list, tuple)):
        inner = value
    else:
        inner = vars(value).values() if hasattr(value, "__dict__") else ()
    for part in inner:
        yield from _tensors(part, seen)
