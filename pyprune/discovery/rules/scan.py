"""Recurrences over positions, solved in blocks: the state's dimensions pass, positions are nobody's to prune."""

from __future__ import annotations

from pyprune.discovery import axes as ax
from pyprune.discovery.rules import rule
from pyprune.discovery.tracer import Call, Info


@rule("linalg_solve_triangular")
def solve_triangular(call: Call) -> Info:
    """A [*, N, N] triangular, B [*, N, K] -> X [*, N, K] with A X = B; ``left=False``: X A = B with B [*, K, N].

    What couples the unknowns is the order of the N: they are frozen. Each column of B is solved for by itself.
    """
    a, b = call.info("self"), call.info("B")
    solved, free = (-2, -1) if call.get("left", True) else (-1, -2)
    call.unify(a.axes[-1], a.axes[-2])
    call.unify(a.axes[-1], b.axes[solved])
    call.freeze(a.axes[-1], "solved for in order")
    rank = call.out.dim()
    axes, zero = [], []
    for d in range(rank - 2):
        mine = [(i, d - rank + len(i.axes)) for i in (b, a)]
        carried = [(i, own) for i, own in mine if own >= 0 and i.axes[own].size == call.out.shape[d]]
        axes.append(carried[0][0].axes[carried[0][1]] if carried else ax.ONE)
        for info, own in carried[1:]:
            call.unify(axes[-1], info.axes[own])
        zero.append(any(i is b and i.zero[own] for i, own in carried))
    last = {solved: (b.axes[solved], False), free: (b.axes[free], b.zero[free])}
    axes += [last[-2][0], last[-1][0]]
    zero += [last[-2][1], last[-1][1]]
    return Info(tuple(axes), tuple(zero), active=a.active or b.active)
