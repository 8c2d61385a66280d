"""What routed experts add to the stream: their gated outputs, caught where they are made.

Experts are the slices of weights stacked along an ``experts`` group, run one after the other. A slice's product that is
multiplied by one number a row is that expert's output times its gate; no module or attribute is known by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from pyprune import progress as bars
from pyprune.discovery.groups import Group
from pyprune.errors import PyPruneError
from pyprune.importance.calibration import Calibration
from pyprune.importance.inputs import picked_rows
from pyprune.importance.steps import Forward, Step, make_steps
from pyprune.importance.walk import walking

STEP_TOKENS = 1024

_PRODUCTS = (linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.addmm)
_TIMES = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.mul_, Tensor.__imul__)
_SAME = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.to)  # a bias, another type: still the output


def score_experts(
    model: nn.Module, groups: Sequence[Group], parameters: Mapping[str, nn.Parameter], calibration: Calibration,
    criterion: str, details: dict[str, Any],
) -> dict[str, Tensor]:  # fmt: skip
    """Group name -> float64 [outer, units]: the mean over an expert's tokens of |gate| * ||output||, 0 without a token.

    ``details["tokens_of_experts"]`` has the number of tokens that reached each expert, by group name.

    Raises:
        PyPruneError: a group of another role, experts whose gated outputs cannot be seen, NaN or infinity.
    """
    other = [g for g in groups if g.role != "experts"]
    if other:
        problem = f"scores experts alone, and {other[0].name} is of role {other[0].role}"
        raise PyPruneError("criterion", criterion, problem, "Choose the role experts, or another criterion.")
    stacks = {
        m.tensor: g
        for g in groups
        for m in g.members
        if m.parameter and m.dim == 0 and parameters[m.tensor].dim() == 3 and m.index.width == 1
    }
    watched = {name: parameters[name] for name in stacks}
    taps = _GateTaps(watched, stacks)
    with walking(model, watched), torch.no_grad():
        forward = Forward(model)
        steps = make_steps(calibration, next(model.parameters()).device, tokens=STEP_TOKENS)
        with bars.bar("scoring", len(steps)) as bar:
            for step in steps:
                taps.step = step
                with taps:
                    forward(step)
                bar.advance()
    out = {}
    details["tokens_of_experts"] = {}
    for group in groups:
        if group.name not in taps.sums:
            problem = f"finds no experts of {group.name} whose outputs are multiplied by their gates"
            raise PyPruneError("criterion", criterion, problem, "Choose another criterion, such as param_first.")
        sums, counts = taps.sums[group.name], taps.counts[group.name]
        if not bool(sums.isfinite().all()):
            bad = int((~sums.isfinite()).nonzero()[0])
            problem = f"gives NaN or infinity (expert {bad})"
            hint = "Load the model in float32 or bfloat16, and look at the calibration text."
            raise PyPruneError("model", group.module, problem, hint)
        member = next(m for m in group.members if m.tensor in stacks)
        places = torch.from_numpy(member.index.positions()[..., 0].copy()).to(sums.device)
        out[group.name] = (sums / counts.clamp_min(1))[places]
        details["tokens_of_experts"][group.name] = [int(n) for n in counts]
    return out


class _GateTaps(TorchFunctionMode):
    """Within it, as a context manager, gated outputs of experts are summed up.

    Args:
        stacks: name -> parameter [experts, a, b].
        groups: name -> the group that it belongs to.

    Attributes:
        step: the batch that is being run.
        sums: group name -> sum over tokens of the norm of the gated output, float64 [experts].
        counts: group name -> tokens, float64 [experts].
    """

    def __init__(self, stacks: Mapping[str, nn.Parameter], groups: Mapping[str, Group]) -> None:
        super().__init__()
        self.step: Step | None = None
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self._groups = groups
        self._stacks = {p.untyped_storage().data_ptr(): (name, p) for name, p in stacks.items()}
        self._outputs: dict[int, tuple[Tensor, str, int]] = {}  # of the expert at work: id -> tensor, group, expert
        self._rows: Tensor | None = None  # which tokens were last picked out

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is Tensor.__getitem__:
            assert self.step is not None
            picked = picked_rows(args[0], args[1], self.step.targets.numel())
            self._rows = self._rows if picked is None else picked
        elif func in _PRODUCTS:
            for operand in (*args, *(kwargs or {}).values()):
                found = self._expert(operand)
                if found is not None:
                    group, expert = found
                    if self._outputs and next(iter(self._outputs.values()))[1:] != found:
                        self._outputs.clear()  # the next expert's turn
                    self._outputs[id(out)] = (out, group, expert)
        elif func in _SAME and self._outputs:
            known = next((self._outputs[id(a)] for a in args if id(a) in self._outputs), None)
            if known is not None:
                self._outputs[id(out)] = (out, *known[1:])
        elif func in _TIMES and self._outputs:
            for output, gate in (args[:2], args[1::-1]):
                known = self._outputs.get(id(output))
                if known is not None and isinstance(gate, Tensor) and _one_a_row(gate, output):
                    self._count(out, *known[1:])
                    break
        return out

    def _expert(self, weight: Any) -> tuple[str, int] | None:
        """(group, expert) of a matrix that is one slice of a stack, or its transpose."""
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            return None
        name, p = self._stacks.get(weight.untyped_storage().data_ptr(), (None, weight))
        if name is None or weight.numel() != p[0].numel():
            return None
        place, rest = divmod(int(weight.storage_offset() - p.storage_offset()), int(p.stride(0)))
        return (self._groups[name].name, place) if rest == 0 else None

    def _count(self, gated: Tensor, group: str, expert: int) -> None:
        assert self.step is not None
        norms = gated.double().flatten(0, -2).norm(dim=-1)
        real = torch.ones_like(norms)
        mask = self.step.inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == self.step.targets.shape and not bool((mask != 0).all()):
            tokens = (mask != 0).reshape(-1).to(norms)
            if self._rows is not None and len(self._rows) == len(norms):
                real = tokens[self._rows]
            elif len(tokens) == len(norms):
                real = tokens
            else:
                problem = "holds padding, and which tokens its experts are given cannot be seen"
                raise PyPruneError("calibration", None, problem, "Give sequences of one length.")
        if group not in self.sums:
            experts = next(p.shape[0] for name, p in self._stacks.values() if self._groups[name].name == group)
            self.sums[group], self.counts[group] = norms.new_zeros(experts), norms.new_zeros(experts)
        self.sums[group][expert] += torch.where(real > 0, norms, norms.new_zeros(())).sum()
        self.counts[group][expert] += real.sum()


def _one_a_row(gate: Tensor, output: Tensor) -> bool:
    """Whether ``gate`` has one number for each row of ``output``."""
    return gate.dim() == output.dim() and gate.shape[:-1] == output.shape[:-1] and gate.shape[-1] == 1
