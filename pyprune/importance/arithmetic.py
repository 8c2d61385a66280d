"""What a token costs in products, counted while a model runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


@torch.no_grad()
def macs(model: Any, lengths: Sequence[int]) -> tuple[int, int]:
    """(multiply-accumulates of a token with weights, and with each position that it attends to).

    PyTorch's own counter over one pass of T tokens gives a T + b T^2, where every token attends to all T positions; two
    lengths give a and b. Norms, activations and rotations are not counted.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    per_token = []
    for tokens in lengths:
        ids = torch.zeros(1, tokens, dtype=torch.int64, device=next(model.parameters()).device)
        # As plain products: not every backend's fused kernel has a formula in the counter.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(input_ids=ids, use_cache=False)
        per_token.append(counter.get_total_flops() / 2 / tokens)
    attention = (per_token[1] - per_token[0]) / (lengths[1] - lengths[0])
    return round(per_token[0] - attention * lengths[0]), round(attention)
