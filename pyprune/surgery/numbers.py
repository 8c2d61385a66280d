"""Numbers in a model's arithmetic: what ``forward`` multiplies by, adds, or divides by, that is in no tensor.

A scale that ``forward`` computes from the configuration (the square root of the hidden size, say) changes with a cut of
what it is computed from. Where masking cannot be compared with slicing, because a normalisation runs over the channels
that go, nothing else would show it.
"""

from __future__ import annotations

import logging
from typing import Any

from pyprune.discovery.run import trace
from pyprune.errors import PyPruneError
from pyprune.selection.plan import Plan

log = logging.getLogger(__name__)

DIGITS = 6  # significant ones that are compared


def check_numbers(old: Any, new: Any, plan: Plan) -> None:
    """Both models are run once, on tensors without data. A model whose run depends on values is not checked.

    Raises:
        PyPruneError: ``new`` computes with numbers that ``old`` does not.
    """
    try:
        before, after = _numbers(old), _numbers(new)
    except PyPruneError as error:
        log.info("numbers in forward are not compared: %s", error)
        return
    added, gone = (", ".join(sorted(found)) for found in (after - before, before - after))
    if added:
        roles = " and ".join(sorted({c.group.role for c in plan.cuts if not c.group.exact}))
        problem = f"a removed size enters this model's arithmetic: {added}"
        problem += f" where it was {gone}" if gone else ""
        raise PyPruneError("plan", None, problem, f"Leave {roles} whole.")


def _numbers(model: Any) -> set[str]:
    return {f"{op} {number:.{DIGITS}g}" for op, number in trace(model).tracer.numbers}
