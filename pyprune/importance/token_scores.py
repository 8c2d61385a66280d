"""Scores from what a unit hands on at single tokens and the gradient that comes back there.

Only members that a linear layer reads *as inputs* have a score here; the rest of a unit goes with them. Blocks run
again on the way back, so that one block's activations are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pyprune import progress as bars
from pyprune.discovery.groups import Group
from pyprune.errors import PyPruneError
from pyprune.importance.aggregation import AGGREGATIONS, scored_members
from pyprune.importance.blocks import NotSweepable, find_blocks
from pyprune.importance.calibration import Calibration, single_rows
from pyprune.importance.divergence import pieces, real_tokens, scored
from pyprune.importance.inputs import InputTaps, read_product, with_input
from pyprune.importance.recomputing import recomputed
from pyprune.importance.steps import Forward, make_steps
from pyprune.importance.taps import GradientTap, Key
from pyprune.importance.walk import walking

STEP_TOKENS = 512  # in one pass, at most
LOGIT_BYTES = 128 << 20  # that their logits take as float32; there is a gradient of that size, too
Sink = Callable[[Key, int, Tensor, Tensor], None]


def score_tokens(
    model: nn.Module, groups: Sequence[Group], parameters: Mapping[str, nn.Parameter],
    calibration: Calibration, aggregation: str, seed: int, details: dict[str, Any],
) -> dict[str, Tensor]:  # fmt: skip
    """Group name -> float64 scores [outer, units], nats^2; the formula is that of ``criteria/token_fisher.py``.

    Args:
        seed: of the labels, which are drawn from the model's own distributions.

    Raises:
        PyPruneError: a group that no linear layer reads as inputs; logits or gradients with NaN or infinity.
    """
    matrices = {n: p for n, p in parameters.items() if p.dim() in (2, 3)}
    device = next(model.parameters()).device
    rows = single_rows(calibration)
    steps = make_steps(rows, device, tokens=_step_tokens(model))
    random = torch.Generator().manual_seed(seed)
    sums = _Sums(groups, matrices)
    tokens = 0
    with walking(model, matrices), torch.enable_grad():
        forward = Forward(model)
        forward.around = lambda: _Sensing(matrices, sums.add)
        try:
            blocks = find_blocks(model)
        except NotSweepable as reason:
            blocks = []
            details["engine"] = f"the model as a whole: {reason}"
        else:
            details["engine"] = "blocks run again on the way back"
        for step in bars.track(steps, "scoring"):
            with recomputed(forward, blocks) if blocks else nullcontext():
                logits = scored(forward(step), real_tokens(step))
                if not bool(logits.isfinite().all()):
                    raise _not_finite(type(model).__name__, "gives logits")
                if logits.requires_grad:
                    torch.autograd.backward(logits, _drawn_seed(logits, random))
            tokens += len(logits)
    combine = AGGREGATIONS[aggregation]
    return {name: combine(values / tokens) for name, values in sums.found().items()}


def _step_tokens(model: nn.Module) -> int:
    named = getattr(model, "get_output_embeddings", None)
    weight = getattr(named() if callable(named) else None, "weight", None)
    return STEP_TOKENS if weight is None else min(STEP_TOKENS, max(1, LOGIT_BYTES // (4 * len(weight))))


def _not_finite(where: str, what: str) -> PyPruneError:
    hint = "Load the model in float32 or bfloat16, and look at the calibration text."
    return PyPruneError("model", where, f"{what} with NaN or infinity", hint)


def _added_up(p: Tensor) -> Tensor:
    """Running sums along the last dimension, the same bits every time, which a GPU does not promise."""
    return p.cpu().cumsum(-1).to(p.device)


@torch.no_grad()
def _drawn_seed(logits: Tensor, random: torch.Generator) -> Tensor:
    """The gradient of the summed loss of labels that are drawn from logits [tokens, vocabulary]."""
    seed, row = torch.empty_like(logits), 0
    for piece in pieces(logits):
        p = piece.softmax(-1, dtype=torch.promote_types(piece.dtype, torch.float32))
        level = torch.rand(len(p), 1, generator=random).to(p)
        labels = (_added_up(p) < level).sum(-1, keepdim=True).clamp_max(p.shape[-1] - 1)
        seed[row : row + len(p)] = p.scatter_add_(1, labels, p.new_full((), -1.0).expand_as(labels))
        row += len(p)
    return seed


class _Sums:
    """Sums over tokens of the square of what comes together at a unit.

    Args:
        groups: scored.
        matrices: that may read their units.
    """

    def __init__(self, groups: Sequence[Group], matrices: Mapping[str, nn.Parameter]) -> None:
        self._groups = groups
        self._places: dict[tuple[str, int], list[tuple[str, int, Tensor]]] = {}
        self._sums: dict[str, dict[int, Tensor]] = {g.name: {} for g in groups}
        for group in groups:
            for number, member in enumerate(scored_members(group)):
                if member.tensor in matrices:
                    at = torch.from_numpy(member.index.positions().copy()).to(matrices[member.tensor].device)
                    self._places.setdefault((member.tensor, member.dim), []).append((group.name, number, at))

    def add(self, key: Key, dim: int, x: Tensor, dx: Tensor) -> None:
        """``x`` [..., inputs] entered a matrix whose inputs lie along ``dim``, and ``dx`` came back."""
        places = self._places.get((key.name, dim), [])
        if not places:
            return
        wide = torch.promote_types(x.dtype, torch.float32)
        both = (x.to(wide) * dx.to(wide)).reshape(-1, x.shape[-1])
        for name, number, at in places:
            found = both[:, at].sum(-1).square().sum(0, dtype=torch.float64)
            into = self._sums[name]
            into[number] = into[number] + found if number in into else found

    def found(self) -> dict[str, Tensor]:
        """Group name -> [members that were read, outer, units]."""
        out = {}
        for group in self._groups:
            by_member = self._sums[group.name]
            if not by_member:
                problem = f"reads what enters linear layers, and none is entered by the units of {group.name}"
                raise PyPruneError("criterion", "token_fisher", problem, "Choose among the roles kv_heads and ffn.")
            out[group.name] = torch.stack([v for _, v in sorted(by_member.items())]).cpu()
            if not bool(out[group.name].isfinite().all()):
                raise _not_finite(group.name, "has gradients")
        return out


class _Sensing(InputTaps):
    """Within it, as a context manager, what enters watched matrices goes to ``sink`` on the way back, with its
    gradient."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], sink: Sink) -> None:
        super().__init__(parameters)
        self._dims = {n: p.dim() for n, p in parameters.items()}
        self._sink = sink

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = read_product(func, args, kwargs)
        key, turned = (None, False) if found is None else self._find(found[1])
        if found is None or key is None or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        x, transposed = found[0], found[3] != turned
        dim = self._dims[key.name] - (2 if transposed else 1)
        # Where nothing in front is watched, nothing else asks for a gradient.
        asking = x if x.requires_grad else x.detach().requires_grad_()
        tapped = GradientTap.apply(asking, lambda x, dx: self._sink(key, dim, x, dx))
        args, kwargs = with_input(args, kwargs, x, tapped)
        return func(*args, **kwargs)
