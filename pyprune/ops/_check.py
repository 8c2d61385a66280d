"""Checks of arguments, in Python, so that a mistake is named before any kernel is called."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyprune.errors import PyPruneError

HALF = (torch.bfloat16, torch.float16)


def tensor_list(option: str, values: object) -> Sequence[Tensor]:
    """``values`` as a sequence of tensors, or a :class:`PyPruneError` that names what was given."""
    if isinstance(values, Tensor) or not isinstance(values, Sequence):
        kind = type(values).__name__
        raise PyPruneError(option, None, f"must be a list of tensors, got {kind}", "Put a single tensor in a list.")
    for i, value in enumerate(values):
        if not isinstance(value, Tensor):
            raise PyPruneError(f"{option}[{i}]", None, f"must be a tensor, got {type(value).__name__}")
    return values


def same_length(option: str, values: Sequence[object], expected: int, of: str) -> None:
    if len(values) != expected:
        raise PyPruneError(option, None, f"has {len(values)} entries for {expected} {of}", "Give one for each.")


def dimensions(option: str, tensor: Tensor) -> None:
    if not 1 <= tensor.dim() <= 3:
        raise PyPruneError(option, list(tensor.shape), "must have 1 to 3 dimensions", "Reshape it first.")


def same_place(option: str, tensor: Tensor, other: Tensor, of: str) -> None:
    """Shape and device of ``tensor`` equal those of ``other``, which the message calls ``of``."""
    if tensor.shape != other.shape:
        raise PyPruneError(option, list(tensor.shape), f"differs in shape from {of}, which is {list(other.shape)}")
    if tensor.device != other.device:
        raise PyPruneError(option, str(tensor.device), f"is on another device than {of}, which is on {other.device}")


def neighbouring_columns(option: str, tensor: Tensor) -> None:
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        problem = "has columns that are no neighbours in memory"
        raise PyPruneError(option, f"of strides {tensor.stride()}", problem, "Give a contiguous tensor.")


def floating(option: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.float32, torch.float64, *HALF):
        raise PyPruneError(option, str(tensor.dtype), "must be float32, bfloat16, float16 or float64")


def gradient_dtype(option: str, grad: Tensor, weight: Tensor) -> None:
    if grad.dtype != weight.dtype and not (grad.dtype == torch.float32 and weight.dtype in HALF):
        allowed = f"{weight.dtype} or torch.float32" if weight.dtype in HALF else f"{weight.dtype}"
        raise PyPruneError(option, str(grad.dtype), f"must be {allowed} for a {weight.dtype} weight")


def curvature_dtype(option: str, curvature: Tensor, of: Tensor) -> None:
    expected = torch.float64 if of.dtype == torch.float64 else torch.float32
    if curvature.dtype != expected:
        raise PyPruneError(option, str(curvature.dtype), f"must be {expected} beside {of.dtype}")
