"""Roles: what a leaf axis is for, decided by where it sits in the computation, never by a name.

=============  =====================================================================================================
kv_heads       batch axis of an attention product that stands with the value dimensions in every producing weight
query_heads    such an axis that the keys and values do not have: queries grouped under one KV head
qk_dim         contracted between queries and keys (a product of two activations whose result meets a softmax)
vo_dim         carried by the attention probabilities' product from the values to the output
experts        ranked by a router, then looked up by its choice; never exact, as a zeroed expert is still chosen
expert_ffn     FFN channels of weights stacked along such an axis, or of one of the modules that chosen tokens go to
state          contracted between two activations without a softmax: what a state-space model carries; not exact where
               a number like the square root of its size scales it, which such models compute anew
hidden         carried from the token embedding, or from block to block
ffn            produced by a weight, through an activation or a gate, contracted by a weight
latent         produced by one weight and contracted by another with nothing but norms between
vocab          looked up by token id, or the dimension of the model's output
channels       anything else: what passes a depthwise convolution (the inner channels of a state-space model) too
=============  =====================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from pyprune.discovery.axes import Axis
from pyprune.discovery.lattice import Occurrence

HEADS = ("kv_heads", "query_heads")
# Roles whose units may be chosen separately in every head.
PER_HEAD = ("query_heads", "qk_dim", "vo_dim")
INSIDE_HEADS = ("qk_dim", "vo_dim")


@dataclass
class Leaf:
    """A leaf axis with every place it has in the model's tensors.

    Attributes:
        axis: the atom.
        places: (tensor, dimension) -> its occurrences there, in model order.
    """

    axis: Axis
    places: dict[tuple[str, int], list[Occurrence]] = field(default_factory=dict)
    role: str = "channels"


def assign(
    leaves: list[Leaf],
    uses: dict[tuple[str, int], set[str]],
    layer_of: Callable[[str], tuple[str, int] | None],
    in_expert: Callable[[str], bool],
) -> None:
    """Set every leaf's role.

    Args:
        leaves: all of them.
        uses: how parameters' dimensions were used.
        layer_of: the block (list path, index) that a tensor belongs to.
        in_expert: whether a tensor lies in a module that sees only the tokens chosen for it.
    """
    stacked = {name for leaf in leaves if leaf.axis.marks & {"ranked", "routed"} for name, _ in leaf.places}
    value_leaves = {id(x.axis) for x in leaves if "vo" in x.axis.marks}
    compared_leaves = {id(x.axis) for x in leaves if "qk" in x.axis.marks}
    for leaf in leaves:
        leaf.role = _role(leaf, layer_of)
        if leaf.role in HEADS:
            leaf.role = _heads_role(leaf, leaves, uses, value_leaves, compared_leaves, layer_of)
        if leaf.role == "ffn":
            inside = all(name in stacked or in_expert(name) for name, _ in leaf.places)
            # Rows are left out for other reasons too (padding): only where there is a router is it a choice of experts.
            leaf.role = "expert_ffn" if inside or (stacked and "sparse" in leaf.axis.marks) else "ffn"


def _role(leaf: Leaf, layer_of: Callable[[str], tuple[str, int] | None]) -> str:
    marks = leaf.axis.marks
    spans_blocks = len({layer_of(name) for name, _ in leaf.places} - {None}) > 1
    if "lookup" in marks:
        return "vocab"
    if "heads" in marks and "embedded" in marks and "contracted" in marks:
        # Heads that a table of relative positions gives a bias each; the residual stream is nobody's batch axis.
        return "kv_heads"
    if "embedded" in marks:
        return "hidden"
    if "output" in marks:
        return "hidden" if spans_blocks else "vocab"
    if "heads" in marks:
        return "kv_heads"
    if "qk" in marks:
        return "qk_dim"
    if "vo" in marks:
        return "vo_dim"
    if "ranked" in marks or "routed" in marks:
        return "experts"
    if spans_blocks and "stream" in marks:
        return "hidden"
    if "mixed" in marks:
        return "state"
    if {"produced", "contracted"} <= marks and "depthwise" not in marks:
        return "ffn" if marks & {"activation", "gate"} else "latent"
    return "channels"


def _heads_role(
    leaf: Leaf,
    leaves: Iterable[Leaf],
    uses: dict[tuple[str, int], set[str]],
    values: set[int],
    compared: set[int],
    layer_of: Callable[[str], tuple[str, int] | None],
) -> str:
    """A head axis that some producing weight of the values (or keys) lacks is one of queries only."""
    own = {place for place in leaf.places}
    layers = {layer_of(name) for name, _ in own}
    for wanted in (values, compared):
        # Inner dimensions that share a weight's dimension with this axis, and all producing weights of those.
        inner = [x for x in leaves if id(x.axis) in wanted and own & set(x.places)]
        produced = [
            (place, occurrence)
            for x in inner
            for place, found in x.places.items()
            if "produced" in uses.get(place, ()) and layer_of(place[0]) in layers
            for occurrence in found
        ]
        if produced:
            together = all(id(leaf.axis) in o.companions for _, o in produced)
            return "kv_heads" if together else "query_heads"
    return "kv_heads"
