"""The stage: values of every head in their principal basis, in a model that computes what it did before.

Nothing is known of attention here. A group of dimensions that values carry (role ``vo_dim``) has one member that a
linear layer reads as inputs, and others whose rows make them; whether a change of basis leaves what the reader gives
as it was is tried on a sample, and where it does not (something between them treats dimensions apart), the weights go
back and the group is named.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyprune import progress as bars
from pyprune.basis.principal import principal_basis
from pyprune.discovery.groups import Group, Member
from pyprune.errors import PyPruneError
from pyprune.importance.calibration import check_vocabulary, load_calibration
from pyprune.importance.inputs import Use
from pyprune.importance.modes import in_memory, own_modes
from pyprune.importance.steps import make_steps
from pyprune.importance.walk import Walk, walking, weigh_tokens, weights_for

log = logging.getLogger(__name__)

ROLE = "vo_dim"
STEP_TOKENS = 2048
TOKENS = 32768  # that second moments are made from, at most: of few numbers
WITHIN, WITHIN_HALF = 1e-3, 3e-2  # relative difference of what a reader gives: of weights of 32 bits, of 16 bits


@dataclass
class Rebased:
    """What was changed.

    Attributes:
        groups: names of the groups whose units are principal coordinates now, those that carry most first.
        left: names of those that stay as they were -> why.
        carrying: group name -> for every head, how many of its coordinates carry 99% of what it gives.
    """

    groups: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    carrying: dict[str, list[int]] = field(default_factory=dict)

    @property
    def notes(self) -> list[str]:
        """What a reader of the result should know, as sentences."""
        if not self.left:
            return []
        name, why = next(iter(self.left.items()))
        others = f" and {len(self.left) - 1} more" if len(self.left) > 1 else ""
        return [f"Values of {name}{others} stay in their own basis: {why}."]

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {"groups": self.groups, "left": self.left, "carrying": self.carrying}


@own_modes()
def change_basis(
    model: nn.Module, groups: Sequence[Group], batches: Any, *, token_weights: str = "inverse",
    progress: bool | None = None,
) -> Rebased:  # fmt: skip
    """Write the values of every head in their principal basis (:mod:`pyprune.basis.principal`), **in place**.

    The model computes what it did, up to rounding, and its groups are the same; units of role ``vo_dim`` are other
    directions now, so scores and plans of the model as it was say nothing of them.

    Args:
        model: a causal LM.
        groups: of which those of role ``vo_dim`` that can be pruned are changed.
        batches: calibration, as :func:`pyprune.importance.calibration.load_calibration` takes it.
        token_weights: what a token counts, as in :func:`pyprune.compensation.compensate`.
        progress: False silences the progress bar.

    Raises:
        PyPruneError: activations with NaN or infinity; tokens that the model does not know.
    """
    model = in_memory(model)
    calibration = load_calibration(batches)
    check_vocabulary(calibration, model)
    wanted = [g for g in groups if g.role == ROLE and g.prunable and g.exact]
    done = Rebased()
    parameters = dict(model.named_parameters())
    matrices = {m.tensor: parameters[m.tensor] for g in wanted for m in g.members if _is_matrix(parameters, m)}
    if not wanted:
        return done
    with bars.shown(progress is not False), walking(model, matrices), torch.no_grad():
        steps = make_steps(calibration, next(model.parameters()).device, tokens=STEP_TOKENS)
        while sum(s.targets.numel() for s in steps) > TOKENS and len(steps) > 1:
            steps = steps[::2]
        walk = Walk(model, steps)
        with bars.bar("principal values", len(walk.blocks)) as bar:
            for i, block in enumerate(walk.blocks):
                inside = {id(p) for p in block.parameters()}
                here = {n: p for n, p in matrices.items() if id(p) in inside}
                mine = [g for g in wanted if any(m.tensor in here for m in g.members)]
                _Block(walk, i, here, parameters, token_weights, done).run(mine)
                bar.advance()
    for note in done.notes:
        log.warning("%s", note)
    return done


def _is_matrix(parameters: Mapping[str, nn.Parameter], member: Member) -> bool:
    return member.tensor in parameters and parameters[member.tensor].dim() == 2


@dataclass
class _Moments:
    """Second moments of what a group's reader is given, [heads, copies, units, units]: of every head, and in it of
    every copy that reads the same values."""

    reader: Member
    transposed: bool  # the reader is stored [inputs, outputs]
    sums: Tensor


class _Block:
    def __init__(
        self, walk: Walk, i: int, here: Mapping[str, nn.Parameter], parameters: Mapping[str, nn.Parameter],
        weighting: str, done: Rebased,
    ) -> None:  # fmt: skip
        self.walk, self.i, self.here, self.parameters = walk, i, here, parameters
        self.weighting, self.done = weighting, done

    def run(self, groups: Sequence[Group]) -> None:
        """Change the basis of these groups, all of this block, and go on to the next one."""
        readers = self._readers(groups)
        found = self._moments(groups, readers)
        for group in groups:
            if group.name not in found:
                self.done.left[group.name] = "no single linear layer reads them"
            else:
                self._change(group, found[group.name])

    def _readers(self, groups: Sequence[Group]) -> dict[str, Member]:
        """Group name -> the one member that is read as inputs, once."""
        uses = self.walk.once(self.i, self.here) if groups else []
        out = {}
        for group in groups:
            read = [
                m
                for m in group.members
                for u in uses
                if u.key.expert is None and (m.tensor, m.dim) == (u.key.name, u.input_dim(2))
            ]
            if len(read) == 1:
                out[group.name] = read[0]
        return out

    def _moments(self, groups: Sequence[Group], readers: Mapping[str, Member]) -> dict[str, _Moments]:
        found: dict[str, _Moments] = {}
        watched = {m.tensor: self.here[m.tensor] for m in readers.values()}
        for number, uses, stream in self.walk.run(self.i, watched):
            weights = weigh_tokens(self.walk.steps[number], stream, self.weighting)
            for use in uses:
                for group in groups:
                    if group.name in readers and readers[group.name].tensor == use.key.name:
                        self._add(found, group, readers[group.name], use, weights)
            self.walk.leave(number, stream)
        for moments in found.values():
            if not bool(moments.sums.isfinite().all()):
                hint = "Load the model in float32 or bfloat16, and look at the calibration text."
                raise PyPruneError("model", moments.reader.tensor, "is given inputs with NaN or infinity", hint)
        return found

    def _add(self, found: dict[str, _Moments], group: Group, reader: Member, use: Use, weights: Tensor) -> None:
        positions = _positions(reader, use.x.device)  # [heads, units, copies]
        heads, units, copies = positions.shape
        root = weights_for(use.x, weights, use.tokens).sqrt()[:, None, None]
        x = use.x[:, positions.permute(0, 2, 1).reshape(-1)].float().reshape(len(use.x), heads * copies, units)
        x = (x * root).transpose(0, 1)
        sums = (x.transpose(1, 2) @ x).double().reshape(heads, copies, units, units)
        if group.name in found:
            found[group.name].sums += sums
        else:
            found[group.name] = _Moments(reader, use.transposed, sums)

    def _change(self, group: Group, moments: _Moments) -> None:
        """Change one group's weights, and put them back where that changes what the reader gives."""
        reader = moments.reader
        p = self.parameters[reader.tensor]
        makers = [m for m in group.members if m is not reader]
        why = _unfit(makers, self.parameters)
        if why is not None:
            self.done.left[group.name] = why
            return
        touched = {m.tensor: self.parameters[m.tensor] for m in (reader, *makers)}
        before = {n: t.detach().clone() for n, t in touched.items()}
        given = self._given(reader.tensor)
        matrix = (p.t() if moments.transposed else p).double()
        where = _positions(reader, p.device)
        carrying = []
        for o, positions in enumerate(where):
            columns = matrix[:, positions.reshape(-1)].reshape(len(matrix), *positions.shape).permute(2, 0, 1)
            basis, inverse, values = principal_basis(moments.sums[o], columns)
            carrying.append(_carrying(values, 0.99))
            for copy in positions.t():
                _turn(p, reader.dim, copy, inverse.t())
            for m in makers:
                _turn(self.parameters[m.tensor], m.dim, _positions(m, p.device)[o, :, 0], basis)
        off = (self._given(reader.tensor) - given).norm() / given.norm().clamp_min(torch.finfo(torch.float64).tiny)
        if not bool(off <= (WITHIN_HALF if p.element_size() == 2 else WITHIN)):
            for n, t in touched.items():
                t.copy_(before[n])
            self.done.left[group.name] = "another basis changes what the model computes"
            return
        self.done.groups.append(group.name)
        self.done.carrying[group.name] = carrying

    def _given(self, name: str) -> Tensor:
        """What a matrix gives on one sample, float64 [tokens, outputs]."""
        (use,) = self.walk.once(self.i, {name: self.here[name]})
        p = self.here[name]
        return use.x.double() @ (p if use.transposed else p.t()).double()


def _unfit(makers: Sequence[Member], parameters: Mapping[str, nn.Parameter]) -> str | None:
    """Why the members that make the units cannot be written in another basis; None where they can."""
    if not makers:
        return "no matrix makes them"
    for m in makers:
        if m.tensor not in parameters:
            return f"the buffer {m.tensor} goes along them"
        if m.index.width != 1:
            return f"a unit has several rows of {m.tensor}"
    return None


def _positions(member: Member, device: torch.device) -> Tensor:
    return torch.from_numpy(member.index.positions().copy()).to(device)


def _turn(p: Tensor, dim: int, positions: Tensor, by: Tensor) -> None:
    """Slices of ``p`` along ``dim`` at ``positions`` become ``by`` times them."""
    part = p.index_select(dim, positions).double()
    turned = torch.tensordot(by, part, dims=([1], [dim])).movedim(0, dim)
    p.index_copy_(dim, positions, turned.to(p.dtype))


def _carrying(values: Tensor, share: float) -> int:
    """How many of the first of falling ``values`` make up that share of them all."""
    total = values.sum()
    return int((values.cumsum(0) < share * total).sum()) + 1 if bool(total > 0) else 0
