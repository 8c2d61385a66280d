"""From scores to a plan: how many units each group keeps (an allocation) and which (the best-scored)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import floor
from typing import Any

from pyprune.discovery.groups import Group, Groups
from pyprune.errors import PyPruneError, unknown_name
from pyprune.selection import (  # noqa: F401 (each registers its allocation)
    depth_schedules,
    global_ranking,
    knapsack,
    searched,
    uniform,
)
from pyprune.selection.accounting import Accounting
from pyprune.selection.allocation import ALLOCATIONS, Allocation, Budget
from pyprune.selection.details import measure, widths_by_role
from pyprune.selection.limits import fixed_widths, group_limits, least_by_role, rounding_steps
from pyprune.selection.plan import Plan
from pyprune.selection.quantities import Quantity
from pyprune.selection.requests import Amount, LayerSpec, parse_amounts, parse_count, parse_layers, parse_ratio
from pyprune.selection.scope import layer_count, members_of, other_roles, protected_units, roles_to_share
from pyprune.selection.units import checked_scores, keep, removal_order, without_removed_layers


def select(
    groups: Groups,
    scores: Mapping[str, Any],
    ratio: float | None = None,
    *,
    target_params: int | str | None = None,
    widths: Mapping[str, Amount] | None = None,
    allocation: str | Allocation = "uniform",
    roles: str | Iterable[str] | None = None,
    layers: LayerSpec | None = None,
    round_to: int | Mapping[str, int] | None = None,
    count_embeddings: bool = True,
    min_keep: Amount | Mapping[str, Amount] | None = None,
    allocation_scores: Mapping[str, Any] | None = None,
    budget: Quantity | str = "parameters",
) -> Plan:
    """Decide which units stay.

    Asked for by ``ratio`` or ``target_params`` (one of the two), by ``widths``, or by ``widths`` for some roles and a
    ratio or target for the whole model, which the remaining roles then make up.

    Args:
        groups: the model's groups.
        scores: group name -> scores [outer, units], higher is more important; finite.
        ratio: fraction of the model's parameters that is gone afterwards, in [0, 1). Reached within one unit of the
            finest role (under ``uniform`` and the schedules: one in every layer), or as nearly as ``round_to`` allows.
        target_params: parameters left afterwards: an integer, ``"108M"``, ``"5.4B"``.
        widths: role -> what each layer keeps, as a number of units (int) or a fraction of them (float). An allocation
            that gives layers different widths takes it as the mean over the layers.
        allocation: how the cut is spread over roles and layers; a name in ``ALLOCATIONS``, or one that is not
            registered.
        roles: what ``ratio`` and ``target_params`` cut. None: of ``kv_heads``, ``ffn`` and ``expert_ffn`` those that
            the model has. Roles in ``widths`` are not repeated here.
        layers: decoder layers that may be cut: ``"3-27"`` (27 included), ``"3:28"``, ``[3, 4, 5]``. None: all.
        round_to: kept units are a multiple of this, or the group stays whole: an integer for the channel roles
            (``ffn``, ``expert_ffn``, ``hidden``, ...), or role -> integer. Where nothing is said, channels inside
            stacked experts are kept in multiples of 8, which grouped matrix products want.
        count_embeddings: whether embeddings and the output head count, in ``ratio`` and in ``target_params``.
        min_keep: the least that stays in every group, as units (int) or a fraction (float), for all roles or by role.
            None: what the allocation says, and at least one unit.
        allocation_scores: what the allocation reads in place of ``scores``, of the same form: these then say how many
            units each group keeps, and ``scores`` which.
        budget: what ``ratio`` is a fraction of: ``"parameters"``, or another quantity as
            :func:`pyprune.measure_budget` measures it. (With ``count_embeddings=False``, of what is not in embeddings
            and output head.)

    Returns:
        The plan. Query heads inside KV heads, and every other group with ``outer > 1``, keep the same number in each
        copy. ``plan.details`` says what was asked and what is reached.

    Raises:
        PyPruneError: a request that is malformed, contradictory or out of reach; a role, layer or allocation that does
            not exist; scores that are missing or not finite.
    """
    if not isinstance(allocation, Allocation) and allocation not in ALLOCATIONS:
        raise unknown_name("allocation", str(allocation), ALLOCATIONS)
    chosen = allocation if isinstance(allocation, Allocation) else ALLOCATIONS[allocation]
    if ratio is not None and target_params is not None:
        raise PyPruneError("target_params", target_params, f"contradicts ratio {ratio}", "Give one of the two.")
    spent = budget if isinstance(budget, Quantity) else None
    if spent is None and budget != "parameters":
        problem = "is measured on the model"
        raise PyPruneError("budget", str(budget), problem, "Give what pyprune.measure_budget returns, or parameters.")
    if spent is not None and ratio is None:
        raise PyPruneError("budget", spent.name, "is what a ratio is of, and none is given", "Give ratio.")
    sized = ratio is not None or target_params is not None
    if not sized and widths is None:
        raise PyPruneError("ratio", None, "nothing says how much to remove", "Give ratio, target_params or widths.")
    ratio = None if ratio is None else parse_ratio(ratio)
    left = None if target_params is None else parse_count(target_params)
    asked = {} if widths is None else parse_amounts("widths", widths)
    only = None if layers is None else parse_layers(layers, layer_count(groups))
    members = {role: members_of(groups, role, only, "widths") for role in asked}
    if sized:
        members |= {role: members_of(groups, role, only, "roles") for role in roles_to_share(groups, roles, asked)}
    flat = [g for of_role in members.values() for g in of_role]
    protected = {g.name: protected_units(g, only) for g in flat}
    exact = [role for role, amount in asked.items() if isinstance(amount, int)]
    steps = rounding_steps(round_to, members, groups.shapes, exact)
    least = least_by_role(min_keep, members)
    limits = group_limits(members, steps, least, chosen.min_keep, protected)
    values = checked_scores(flat, scores)
    costs = values if allocation_scores is None else checked_scores(flat, allocation_scores)
    order = {g.name: removal_order(values[g.name], protected[g.name]) for g in flat}
    first_to_go = {g.name: order[g.name][0] for g in flat if g.role == "layers"}
    if spent is not None:
        spent.check(flat)
    counts = Accounting(groups, flat, first_to_go, count_embeddings, spent)
    cost = {g.name: counts.cost(g) for g in flat}

    kept: dict[str, int] = {}

    def within(target: int) -> Budget:
        before = dict(kept)
        return Budget(target, lambda more: counts.count({**before, **more}), limits, cost, before)

    for role, amount in asked.items():
        wanted, limits = fixed_widths(members[role], amount, limits, least.get(role))
        if chosen.by_layer and len(members[role]) > 1:
            wanted = chosen.allocate(members[role], costs, within(counts.count(kept | wanted)))
        kept |= wanted
    notes = _notes(groups, members, steps)
    missed: list[str] = []
    if sized:
        shared = [g for role, of_role in members.items() if role not in asked for g in of_role]
        goal = goal_of(ratio, left, counts.count({}))
        limit = within(goal.target)
        _check_reachable(goal, limit, shared, other_roles(groups, members), only)
        if goal.target < limit.count({}):
            kept |= chosen.allocate(shared, costs, limit)
        missed = goal.missed_by(counts.count(kept))

    cuts = (keep(g, order[g.name], kept[g.name]) for g in groups if kept.get(g.name, g.units) < g.units)
    plan = Plan(without_removed_layers(cuts))
    plan.details = {
        "asked": {"ratio": ratio, "target_params": left, "widths": asked or None},
        "count_embeddings": count_embeddings,
        "achieved": measure(groups, plan),
        "budget": None if spent is None else _spent(spent, counts.count({}), counts.count(kept)),
        "allocation": chosen.name,
        "criterion": getattr(scores, "criterion", None),
        "allocation_criterion": getattr(allocation_scores, "criterion", None),
        "roles": list(members),
        "layers": only,
        "round_to": steps or None,
        "min_keep": {role: least.get(role, chosen.min_keep.get(role, 1)) for role in members},
        "widths": widths_by_role(groups, plan, members),
        "notes": [*notes, *missed],
        "missed": missed,
    }
    return plan


def _spent(budget: Quantity, before: int, after: int) -> dict[str, Any]:
    """A budget other than parameters: what it is in, how much there was and is."""
    ratio = (before - after) / before if before else 0.0
    return {
        "name": budget.name, "unit": budget.unit, "length": budget.length, "before": before, "after": after,
        "ratio": ratio,
    }  # fmt: skip


@dataclass(frozen=True)
class Goal:
    """A size that was asked for: which option, its value, what shall be left (parameters, or what the budget is in),
    what there is."""

    option: str
    value: Any
    target: int
    total: int

    def shown(self, left: int) -> str:
        """``left`` parameters in the option's terms, rounded to what can be asked for."""
        if self.option == "target_params":
            return f"{left:,}"
        return f"{floor((self.total - left) / self.total * 10**4) / 10**4:g}"

    def missed_by(self, left: int) -> list[str]:
        """A sentence where ``left`` is more than half a point of the model away from what was asked."""
        if abs(left - self.target) <= 0.005 * self.total:
            return []
        return [
            f"{self.option} {self.value} was asked; the nearest that this way of cutting reaches is {self.shown(left)}."
        ]


def goal_of(ratio: float | None, left: int | None, total: int) -> Goal:
    """The size that a ratio, or a number of parameters ``left``, asks of ``total``."""
    if left is None:
        return Goal("ratio", ratio, total - round((ratio or 0.0) * total), total)
    if left > total:
        raise PyPruneError("target_params", left, f"the model has only {total:,} counted parameters", "Ask for fewer.")
    return Goal("target_params", left, left, total)


def _check_reachable(
    goal: Goal, budget: Budget, shared: Sequence[Group], more: Sequence[str], layers: Sequence[int] | None
) -> None:
    """Raise with the way out when no widths of the ``shared`` groups meet the goal; ``more`` roles could be cut."""
    roles = list(dict.fromkeys(g.role for g in shared))
    for role in roles:
        if not any(budget.cost[g.name] for g in shared if g.role == role):
            raise PyPruneError(
                "roles", role, "holds no parameter that is counted", "Count embeddings, or leave it out."
            )
    largest, smallest = budget.count({}), budget.count({g.name: budget.limits[g.name].least for g in shared})
    if goal.target > largest:
        problem = f"widths alone come to {goal.shown(largest)}"
        raise PyPruneError(goal.option, goal.value, problem, f"Widen the widths, or leave {goal.option} out.")
    if goal.target >= smallest:
        return
    ways = [f"allow more roles ({', '.join(more)})"] if more else []
    ways += ["more layers"] if layers is not None else []
    ways += ["a smaller min_keep"] if any(budget.limits[g.name].least > 1 for g in shared) else []
    most = "at least" if goal.option == "target_params" else "at most"
    problem = f"{', '.join(roles)} can reach {most} {goal.shown(smallest)}"
    hint = f"Ask for {most} that" + (f", or {', '.join(ways)}." if ways else ".")
    raise PyPruneError(goal.option, goal.value, problem, hint)


def _notes(groups: Groups, members: Mapping[str, Sequence[Group]], steps: Mapping[str, int]) -> list[str]:
    """What a reader of the result should know, as sentences."""
    out = []
    rounded = ", ".join(f"{role} to multiples of {step}" for role, step in steps.items() if step > 1)
    if rounded:
        out.append(f"Kept units are rounded ({rounded}); the size is met as nearly as that allows.")
    for role in members:
        frozen = [g for g in groups if g.role == role and not g.prunable]
        if frozen:
            out.append(
                f"{len(frozen)} {role} groups cannot be pruned and stay whole ({frozen[0].name}: {frozen[0].frozen})."
            )
    return out
