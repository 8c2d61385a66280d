"""Devices, dtypes and shapes that every kernel is tested on, and float64 references with their error bounds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyprune.ops import reference

# The same tests run on both: a CUDA case is skipped only where PyTorch sees no CUDA device.
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device"),
        ],
    ),
]

HALF = [torch.bfloat16, torch.float16]
FLOATS = [torch.float32, *HALF]
FORMULAS = sorted(reference.FORMULAS)

# Single elements, single rows and columns, sizes beside multiples of 16 and of the tiles, several tiles either way,
# batches, and nothing at all.
SHAPES = [
    (1,), (17,), (5000,), (0,),
    (1, 1), (1, 33), (33, 1), (5, 7), (16, 16), (127, 129), (129, 127), (300, 2100), (1030, 65), (3, 4097),
    (0, 4), (4, 0), (300, 0), (0, 3000),
    (3, 4, 5), (2, 130, 19), (40, 1, 4), (2, 0, 3), (0, 2, 3), (2, 3, 0), (2, 3, 2050),
]  # fmt: skip


def make(shape: tuple[int, ...], dtype: torch.dtype, device: str, generator: torch.Generator) -> Tensor:
    """Normal values of a size that squares and products keep within float16."""
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def inputs(
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
    device: str = "cpu",
    grad_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(weights, gradients, non-negative curvatures) of the shapes."""
    generator = torch.Generator().manual_seed(seed)
    weights = [make(s, dtype, device, generator) for s in shapes]
    grads = [make(s, grad_dtype or dtype, device, generator) for s in shapes]
    wide = reference.accumulation_dtype(dtype)
    curvatures = [make(s, wide, device, generator).square() for s in shapes]
    return weights, grads, curvatures


def assert_salience(
    formula: str,
    weights: list[Tensor],
    grads: list[Tensor],
    curvatures: list[Tensor],
    got: tuple[list[Tensor], list[Tensor]],
) -> None:
    """Each sum equals the float64 one within a few roundings of the sum of its terms' magnitudes."""
    w, g, h = ([t.detach().cpu().double() for t in tensors] for tensors in (weights, grads, curvatures))
    expected = reference.salience(formula, w, g, h)
    parts = {"taylor_signed": ["taylor_abs"], "mixed": ["taylor_abs", "fisher"]}.get(formula, [formula])
    masses = [reference.salience(part, w, g, h) for part in parts]
    for side in (0, 1):
        assert len(got[side]) == len(weights)
        for i, weight in enumerate(weights):
            value, truth = got[side][i], expected[side][i]
            double = weight.dtype == torch.float64
            assert value.dtype == (torch.float64 if double else torch.float32)
            assert value.device == weight.device
            assert value.shape == truth.shape
            mass = sum(m[side][i] for m in masses)
            error = (value.cpu().double() - truth).abs()
            assert bool((error <= (1e-13 if double else 2e-6) * mass).all()), (
                formula,
                weight.dtype,
                tuple(weight.shape),
            )
