"""Where units can be masked without slicing: the inputs of the matrices that read them, found by what a model computes.

Of an exact group, removing a unit equals zeroing it. A unit that some projection reads as inputs is gone when the
columns of those inputs are zero; one that none reads (dimensions of queries and keys) when what makes it gives zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from pyprune.discovery.groups import Group, IndexMap
from pyprune.errors import PyPruneError
from pyprune.importance.inputs import InputTaps
from pyprune.importance.steps import Forward, Step
from pyprune.importance.walk import walking


@dataclass(frozen=True)
class Cutter:
    """A group's way of cutting one dimension of a tensor."""

    group: str
    index: IndexMap


@dataclass
class Site:
    """One parameter whose inputs (or outputs) units lie along.

    Attributes:
        name: the parameter's.
        block: number of the decoder block that it is in.
        transposed: it is stored [inputs, outputs].
        inputs: its inputs along the cut dimension; their number.
        cutters: the groups that cut them.
    """

    name: str
    block: int
    transposed: bool
    inputs: int
    cutters: tuple[Cutter, ...]


@dataclass
class Sites:
    """All places where groups can be masked.

    Attributes:
        read: parameter name -> site whose inputs are masked, block by block, in the order in which the model uses them.
        made: parameter name -> site whose outputs are masked, for groups that no projection reads.
        block_of: group name -> the first block in which something of it is masked.
        orders: group name -> unit numbers [outer, units], in each copy the first to go in front.
    """

    read: dict[str, Site]
    made: dict[str, Site]
    block_of: dict[str, int]
    orders: Mapping[str, np.ndarray]

    def gone(self, site: Site, widths: Mapping[str, int]) -> np.ndarray:
        """Ascending int64 positions along the site's cut dimension that go when groups keep ``widths`` units."""
        out = np.zeros(site.inputs, dtype=bool)
        for cutter in site.cutters:
            index = cutter.index
            away = self.orders[cutter.group][:, : index.units - widths.get(cutter.group, index.units)]
            copies = np.arange(index.outer)[:, None]
            out[index.positions()[copies, away].reshape(-1)] = True
        return np.flatnonzero(out)

    def key(self, site: Site, widths: Mapping[str, int]) -> tuple[int, ...]:
        """What of ``widths`` the site depends on."""
        return tuple(widths.get(c.group, c.index.units) for c in site.cutters)


def find_sites(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    groups: Sequence[Group],
    orders: Mapping[str, np.ndarray],
    steps: Sequence[Step],
) -> Sites:
    """Where ``groups`` are masked, seen on as many samples of ``steps`` as it takes to see all their matrices used.

    Raises:
        PyPruneError: a group in which removing is more than zeroing, or that no matrix product reads or makes.
    """
    parameters = dict(model.named_parameters())
    matrices = {
        m.tensor: parameters[m.tensor]
        for g in groups
        for m in g.members
        if m.tensor in parameters and parameters[m.tensor].dim() in (2, 3)
    }
    turned = _seen(model, matrices, steps)
    block_of = {id(p): i for i, block in reversed(list(enumerate(blocks))) for p in block.parameters()}
    read: dict[str, list[Cutter]] = {}
    made: dict[str, list[Cutter]] = {}
    for group in groups:
        if not group.exact or group.role == "layers":
            problem = f"search masks units where they are read, and {group.role} cannot be masked"
            raise PyPruneError("roles", group.role, problem, "Search over kv_heads, query_heads, ffn and expert_ffn.")
        ins: list[tuple[str, Cutter]] = []
        outs: list[tuple[str, Cutter]] = []
        for m in group.members:
            if m.tensor not in turned:
                continue
            dims = matrices[m.tensor].dim()
            along = dims - 2 if turned[m.tensor] else dims - 1
            (ins if m.dim == along else outs if m.dim >= dims - 2 else []).append(
                (m.tensor, Cutter(group.name, m.index))
            )
        if not ins and not outs:
            problem = f"no matrix product reads or makes the units of {group.name} on the calibration text"
            hint = "Leave it out, give more text where it is an expert's, or choose another allocation."
            raise PyPruneError("roles", group.role, problem, hint)
        for into, found in ((read, ins), (made, [] if ins else outs)):
            for tensor, cutter in found:
                into.setdefault(tensor, []).append(cutter)

    def sites(of: Mapping[str, list[Cutter]], is_input: bool) -> dict[str, Site]:
        out = {}
        order = list(turned)
        for name in sorted(of, key=lambda n: (block_of.get(id(matrices[n]), 0), order.index(n))):
            p, flipped = matrices[name], turned[name]
            size = int(p.shape[-2 if flipped == is_input else -1])
            out[name] = Site(name, block_of.get(id(p), 0), flipped, size, tuple(of[name]))
        return out

    places = Sites(sites(read, True), sites(made, False), {}, orders)
    for site in (*places.read.values(), *places.made.values()):
        for cutter in site.cutters:
            places.block_of[cutter.group] = min(site.block, places.block_of.get(cutter.group, site.block))
    return places


def _seen(model: nn.Module, matrices: Mapping[str, nn.Parameter], steps: Sequence[Step]) -> dict[str, bool]:
    """Matrix -> whether it is stored [inputs, outputs], of those that are used, in the order of first use.

    Samples run one by one until all are seen: an expert with modules of its own is used by those that reach it only.
    """
    found: dict[str, bool] = {}
    forward = Forward(model)
    with walking(model, matrices), torch.no_grad():
        for step in steps:
            for row in range(step.rows):
                with InputTaps(matrices) as taps:
                    forward(step.part(slice(row, row + 1)))
                for use in taps.uses:
                    found.setdefault(use.key.name, use.transposed)
                if len(found) == len(matrices):
                    return found
    return found
