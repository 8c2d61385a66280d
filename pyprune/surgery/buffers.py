"""Buffers that no checkpoint holds: a class computes them anew whenever a model is opened."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def computed(model: Any) -> dict[str, Tensor]:
    """Their values as ``model``'s class computes them, by name; without those that it does not say how to fill.

    The model's tensors are on the meta device, before and after.
    """
    saved = model.state_dict().keys()
    places: dict[str, tuple[nn.Module, str, Tensor]] = {}
    for path, module in model.named_modules():
        for last, buffer in module._buffers.items():
            name = f"{path}.{last}" if path else last
            if buffer is not None and buffer.is_meta and name not in saved:
                places[name] = (module, last, buffer)
    if not places:
        return {}
    for module, last, buffer in places.values():
        empty = torch.empty_like(buffer, device="cpu")
        module._buffers[last] = empty.fill_(float("nan")) if empty.is_floating_point() else empty.zero_()
    parameters = list(model.parameters())
    for parameter in parameters:  # has no values to give it: filling one on the meta device takes a millisecond
        parameter._is_hf_initialized = True
    try:
        with torch.random.fork_rng(devices=[]):
            model.initialize_weights()
        found = {name: module._buffers[last] for name, (module, last, _) in places.items()}
    except Exception:  # a remote class's initialisation may want weights that are there
        found = {}
    finally:
        for module, last, buffer in places.values():
            module._buffers[last] = buffer
        for owner in (*model.modules(), *parameters):
            vars(owner).pop("_is_hf_initialized", None)
    return {n: b for n, b in found.items() if b is not None and not (b.is_floating_point() and b.isnan().any())}
