"""Numbers in a model's arithmetic: what ``forward`` multiplies by, adds, or divides by, that is in no tensor.

A scale that ``forward`` computes from the configuration (the square root of the hidden size, say) changes with a cut of
what it is computed from. Where masking cannot be compared with slicing, because a normalisation runs over the channels
that go, nothing else would show it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyprune.errors import PyPruneError
from pyprune.selection.plan import Plan
from pyprune.surgery.check import run

DIGITS = 9  # significant ones that are compared


class _Listener(TorchDispatchMode):
    """Gathers the floats that ops are called with, and the single numbers that become tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[str, str]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        for value in (*args, *(kwargs or {}).values()):
            if name == "lift_fresh" and value.dim() == 0 and value.is_floating_point():
                value = value.item()
            if isinstance(value, float):
                self.found.add((name, f"{value:.{DIGITS}g}"))
        return func(*args, **(kwargs or {}))


def numbers_of(model: Any) -> set[tuple[str, str]]:
    """(op, number) of every float that ``model`` computes with on a few random tokens.

    Raises:
        PyPruneError: the model does not run.
    """
    listener = _Listener()
    with torch.no_grad(), listener:
        run(model)
    return listener.found


def compare_numbers(before: set[tuple[str, str]], after: set[tuple[str, str]], plan: Plan) -> None:
    """Raises PyPruneError when the smaller model computes with numbers that the old one did not."""
    new, gone = (", ".join(f"{op} {number}" for op, number in sorted(s)) for s in (after - before, before - after))
    if new:
        roles = " and ".join(sorted({c.group.role for c in plan.cuts if not c.group.exact}))
        problem = f"a removed size enters this model's arithmetic: {new}"
        problem += f" where it was {gone}" if gone else ""
        raise PyPruneError("plan", None, problem, f"Leave {roles or 'its layers'} whole.")
