"""Which configuration values give the planned shapes.

No family is known here. Attributes are tried one by one on the meta device (:meth:`Scope.moves`); those that move
planned dimensions are given the values that the cut suggests (the same share of the old value, or what the observed
slope asks for), alone and then together, until the constructor gives exactly the planned shapes. Names serve to try
the likely ones first and to rule out solutions that have the right shapes for the wrong reason: fewer heads are never
the same heads made narrower, nor narrower heads fewer ones, and no scale, rate or epsilon in a module may change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, product

from pyprune import families
from pyprune.discovery.roles import INSIDE_HEADS
from pyprune.selection.plan import Cut
from pyprune.surgery.attributes import HEAD_SIZE, Attribute, Built, Dim, Scope, candidates, unset, without_kept

Shapes = Mapping[str, tuple[int, ...]]
Values = dict[Attribute, int]

STEPS = (
    ("hidden",),
    ("kv_heads", "query_heads"),
    ("qk_dim", "vo_dim", "latent"),
    ("experts",),
    ("ffn", "expert_ffn"),
    ("state", "channels"),
    ("vocab",),
)
"""Roles whose cuts are solved together, in the order in which they are solved."""

_WIDTH_ROLES = frozenset({"qk_dim", "vo_dim", "latent", "state", "channels"})

"""Roles whose cuts make heads narrower and leave as many as there are."""

_HEAD_COUNTS = ("heads", "n_head", "num_head")
"""How the names of numbers of heads end, in configurations and in modules."""

_USUAL = {
    "kv_heads": ("num_key_value_heads", "num_attention_heads", "num_heads", "n_head", "num_kv_heads"),
    "query_heads": ("num_attention_heads", "num_heads", "n_head"),
    "qk_dim": ("head_dim", "qk_nope_head_dim", "qk_rope_head_dim"),
    "vo_dim": ("v_head_dim", "head_dim"),
    "latent": ("kv_lora_rank", "q_lora_rank"),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "ffn": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "shared_expert_intermediate_size"),
    "expert_ffn": ("moe_intermediate_size", "intermediate_size", "expert_ffn_hidden_size"),
    "state": ("state_size", "d_state", "mamba_d_state"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "vocab": ("vocab_size",),
}  # fmt: skip

_MOST_TOGETHER = 4
"""Attributes changed at once, of those that move planned dimensions only."""

_MOST_COMPENSATING = 2
"""Attributes changed at once, of those that also move others, which the second must move back."""


def solve(scope: Scope, values: Values, cuts: Sequence[Cut], wanted: Shapes, layer: int | None = None) -> Values | None:
    """Values for the attributes of ``scope.config`` that give shapes ``wanted``; None when none were found.

    Args:
        values: changes made already; the result contains them.
        cuts: of one step (see :data:`STEPS`); they explain every difference to the present shapes.
        wanted: shapes after the cuts, by name in the scope, of all tensors whose shape matters.
        layer: the decoder layer in question, for configurations with lists.
    """
    wanted = without_kept(wanted)
    written = _explicit(scope, dict(values), cuts)
    given, values = values, {**values, **written}
    base = scope.build(values)
    if base is None or not wanted.keys() <= base.shapes.keys():
        return None
    changed = {
        (name, dim): (n, after)
        for name, shape in wanted.items()
        for dim, (n, after) in enumerate(zip(base.shapes[name], shape, strict=True))
        if after != n
    }
    if not changed:
        return dict(given)

    def moves(attribute: Attribute) -> dict[Dim, float]:
        found = scope.moves(values, attribute, _now(attribute, values, scope))
        return {dim: slope for dim, slope in found.items() if dim[0] in wanted}

    roles = {c.group.role for c in cuts}
    widths_may_change = bool(roles & _WIDTH_ROLES)
    counts_may_change = roles.isdisjoint(INSIDE_HEADS)
    options: dict[Attribute, list[int]] = {}
    for attribute in _ordered([*candidates(scope.config, layer), *written], cuts, scope, values):
        now = values.get(attribute, attribute.get(scope.config))
        if now is None or (attribute.head_size and not widths_may_change):
            continue
        if attribute.name.endswith(_HEAD_COUNTS) and not counts_may_change:
            continue
        slopes = moves(attribute)
        if slopes.keys() & changed.keys():
            options[attribute] = _suggestions(now, slopes, changed, ratios(cuts))
    exact = [a for a in options if moves(a).keys() <= changed.keys()]
    for pool, most in ((exact, _MOST_TOGETHER), (list(options), _MOST_COMPENSATING)):
        for count in range(1, min(most, len(pool)) + 1):
            for chosen in combinations(pool, count):
                for numbers in product(*(options[a] for a in chosen)):
                    trial = {**values, **dict(zip(chosen, numbers, strict=True))}
                    built = scope.build(trial)
                    if built is None or not built.has(base, wanted):
                        continue
                    if not _honest(base, built, widths_may_change, counts_may_change):
                        continue
                    found = _accompanied(scope, trial, base, cuts, layer)
                    if found is not None:
                        return _needed(scope, found, written)
    return None


def _accompanied(scope: Scope, values: Values, base: Built, cuts: Sequence[Cut], layer: int | None) -> Values | None:
    """``values``, with attributes that shape no tensor but are divided by, or divide, those that do.

    A count of KV heads that no matrix has (latent attention) must shrink with the query heads, or their quotient in
    the module is wrong. None when a quotient would be zero whatever else is changed.
    """
    shares, found = ratios(cuts), scope.build(values)
    odd = _unexplained(base, found, shares)
    if not odd or found is None:
        return values
    for attribute in candidates(scope.config, layer):
        now = attribute.get(scope.config)
        if now is None or attribute in values:
            continue
        for value in (now * kept // units for kept, units in shares if now * kept % units == 0):
            built = scope.build({**values, attribute: value})
            if built is not None and built.shapes == found.shapes and not _unexplained(base, built, shares):
                return {**values, attribute: value}
    return None if 0 in odd.values() else values


def _unexplained(base: Built, built: Built | None, shares: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Whole numbers in modules that changed by other shares than the cuts', with their new values."""
    changed = {} if built is None else {n: v for n, v in built.numbers.items() if v != base.numbers[n]}
    return {n: v for n, v in changed.items() if all(v * units != base.numbers[n] * kept for kept, units in shares)}


def _needed(scope: Scope, values: Values, written: Values) -> Values:
    """``values`` without the written-out ones that make no difference."""
    built = scope.build(values)
    for attribute, value in written.items():
        if values[attribute] == value:
            less = {a: v for a, v in values.items() if a != attribute}
            if scope.build(less) == built:
                values = less
    return values


def _now(attribute: Attribute, values: Mapping[Attribute, int], scope: Scope) -> int:
    now = values.get(attribute, attribute.get(scope.config))
    assert now is not None
    return now


def _ordered(attributes: Iterable[Attribute], cuts: Sequence[Cut], scope: Scope, values: Values) -> list[Attribute]:
    """The likely ones first: by the usual names, then those whose value is the number of units."""
    usual = [name for cut in cuts for name in _USUAL.get(cut.group.role, ())]
    units = {c.group.units for c in cuts}

    def rank(attribute: Attribute) -> tuple[int, bool]:
        name = attribute.name.rsplit(".", 1)[-1]
        now = values.get(attribute, attribute.get(scope.config))
        return usual.index(name) if name in usual else len(usual), now not in units

    return sorted(attributes, key=rank)


def ratios(cuts: Sequence[Cut]) -> list[tuple[int, int]]:
    """Shares (kept, of) that an attribute may shrink by: each cut's, and those of nested groups together."""
    by_name = {c.group.name: c for c in cuts}
    out = {(c.width, c.group.units) for c in cuts}
    for cut in cuts:
        outer = by_name.get(cut.group.within or "")
        if outer is not None:
            out.add((cut.width * outer.width, cut.group.units * outer.group.units))
    return sorted(out)


def _suggestions(
    now: int, slopes: Mapping[Dim, float], changed: Mapping[Dim, tuple[int, int]], shares: Sequence[tuple[int, int]]
) -> list[int]:
    out = [now * kept // units for kept, units in shares if now * kept % units == 0]
    for dim, slope in slopes.items():
        if dim in changed:
            before, after = changed[dim]
            value = now + (after - before) / slope
            if value == int(value):
                out.append(int(value))
    return [v for v in dict.fromkeys(out) if v > 0 and v != now]


def _honest(base: Built, built: Built, widths_may_change: bool, counts_may_change: bool) -> bool:
    """No scale, rate or epsilon changed, nor (unless that was asked) the width of a head or how many there are."""
    if base.numbers.keys() != built.numbers.keys():
        return False
    for name, value in base.numbers.items():
        if isinstance(value, float) and built.numbers[name] != value:
            return False
        if built.numbers[name] == value:
            continue
        if name.rsplit(".", 1)[-1] in HEAD_SIZE and not widths_may_change:
            return False
        if name.endswith(_HEAD_COUNTS) and not counts_may_change:
            return False
    return True


def _explicit(scope: Scope, values: Values, cuts: Sequence[Cut]) -> Values:
    """Values for attributes that are not set (the class derives them from others) and that it honours when they are.

    The width of a head is the usual one: written out, it no longer follows from the number of heads. Each value keeps
    the shapes as they are.
    """
    base = scope.build(values)
    if base is None:
        return {}
    family = families.find(scope.config)
    assumed = {} if family is None else {Attribute(n): int(f(scope.config)) for n, f in family.explicit.items()}
    widths = {int(v) for name, v in base.numbers.items() if name.rsplit(".", 1)[-1] in HEAD_SIZE}
    units = {c.group.units for c in cuts}
    out: Values = {}
    for attribute in unset(scope.config):
        if attribute in values:
            continue
        if attribute in assumed:
            out[attribute] = assumed[attribute]
            continue
        for value in sorted(widths if attribute.head_size else units):
            doubled = scope.build({**values, attribute: 2 * value})
            if doubled is None or doubled.shapes == base.shapes:
                continue
            if scope.build({**values, attribute: value}) == base:
                out[attribute] = value
                break
    return out
