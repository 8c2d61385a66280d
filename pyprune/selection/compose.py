"""Two plans in a row as one: what iterative pruning needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyprune.discovery.groups import Group, Groups
from pyprune.errors import PyPruneError
from pyprune.selection.details import measure, widths_by_role
from pyprune.selection.plan import Cut, Plan
from pyprune.selection.units import without_removed_layers


def compose(groups: Groups, first: Plan, second: Plan) -> Plan:
    """The plan that does to the dense model what ``first`` and then ``second`` do.

    Args:
        groups: the dense model's groups.
        first: made on the dense model.
        second: made on the model that ``first`` leaves. Its groups carry the names they have there: the dense ones,
            except that after removed layers the later ones are numbered anew.

    Returns:
        A plan over the dense model's groups. Its details speak of the dense model (``"achieved"``, ``"roles"``,
        ``"widths"``); what was asked in each step, and how far it was missed, stands in ``"steps"``, the details of
        every plan it is made of; what the second one's allocation found (``"search"``, ``"descent"``,
        ``"divergence"``) stands here too.

    Raises:
        PyPruneError: ``second`` cuts a group that the dense model does not have, or that has another number of units
            than ``first`` leaves.
    """
    dense = {g.name: g for g in groups}
    done = {c.group.name: c for c in first.cuts}
    new_to_old = _renumbered(first)
    cuts = dict(done)
    for cut in second.cuts:
        name = _old_name(cut.group.name, new_to_old)
        group = dense.get(name)
        if group is None:
            problem = f"the second plan cuts {cut.group.name}, which the dense model does not have"
            raise PyPruneError(
                "plan", None, problem, "Compose plans of one model, in the order in which they were made."
            )
        cuts[name] = _through(group, done.get(name), done.get(group.within or ""), cut)
    apart = [c for c in first.cuts if c.group.role == "sublayers"]  # no group of the model is of that role
    plan = Plan(without_removed_layers([*apart, *(cuts[g.name] for g in groups if g.name in cuts)]))
    steps = _steps(first) + _steps(second)
    roles = list(dict.fromkeys(role for step in steps for role in step.get("roles", ())))
    plan.details = {
        "achieved": measure(groups, plan),
        "roles": roles,
        "widths": widths_by_role(groups, plan, roles),
        "allocation": second.details.get("allocation"),
        "criterion": second.details.get("criterion"),
        "count_embeddings": second.details.get("count_embeddings"),
        **{k: second.details[k] for k in ("search", "descent", "divergence") if k in second.details},
        "notes": list(dict.fromkeys(n for s in steps for n in s.get("notes", ()) if n not in s.get("missed", ()))),
        "steps": steps,
    }
    return plan


def _through(group: Group, before: Cut | None, around: Cut | None, cut: Cut) -> Cut:
    """``cut``, made on what ``before`` left of ``group``, in the dense model's units.

    ``around`` is the earlier cut of the group whose units are the copies of this one: its dropped copies are gone from
    ``cut`` and get units that fill the shape (nothing is read from them).
    """
    everything = tuple(range(group.units))
    rows = before.kept if before is not None else (everything,) * group.outer
    copies = around.kept[0] if around is not None else tuple(range(group.outer))
    if cut.group.units != len(rows[0]) or cut.group.outer != len(copies):
        had = f"{cut.group.outer} x {cut.group.units}, the first leaves {len(copies)} x {len(rows[0])}"
        problem = f"the second plan was made on {group.name} with units {had}"
        raise PyPruneError("plan", None, problem, "Compose plans of one model, in the order in which they were made.")
    kept = [row[: cut.width] for row in rows]
    for copy, chosen in zip(copies, cut.kept, strict=True):
        kept[copy] = tuple(rows[copy][i] for i in chosen)
    return Cut(group, tuple(kept))


def _renumbered(plan: Plan) -> dict[str, str]:
    """Path of a layer in the model that ``plan`` leaves -> its path in the dense model, where the two differ."""
    out: dict[str, str] = {}
    for cut in plan.cuts:
        if cut.group.role == "layers":
            out |= {cut.group.modules[new]: cut.group.modules[old] for new, old in enumerate(cut.kept[0]) if new != old}
    return out


def _old_name(name: str, new_to_old: Mapping[str, str]) -> str:
    path, colon, role = name.rpartition(":")
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        old = new_to_old.get(".".join(parts[:end]))
        if old is not None:
            return ".".join([old, *parts[end:]]) + colon + role
    return name


def _steps(plan: Plan) -> list[dict[str, Any]]:
    return list(plan.details.get("steps", [plan.details] if plan.details else []))
