"""Axes: what a tensor dimension *is*, as union-find nodes that can be refined.

An axis is an ordered index set. It starts as an atom and may be refined, once and for everybody who refers to it, into
a row-major product ``A = B x C`` or a concatenation ``A = B + C``. Two axes found to be the same are unified, which
takes their common refinement: ``(32 x 128)`` with ``(8 x 4 x 128)`` gives ``8 x 4 x 128``. What cannot be refined
further when the trace ends, the leaves, are what a group cuts.

All axes of size one are the same object, :data:`ONE`: they carry nothing and broadcast.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

ATOM, PRODUCT, CONCAT = 0, 1, 2


class Mismatch(Exception):
    """Two axes have no common refinement, or an axis cannot be divided where asked."""


class Axis:
    """A node. ``marks`` and ``frozen`` are meaningful on atoms; refining hands them down.

    Attributes:
        size: number of indices.
        frozen: why no index of it may be removed, or None.
        marks: structural facts that rules noted, for roles and exactness.
    """

    __slots__ = ("frozen", "kind", "link", "marks", "parts", "size")

    def __init__(self, size: int, kind: int = ATOM, parts: tuple[Axis, ...] = ()) -> None:
        self.size = size
        self.kind = kind
        self.parts = parts
        self.link: Axis | None = None
        self.marks: set[str] = set()
        self.frozen: str | None = None

    def __repr__(self) -> str:
        node = find(self)
        if node.kind == ATOM:
            return str(node.size)
        return "(" + (" x " if node.kind == PRODUCT else " + ").join(map(repr, node.parts)) + ")"


ONE = Axis(1)


def find(axis: Axis) -> Axis:
    """The node that stands for ``axis`` now."""
    root = axis.link
    if root is None:
        return axis
    while root.link is not None:
        root = root.link
    while axis is not root:
        axis.link, axis = root, axis.link
    return root


def atom(size: int) -> Axis:
    """A fresh axis of ``size`` indices."""
    return ONE if size == 1 else Axis(size)


def _flat(parts: Iterable[Axis], kind: int) -> list[Axis]:
    out: list[Axis] = []
    for part in parts:
        node = find(part)
        if node.kind == kind:
            out += _flat(node.parts, kind)
        else:
            out.append(node)
    return out


def factors(axis: Axis) -> list[Axis]:
    """The product's factors, outermost first, none of them a product or of size one."""
    return [f for f in _flat((axis,), PRODUCT) if f.size != 1]


def segments(axis: Axis) -> list[Axis]:
    """The concatenation's segments in order, none of them a concatenation."""
    return _flat((axis,), CONCAT)


def without_sentinel(axis: Axis) -> Axis:
    """``axis`` without its last segment when that is a single index, as a class for "none of these" is."""
    parts = segments(axis)
    return concat(parts[:-1]) if len(parts) > 1 and parts[-1].size == 1 else find(axis)


def product(parts: Sequence[Axis]) -> Axis:
    """The row-major product of ``parts``, the first one outermost."""
    flat = [p for p in _flat(parts, PRODUCT) if p.size != 1]
    if len(flat) <= 1:
        return flat[0] if flat else ONE
    size = 1
    for part in flat:
        size *= part.size
    return Axis(size, PRODUCT, tuple(flat))


def concat(parts: Sequence[Axis]) -> Axis:
    """``parts`` one after the other; empty ones vanish."""
    flat = [p for p in _flat(parts, CONCAT) if p.size != 0]
    if len(flat) <= 1:
        return flat[0] if flat else atom(0)
    return Axis(sum(p.size for p in flat), CONCAT, tuple(flat))


def atoms(axis: Axis) -> list[Axis]:
    """Every leaf below ``axis`` (repeated ones repeatedly), without :data:`ONE`."""
    node = find(axis)
    if node.kind == ATOM:
        return [node] if node.size != 1 else []
    return [a for part in node.parts for a in atoms(part)]


def mark(axis: Axis, name: str) -> None:
    """Note a structural fact on every leaf."""
    for leaf in atoms(axis):
        leaf.marks.add(name)


def freeze(axis: Axis, reason: str) -> None:
    """Forbid removal on every leaf; the first reason given stays."""
    for leaf in atoms(axis):
        if leaf.frozen is None:
            leaf.frozen = reason


def _refine(node: Axis, kind: int, parts: tuple[Axis, ...]) -> None:
    node.kind, node.parts = kind, parts
    for leaf in {id(a): a for p in parts for a in atoms(p)}.values():
        leaf.marks |= node.marks
        if leaf.frozen is None:
            leaf.frozen = node.frozen


def divide(axis: Axis, inner: int) -> tuple[Axis, Axis]:
    """``(outer, inner)`` axes with ``axis = outer x inner`` and the inner one of size ``inner``; refines ``axis``.

    Raises:
        Mismatch: the structure already known does not divide there.
    """
    node = find(axis)
    if inner == 1:
        return node, ONE
    if inner == node.size:
        return ONE, node
    if inner <= 0 or node.size % inner:
        raise Mismatch(f"{node.size} indices do not divide by {inner}")
    if node.kind == ATOM:
        parts = (atom(node.size // inner), atom(inner))
        _refine(node, PRODUCT, parts)
        return parts
    if node.kind == PRODUCT:
        fs, left = factors(node), inner
        for i in range(len(fs) - 1, -1, -1):
            if left % fs[i].size == 0:
                left //= fs[i].size
                if left == 1:
                    return product(fs[:i]), product(fs[i:])
            elif fs[i].size % left == 0:
                outer, low = divide(fs[i], left)
                return product([*fs[:i], outer]), product([low, *fs[i + 1 :]])
            else:
                break
        raise Mismatch(f"{node!r} does not divide by {inner}")
    # A concatenation is a product when every segment is one with the same inner axis.
    pairs = [divide(s, inner) for s in segments(node)]
    for _, low in pairs[1:]:
        unify(pairs[0][1], low)
    parts = (concat([outer for outer, _ in pairs]), find(pairs[0][1]))
    node.kind, node.parts = PRODUCT, parts
    return parts


def cut(axis: Axis, at: int) -> tuple[Axis, Axis]:
    """``(left, right)`` axes with ``axis = left + right`` and ``at`` indices on the left; refines ``axis``.

    Raises:
        Mismatch: the structure already known cannot be cut there.
    """
    node = find(axis)
    if not 0 < at < node.size:
        raise Mismatch(f"{node.size} indices cannot be cut at {at}")
    if node.kind == ATOM:
        parts = (atom(at), atom(node.size - at))
        _refine(node, CONCAT, parts)
        return parts
    if node.kind == CONCAT:
        segs, before = segments(node), 0
        for i, seg in enumerate(segs):
            if at == before:
                return concat(segs[:i]), concat(segs[i:])
            if at < before + seg.size:
                left, right = cut(seg, at - before)
                return concat([*segs[:i], left]), concat([right, *segs[i + 1 :]])
            before += seg.size
    fs = factors(node)
    inner = node.size // fs[0].size
    if at % inner:
        raise Mismatch(f"{node!r} cannot be cut at {at}")
    left, right = cut(fs[0], at // inner)
    return product([left, *fs[1:]]), product([right, *fs[1:]])


def take(axis: Axis, start: int, stop: int) -> Axis:
    """The axis of indices ``start:stop``; refines ``axis``."""
    if stop < axis.size:
        axis = cut(axis, stop)[0]
    if start > 0:
        axis = cut(axis, start)[1]
    return find(axis)


def unify(a: Axis, b: Axis) -> None:
    """Make the two axes one, with the common refinement of what is known of either.

    Raises:
        Mismatch: sizes differ or there is no common refinement. What was unified on the way stays so: coupling more
            than necessary is safe.
    """
    a, b = find(a), find(b)
    if a is b:
        return
    if a.size != b.size:
        raise Mismatch(f"{a.size} indices against {b.size}")
    if a.size <= 1:
        return
    if a.kind != ATOM and b.kind == ATOM:
        a, b = b, a
    if a.kind == ATOM:
        for leaf in atoms(b):
            leaf.marks |= a.marks
            if leaf.frozen is None:
                leaf.frozen = a.frozen
        a.link = b
        return
    if a.kind == CONCAT and b.kind == PRODUCT:
        _unify_segments(a, b)
    elif a.kind == PRODUCT and b.kind == CONCAT:
        a, b = b, a
        _unify_segments(a, b)
    elif a.kind == CONCAT:
        _unify_segments(a, b)
    else:
        _unify_factors(a, b)
    a, b = find(a), find(b)
    if a is not b:
        a.link = b


def _unify_segments(a: Axis, b: Axis) -> None:
    # Cutting one refines the other's segments in place, so both are walked afresh at each boundary.
    left, right = find(a), find(b)
    while True:
        size = min(segments(left)[0].size, segments(right)[0].size)
        if size == left.size:
            unify(left, right)
            return
        x, left = cut(left, size)
        y, right = cut(right, size)
        unify(x, y)
        left, right = find(left), find(right)


def _unify_factors(a: Axis, b: Axis) -> None:
    left, right = find(a), find(b)
    while True:
        x, y = factors(left)[0], factors(right)[0]
        if x.size == left.size or y.size == right.size:
            unify(x if x.size == left.size else left, y if y.size == right.size else right)
            return
        inner = max(left.size // x.size, right.size // y.size)
        x, left = divide(left, inner)
        y, right = divide(right, inner)
        unify(x, y)
        left, right = find(left), find(right)
