"""Backward passes in which every decoder block runs again, so that one block's activations are in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyprune.importance.blocks import Call, intercepted
from pyprune.importance.steps import Forward


@contextmanager
def recomputed(forward: Forward, blocks: list[nn.Module]) -> Iterator[None]:
    """Within it ``blocks`` keep nothing but the stream that enters them (Chen et al. 2016, arXiv 1604.06174)."""

    def handler(i: int, stream: Tensor, call: Call, rest: list[Any]) -> Any:
        again = forward.again(call)
        return checkpoint(again, stream, use_reentrant=False, preserve_rng_state=False, determinism_check="none")

    with intercepted(blocks, handler):
        yield
