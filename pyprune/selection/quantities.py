"""What a budget may be in besides parameters: multiply-adds of a token, or the memory that serving takes.

Both are sums over a model's tensors, each element of which counts something, and over what lies in no tensor (a cache).
The counts are read off the model while it runs on a few tokens, so that nothing depends on names or on a family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any

import torch
from torch import nn

from pyprune.caching import cache_of
from pyprune.discovery.groups import Group, Groups
from pyprune.errors import PyPruneError, unknown_name
from pyprune.importance.arithmetic import macs
from pyprune.importance.inputs import InputTaps
from pyprune.importance.modes import as_written, evaluating, in_memory
from pyprune.importance.steps import Forward, Step
from pyprune.importance.walk import walking

BUDGETS = ("parameters", "macs", "memory")
LENGTH = 4096  # tokens in the cache, where nothing is said
TOKENS = (16, 32)  # that the model is run on


@dataclass(frozen=True)
class Term:
    """``amount`` that is kept in proportion to the widths of ``groups``, as long as ``module`` is there."""

    amount: int
    groups: tuple[str, ...]
    module: str


@dataclass(frozen=True)
class Quantity:
    """What a budget is in.

    Attributes:
        name: ``"macs"``: multiply-adds of a token in products with weights, output head included. ``"memory"``: bytes
            of the weights and of one sequence's KV cache.
        unit: the same in a word.
        weights: parameter -> what one element of it counts; parameters not named count nothing.
        terms: what lies in no parameter.
        apart: groups whose widths change the quantity in a way that is not known -> why.
        length: tokens in the cache; None for ``macs``.
    """

    name: str
    unit: str
    weights: Mapping[str, Fraction]
    terms: tuple[Term, ...] = ()
    apart: Mapping[str, str] | None = None
    length: int | None = None

    def check(self, groups: list[Group]) -> None:
        """Raises PyPruneError when one of ``groups`` is in ``apart``."""
        for group in groups:
            if group.name in (self.apart or {}):
                problem = f"cannot be counted when {group.role} are cut: {(self.apart or {})[group.name]}"
                raise PyPruneError("budget", self.name, problem, "Leave that role out, or use parameters.")


def measure_budget(model: nn.Module, groups: Groups, budget: str, *, length: int | None = None) -> Quantity | str:
    """What ``select(budget=...)`` takes: the quantity that a ratio is of, measured on the model.

        memory = pyprune.measure_budget(model, groups, "memory", length=8192)
        plan = pyprune.select(groups, scores, 0.3, budget=memory)  # 30% fewer bytes

    Args:
        model: the dense model; it is run on 32 tokens or fewer.
        groups: its groups.
        budget: ``"macs"``, ``"memory"`` or ``"parameters"``.
        length: tokens of one sequence in the cache, for ``"memory"``; 4,096 where left out. Layers that look back
            through a window cache no more than that.

    Returns:
        The quantity; ``"parameters"`` as it is, which needs no measuring.

    Raises:
        PyPruneError: another budget; a length without ``"memory"``, or below 1; a model whose products or whose cache
            are of a kind that cannot be read off.
    """
    if budget not in BUDGETS:
        raise unknown_name("budget", budget, BUDGETS)
    if length is not None and budget != "memory":
        problem = f"is the cache's, and the budget is {budget}"
        raise PyPruneError("budget_length", length, problem, "Use budget memory, or leave it out.")
    if length is not None and length < 1:
        raise PyPruneError("budget_length", length, "is no number of tokens", "Give at least 1.")
    if budget == "parameters":
        return budget
    model = in_memory(model)
    return _macs(model, groups) if budget == "macs" else _memory(model, groups, LENGTH if length is None else length)


def _macs(model: nn.Module, groups: Groups) -> Quantity:
    matrices = {n: p for n, p in model.named_parameters() if p.dim() in (2, 3)}
    tokens = TOKENS[0]
    ids = torch.arange(tokens, device=next(model.parameters()).device)[None] % 2
    with walking(model, matrices), torch.no_grad(), InputTaps(matrices, tokens) as taps:
        Forward(model)(Step({"input_ids": ids}, ids))
    with evaluating(model), as_written(), torch.no_grad():
        counted, _ = macs(model, TOKENS)  # knows products of every kind, but not of whose matrix, nor grouped ones
    rows: dict[str, int] = {}
    for use in taps.uses:
        rows[use.key.name] = rows.get(use.key.name, 0) + use.x.shape[0]
    weights = {}
    for name, count in rows.items():
        p = matrices[name]
        weights[name] = Fraction(count, tokens * (p.shape[0] if p.dim() == 3 else 1))
    seen = float(sum(w * matrices[name].numel() for name, w in weights.items()))
    routed = [n for n, count in rows.items() if matrices[n].dim() == 2 and count % tokens]
    if routed or counted > 1.01 * seen:
        what = f"{routed[0]} sees a part of the tokens" if routed else "products are not all with its matrices"
        raise PyPruneError("budget", "macs", f"cannot be counted in this model: {what}", "Use parameters or memory.")
    apart = {g.name: "every token goes to as many experts as before" for g in groups if g.role == "experts"}
    return Quantity("macs", "multiply-adds a token", weights, apart=apart)


def _memory(model: nn.Module, groups: Groups, length: int) -> Quantity:
    parameters = dict(model.named_parameters())
    weights = {n: Fraction(parameters[n].element_size()) for n in groups.parameters}
    modules = next((g.modules for g in groups if g.role == "layers"), ())
    terms: list[Term] = []
    apart = {g.name: "not every class caches less with them" for g in groups if g.role in ("qk_dim", "vo_dim")}
    for layer, keys, values, window in _cached(model):
        heads = [g for g in groups if g.role == "kv_heads" and g.layer == layer]
        for state in (keys, values):
            elements = int(state.shape[1] * state.shape[3])
            known = [g for g in heads if _touches(g, elements)]
            apart |= {g.name: "they are not what is cached" for g in heads if g not in known}
            amount = elements * (min(length, window) if window else length) * state.element_size()
            terms.append(Term(amount, tuple(g.name for g in known), modules[layer] if layer < len(modules) else ""))
    return Quantity("memory", "bytes", weights, tuple(terms), apart, length)


def _cached(model: nn.Module) -> list[tuple[int, torch.Tensor, torch.Tensor, int | None]]:
    """(layer, keys and values [1, heads, tokens, size], window) of every layer that caches."""
    ids = torch.zeros(1, 4, dtype=torch.int64, device=next(model.parameters()).device)
    try:
        with evaluating(model), as_written(), torch.no_grad():
            cache: Any = cache_of(model(input_ids=ids, use_cache=True))
    except (AttributeError, TypeError):
        cache = None
    found: list[tuple[int, torch.Tensor, torch.Tensor, int | None]] = []
    for i, layer in enumerate(getattr(cache, "layers", ())):
        if not getattr(layer, "is_initialized", True):
            continue  # its attention is gone
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not isinstance(keys, torch.Tensor) or not isinstance(values, torch.Tensor) or keys.dim() != 4:
            found.clear()
            break
        window = getattr(layer, "sliding_window", None)
        found.append((i, keys, values, None if window is None else int(window) - 1))
    if not found:
        problem = "is read off a cache of keys and values, and this model keeps another"
        raise PyPruneError("budget", "memory", problem, "Use parameters or macs.")
    return found


def _touches(group: Group, elements: int) -> bool:
    """Whether the group's units make up just so many positions of some dimension, or of a part of it (keys, queries and
    values may lie in one tensor): all that a token caches."""
    copies = group.outer * group.units
    parts = ([prod(count for count, _ in term.spread) for term in m.index.terms] for m in group.members)
    return any(copies * size == elements for sizes in parts for size in (sum(sizes), *sizes))
