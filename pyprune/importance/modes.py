"""The state in which a model is measured, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from pyprune.discovery.run import unwrap
from pyprune.errors import PyPruneError


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode within it; every module in its own mode (train or eval) afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def as_written() -> Iterator[None]:
    """Within it models run as their code has it: not compiled, and in the types that weights and activations have."""
    with torch.compiler.set_stance("force_eager"), _no_autocast():
        yield


@contextmanager
def own_modes() -> Iterator[None]:
    """Within it, or in a function that it decorates, none of the caller's modes is on: inference mode, in which
    nothing is made that can be changed in place or trained later, ``no_grad`` and autocast."""
    with torch.inference_mode(False), torch.enable_grad(), _no_autocast():
        yield


@contextmanager
def _no_autocast() -> Iterator[None]:
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def check_weights(model: nn.Module) -> None:
    """Raises PyPruneError: weights are on the meta device."""
    if any(p.is_meta for p in model.parameters()):
        hint = "They moved to a pruned model, or were never loaded."
        raise PyPruneError("model", type(model).__name__, "has weights that are not in memory", hint)


def in_memory(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``'s wrapper, or the model itself.

    Raises:
        PyPruneError: weights are on the meta device, or were made in inference mode.
    """
    model = unwrap(model)
    check_weights(model)
    if any(p.is_inference() for p in model.parameters()):
        problem = "was made in torch.inference_mode, and cannot be changed"
        raise PyPruneError("model", type(model).__name__, problem, "Load it outside of that.")
    return model
