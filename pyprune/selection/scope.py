"""Which groups a request speaks of: roles and layers, matched with what the model has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pyprune.discovery.groups import ROLES, Group, Groups
from pyprune.errors import PyPruneError
from pyprune.selection.requests import parse_roles

DEFAULT_ROLES = ("kv_heads", "ffn", "expert_ffn")


def layer_count(groups: Groups) -> int:
    """Decoder layers of the model.

    Raises:
        PyPruneError: no group belongs to a layer.
    """
    found = [len(g.modules) for g in groups if g.role == "layers"]
    found += [g.layer + 1 for g in groups if g.layer is not None]
    if not found:
        raise PyPruneError("layers", None, "this model has no decoder layers to choose from", "Leave layers out.")
    return max(found)


def roles_to_share(groups: Groups, roles: str | Iterable[str] | None, apart: Iterable[str]) -> list[str]:
    """The roles that a ratio is spread over: those asked for, or the default ones the model has, without ``apart``.

    Raises:
        PyPruneError: nothing is left.
    """
    apart = set(apart)
    if roles is None:
        names = [r for r in DEFAULT_ROLES if groups.prunable([r])]
        if not names:
            problem = f"the model has no prunable {', '.join(DEFAULT_ROLES)}"
            raise PyPruneError("roles", None, problem, f"Name the roles to cut. {_available(groups)}")
    else:
        names = parse_roles("roles", roles)
    left = [r for r in names if r not in apart]
    if not left:
        problem = f"widths fix {' and '.join(names)}, so that no role is left to reach the size"
        raise PyPruneError("widths", None, problem, f"Leave the ratio out, or name more roles. {_available(groups)}")
    return left


def members_of(groups: Groups, role: str, layers: Sequence[int] | None, option: str) -> list[Group]:
    """The prunable groups of ``role`` in ``layers`` (None: all), in model order.

    Role ``layers`` is one group for the whole model and always given; the layers outside are protected elsewhere.

    Raises:
        PyPruneError: there are none; the message names ``option`` and says what the model has.
    """
    present = [g for g in groups if g.role == role]
    if not present:
        raise PyPruneError(option, role, "the model has no such groups", _available(groups))
    prunable = [g for g in present if g.prunable]
    if not prunable:
        raise PyPruneError(option, role, f"cannot be pruned here ({present[0].frozen})", _available(groups))
    if layers is None or role == "layers":
        return prunable
    if all(g.layer is None for g in prunable):
        problem = f"{role} runs through the whole model and cannot be cut in some layers only"
        raise PyPruneError("layers", list(layers), problem, f"Leave layers out, or {role}.")
    chosen = [g for g in prunable if g.layer in set(layers)]
    if not chosen:
        has = ", ".join(str(i) for i in sorted({g.layer for g in prunable if g.layer is not None}))
        raise PyPruneError("layers", list(layers), f"no {role} can be pruned there", f"Layers that have {role}: {has}.")
    return chosen


def protected_units(group: Group, layers: Sequence[int] | None) -> tuple[int, ...]:
    """Units that must stay: for role ``layers`` those outside ``layers``, else none."""
    if group.role != "layers" or layers is None:
        return ()
    return tuple(sorted(set(range(group.units)) - set(layers)))


def other_roles(groups: Groups, used: Iterable[str]) -> list[str]:
    """Prunable roles of the model that are not in ``used``, in the order of ``ROLES``."""
    used = set(used)
    return [r for r in ROLES if r not in used and groups.prunable([r])]


def _available(groups: Groups) -> str:
    names = other_roles(groups, ())
    return f"The model can be pruned in: {', '.join(names)}." if names else "Nothing in this model can be pruned."
