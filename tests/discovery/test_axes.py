"""Refinement of axes: products, concatenations and their common refinements."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyprune.discovery import axes as ax
from pyprune.discovery.axes import Mismatch
from pyprune.discovery.groups import IndexMap
from pyprune.discovery.lattice import Occurrences, lattice


def sizes(axis):
    return [f.size for f in ax.factors(axis)]


def test_two_products_take_their_common_refinement():
    a, b = ax.atom(4096), ax.atom(4096)
    ax.divide(a, 128)
    _, rest = ax.divide(b, 512)
    ax.divide(rest, 128)
    ax.unify(a, b)
    assert sizes(a) == sizes(b) == [8, 4, 128]
    assert ax.find(a) is ax.find(b)


def test_products_without_a_common_refinement_are_refused():
    a, b = ax.atom(12), ax.atom(12)
    ax.divide(a, 2)
    ax.divide(b, 3)
    with pytest.raises(Mismatch):
        ax.unify(a, b)


def test_rotary_halves_become_the_same_axis():
    d = ax.atom(8)
    x1, x2 = ax.take(d, 0, 4), ax.take(d, 4, 8)
    ax.unify(ax.concat([x2, x1]), d)
    first, second = ax.segments(d)
    assert first is second


def test_a_concatenation_that_is_also_a_product_ties_its_segments():
    d = ax.atom(12)
    ax.cut(d, 6)
    outer, inner = ax.divide(d, 3)
    assert outer.size == 4 and inner.size == 3
    assert len({id(a) for a in ax.atoms(d) if a.size == 3}) == 1


def test_a_product_is_cut_only_between_its_outer_indices():
    d = ax.atom(12)
    ax.divide(d, 4)
    left, right = ax.cut(d, 8)
    assert sizes(left) == [2, 4]
    assert right.size == 4
    with pytest.raises(Mismatch):
        ax.cut(d, 6)


def test_a_reason_survives_refinement_and_unification():
    a, b = ax.atom(6), ax.atom(6)
    ax.freeze(a, "because")
    ax.divide(b, 2)
    ax.unify(a, b)
    assert {leaf.frozen for leaf in ax.atoms(b)} == {"because"}
    c = ax.atom(6)
    ax.mark(c, "size")
    ax.cut(c, 2)
    assert all("size" in leaf.marks for leaf in ax.atoms(c))


def test_axes_of_size_one_carry_nothing():
    assert ax.atom(1) is ax.ONE
    assert ax.product([ax.ONE, ax.ONE]) is ax.ONE
    d = ax.atom(5)
    assert ax.product([ax.ONE, d]) is d
    assert ax.atoms(ax.ONE) == []


@st.composite
def programs(draw):
    """Sequences of refinements of one axis of 48 indices and of a second one, then unified."""
    steps = st.one_of(
        st.tuples(st.just("divide"), st.sampled_from([2, 3, 4, 6, 8, 12, 16, 24])),
        st.tuples(st.just("cut"), st.integers(1, 47)),
    )
    return draw(st.lists(steps, max_size=4)), draw(st.lists(steps, max_size=4))


def apply(axis, steps):
    for verb, n in steps:
        try:
            ax.divide(axis, n) if verb == "divide" else ax.cut(axis, n)
        except Mismatch:
            pass


def coordinates(axis):
    """For every index of ``axis``, the set of (leaf, unit) that it belongs to, by brute force."""
    node = ax.find(axis)
    if node.kind == ax.ATOM:
        return [{(id(node), u)} if node.size > 1 else set() for u in range(node.size)]
    parts = [coordinates(p) for p in node.parts]
    if node.kind == ax.CONCAT:
        return [c for part in parts for c in part]
    return [set().union(*combination) for combination in itertools.product(*parts)]


@settings(max_examples=300, deadline=None)
@given(programs())
def test_positions_are_those_of_the_refinement_whatever_it_is(program):
    a, b = ax.atom(48), ax.atom(48)
    apply(a, program[0])
    apply(b, program[1])
    try:
        ax.unify(a, b)
        assert ax.find(a) is ax.find(b)
    except Mismatch:
        pass
    for axis in (a, b):
        expected = {}
        for index, found in enumerate(coordinates(axis)):
            for key in found:
                expected.setdefault(key, []).append(index)
        leaves = {}
        for o in Occurrences().of(axis):
            if not o.square:
                leaves.setdefault(id(o.leaf), (o.leaf.size, []))[1].append(lattice(o, None))
        for leaf, (size, terms) in leaves.items():
            positions = IndexMap(1, size, tuple(terms)).positions()[0]
            assert [row.tolist() for row in positions] == [expected[leaf, u] for u in range(size)]
