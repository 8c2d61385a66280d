"""Genomes: every one meets the size and keeps to the widths that its groups may take."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from helpers_selection import random_scores, smollm2_groups

from pyprune.errors import PyPruneError
from pyprune.search.moves import Moves
from pyprune.search.surrogate import sample_slopes
from pyprune.selection import select
from pyprune.selection.allocation import Allocation

GROUPS = smollm2_groups()
SCORES = random_scores(GROUPS, heavy=True)


def moves_of(check, ratio: float = 0.5, **request) -> None:
    """Call ``check(moves, scores)`` with what an allocation is given for a request."""

    def allocate(groups, scores, budget):
        moves = Moves(groups, budget)
        starts = moves.starts(scores)
        check(moves, starts)
        return next(iter(starts.values()))

    select(GROUPS, SCORES, ratio, allocation=Allocation("test", allocate, True), count_embeddings=False, **request)


@pytest.mark.parametrize(
    "request_",
    [{"roles": "ffn"}, {"roles": "ffn,kv_heads"}, {"roles": "ffn", "round_to": 64}, {"min_keep": {"ffn": 300}},
     {"roles": "ffn", "layers": "4-27", "ratio": 0.3}, {"roles": "kv_heads", "ratio": 0.05}],
    ids=["ffn", "heads too", "round_to", "min_keep", "layers", "heads alone"],
)  # fmt: skip
def test_seeds_and_children_meet_the_size_within_allowed_widths(request_: dict) -> None:
    seen = []

    def check(moves, starts) -> None:
        assert len(starts) >= 2
        rng = Random(3)
        widths = next(iter(starts.values()))
        children = list(starts.values())
        for _ in range(60):
            found = moves.mutated(widths, rng, rng.choice([0.125, 1.0, 4.0]))
            if found is not None:
                assert found != widths
                widths = found
                children.append(found)
        assert len(children) > len(starts) + 20
        for child in children:
            assert child.keys() == {g.name for g in moves.groups}
            assert abs(moves.budget.count(child) - moves.budget.target) <= moves.tolerance
            for g in moves.groups:
                limits = moves.budget.limits[g.name]
                assert limits.nearest(child[g.name]) == child[g.name]
        seen.append(moves.tolerance / GROUPS.num_parameters(False))

    moves_of(check, **{"ratio": 0.5, **request_})
    assert seen[0] <= (0.005 if request_["roles"] == "kv_heads" else 0.001) if "roles" in request_ else seen[0] <= 0.001


def test_a_size_is_met_as_nearly_as_by_the_plain_allocations() -> None:
    def check(moves, starts) -> None:
        nearest = min(abs(moves.miss(w)) for w in starts.values())
        half = min(moves.step.values()) / 2
        assert nearest <= moves.tolerance
        assert moves.tolerance <= max(half, 30 * 3 * 576 / 2)  # uniform: one unit in every layer

    moves_of(check, roles="ffn")


def test_moves_reach_heads_and_channels_both_ways() -> None:
    def check(moves, starts) -> None:
        rng = Random(1)
        start = starts["uniform"]
        seen = set()
        for _ in range(300):
            child = moves.mutated(start, rng, 1.0)
            if child is not None:
                seen |= {
                    (g.role, child[g.name] > start[g.name]) for g in moves.groups if child[g.name] != start[g.name]
                }
        assert seen == {("ffn", True), ("ffn", False), ("kv_heads", True), ("kv_heads", False)}

    moves_of(check, roles="ffn,kv_heads", ratio=0.4)


def test_the_name_alone_does_not_search() -> None:
    with pytest.raises(PyPruneError, match=r"allocation 'search': measures candidates.*search_plan"):
        select(GROUPS, SCORES, 0.2, allocation="search")


def test_slopes_find_what_lowers_a_divergence() -> None:
    rng = np.random.default_rng(0)
    truth = np.linspace(-2, 1, 8)
    points = 0.5 + 0.05 * rng.standard_normal((80, 8))
    logs = points @ truth
    draws = [sample_slopes(points.tolist(), logs.tolist(), 0, np.random.default_rng(i)) for i in range(40)]
    assert np.abs(np.mean(draws, axis=0) - truth).max() < 0.3
    assert np.argmin(np.mean(draws, axis=0)) == 0


def test_without_evidence_there_are_no_slopes() -> None:
    rng = np.random.default_rng(0)
    assert sample_slopes([[0.5, 0.5]], [0.1], 0, rng) is None
    assert sample_slopes([[0.5, 0.5]] * 4, [0.1] * 4, 0, rng) is None
    assert sample_slopes([[0.5, 0.5], [0.4, 0.6], [0.6, 0.4], [0.7, 0.3]], [0.1] + [float("inf")] * 3, 0, rng) is None


def test_values_stay_whole_in_some_of_the_seeds_where_other_roles_make_up_the_size() -> None:
    seen: list[dict[str, dict[str, int]]] = []
    moves_of(lambda moves, starts: seen.append(starts), ratio=0.3, roles=["vo_dim", "ffn"])
    moves_of(lambda moves, starts: seen.append(starts), ratio=0.3, roles=["kv_heads", "ffn"])
    spared, none = ({name: w for name, w in starts.items() if name.endswith("whole")} for starts in seen)
    assert spared and not none
    for widths in spared.values():
        assert {w for name, w in widths.items() if name.endswith(":vo_dim")} == {64}


def test_channels_alone_are_among_the_seeds_where_heads_go_too() -> None:
    seen: list[dict[str, dict[str, int]]] = []
    moves_of(lambda moves, starts: seen.append(starts), ratio=0.2, roles=["kv_heads", "ffn"])
    alone = {name: widths for name, widths in seen[0].items() if name.endswith(", ffn only")}
    assert "knapsack, ffn only" in alone
    for widths in alone.values():
        assert all(widths[g.name] == g.units for g in GROUPS if g.role == "kv_heads" and g.name in widths)
