"""Tensors made from nothing: constants are harmless along any axis, values that differ along one freeze it."""

from __future__ import annotations

import torch

from pyprune.discovery.rules import rule
from pyprune.discovery.tracer import Call, Info


@rule("zeros", "ones", "full", "empty", "scalar_tensor", "new_zeros", "new_ones", "new_full", "new_empty",
      "empty_strided", "new_empty_strided", "empty_permuted")  # fmt: skip
def constant(call: Call) -> Info:
    """Removal leaves a constant a constant."""
    zero = "zeros" in call.name or call.get("fill_value", 1) == 0
    return Info(tuple(call.fresh(n) for n in call.out.shape), (zero,) * call.out.dim())


@rule("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like")
def constant_like(call: Call) -> Info:
    info = call.info("self")
    zero = "zeros" in call.name or call.get("fill_value", 1) == 0
    return Info(info.axes, (zero,) * len(info.axes))


@rule("arange", "linspace", "logspace", "range", "eye", "rand", "randn", "randint", "randperm", "hann_window",
      "tril_indices", "triu_indices")  # fmt: skip
def by_position(call: Call) -> Info:
    axes = tuple(call.fresh(n, "made by position") for n in call.out.shape)
    return Info(axes, (False,) * call.out.dim())


@rule("_shape_as_tensor", "_tensor_constant")
def shape_tensor(call: Call) -> Info:
    out: torch.Tensor = call.out
    return Info(tuple(call.fresh(n, "made of sizes") for n in out.shape), (False,) * out.dim())
