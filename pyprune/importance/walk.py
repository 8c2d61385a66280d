"""A model taken block by block, forward only: one block at a time is run on what the blocks before it give.

The residual stream in front of the current block is kept for every step, so a block may be run several times, changed
in between, before the walk goes on; what follows then sees the changed block.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyprune import ops
from pyprune.errors import PyPruneError
from pyprune.importance.blocks import Call, NotSweepable, find_blocks, intercepted, like, stream_of
from pyprune.importance.inputs import InputTaps, Use
from pyprune.importance.modes import as_written, evaluating
from pyprune.importance.rehearsal import plan_sweep
from pyprune.importance.steps import Forward, Step
from pyprune.importance.taps import experts_one_by_one

log = logging.getLogger(__name__)

TOKEN_WEIGHTS = ("inverse", "sink", "equal")
SAMPLES = 32  # that are looked at for what one does not reach
SINK = 8  # a sequence's first token counts as much as one in so many of its tokens, with weights "sink"


class _Left(Exception):
    """Ends a forward pass behind a block."""


class Walk:
    """A walk over a model's decoder blocks; a model whose blocks cannot be run one by one counts as one block.

    Args:
        model: a causal LM, in evaluation mode.
        steps: the batches.
        known: ``(walk.whole,)`` of an earlier walk over the same model and batches, which spares the trial; None tries.

    Attributes:
        blocks: the decoder blocks in order, or the model itself.
        whole: why the model counts as one block, or None.
    """

    def __init__(self, model: nn.Module, steps: Sequence[Step], known: Sequence[str | None] | None = None) -> None:
        self.steps = list(steps)
        self.whole: str | None = None
        self._forward = Forward(model)
        self._streams: list[Tensor | None] = [None] * len(self.steps)
        self._forms: dict[int, Any] = {}
        if known is not None:
            (self.whole,) = known
            self.blocks = [model] if self.whole is not None else find_blocks(model)
            return
        try:
            self.blocks = self._tried(model)
        except NotSweepable as reason:
            self.whole = str(reason)
            self.blocks = [model]
            log.info("the model is run as a whole: %s", reason)

    def weighting(self, asked: str) -> str:
        """How tokens count then: streams behind blocks, of which ``inverse`` speaks, are seen block by block only."""
        return "equal" if self.whole is not None and asked == "inverse" else asked

    def _tried(self, model: nn.Module) -> list[nn.Module]:
        step = self.steps[0]
        batch = dict(step.inputs)
        if "input_ids" not in batch:
            batch["labels"] = step.targets.roll(1, dims=1)  # which nothing predicts at the end
        with torch.enable_grad():
            return plan_sweep(model, self._forward, {}, batch, step.targets.device).blocks

    @torch.no_grad()
    def run(self, i: int, parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[int, list[Use], Tensor | None]]:
        """Run block ``i`` on every step: (step's number, uses of ``parameters`` in it, the stream that leaves it).

        The stream [batch, length, hidden] is None where the model counts as one block.
        """
        for number, step in enumerate(self.steps):
            with InputTaps(parameters, step.targets.numel()) as taps:
                out = self._through(i, number, step)
            yield number, taps.uses, out
            del taps, out  # before the next step makes its own

    @torch.no_grad()
    def once(self, i: int, parameters: Mapping[str, nn.Parameter]) -> list[Use]:
        """Uses of ``parameters`` in block ``i`` on one sample, in order; what it does not reach, such as an expert that
        none of its tokens goes to, on the next ones."""
        found: list[Use] = []
        for number, step in enumerate(self.steps[:SAMPLES]):
            seen = {use.key.name for use in found}
            with InputTaps(parameters) as taps:
                self._through(i, number, step.part(slice(0, 1)), sample=True)
            found += [use for use in taps.uses if use.key.name not in seen]
            if {use.key.name for use in found} == set(parameters):
                break
        return found

    @torch.no_grad()
    def is_added(self, i: int, weight: nn.Parameter) -> bool:
        """Whether what the matrix gives is added, as it is, to the stream behind block ``i``; tried on a sample."""
        step, watched = self.steps[0].part(slice(0, 1)), {"": weight}
        with InputTaps(watched) as taps:
            whole = self._through(i, 0, step, sample=True)
        if whole is None or len(taps.uses) != 1 or weight.dim() != 2:
            return False
        use, before = taps.uses[0], weight.detach().clone()
        given = use.x @ (before if use.transposed else before.t())
        try:
            weight.zero_()
            without = self._through(i, 0, step, sample=True)
        finally:
            weight.copy_(before)
        if without is None or given.numel() != whole.numel():
            return False
        off = (whole - without - given.reshape(whole.shape)).float().norm()
        return bool(off <= 1e-3 * given.float().norm())

    def stream(self, number: int) -> Tensor:
        """What enters the current block at one step."""
        found = self._streams[number]
        assert found is not None
        return found

    @torch.no_grad()
    def advance(self, i: int) -> None:
        """Go on to the block behind ``i``, as that is now."""
        if self.whole is not None or i == len(self.blocks) - 1:
            return
        for number, step in enumerate(self.steps):
            self._streams[number] = self._through(i, number, step)

    def leave(self, number: int, stream: Tensor | None) -> None:
        """Go on with one step's stream known from :meth:`run`, when the block has not been changed since."""
        if self.whole is None:
            self._streams[number] = stream

    def _through(self, i: int, number: int, step: Step, sample: bool = False) -> Tensor | None:
        if self.whole is not None:
            self._forward(step)
            return None
        left: list[Tensor] = []

        def handler(j: int, given: Tensor, call: Call, rest: list[Any]) -> Any:
            if j < i:
                return self._forms[j](given)
            stream = self._streams[number]
            if sample and stream is not None:
                stream = stream[:1]
            out = call(given if stream is None else stream)
            self._forms[i] = like(out)
            left.append(stream_of(out))
            raise _Left

        with intercepted(self.blocks, handler):
            try:
                self._forward(step)
            except _Left:
                pass
        return left[0]


@contextmanager
def walking(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Evaluation mode, no gradients, stacked experts one by one; everything back as it was afterwards."""
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(experts_one_by_one(model, parameters))
        stack.enter_context(ops.fast_products())
        stack.enter_context(evaluating(model))
        stack.enter_context(as_written())
        try:
            model.requires_grad_(False)
            yield
        finally:
            for p, flag in wanted:
                p.requires_grad_(flag)


def weigh_tokens(step: Step, stream: Tensor | None, how: str) -> Tensor:
    """What each token counts, float32 [tokens of the step]; padding counts nothing.

    Args:
        stream: [batch, length, hidden], what leaves the block.
        how: ``"equal"``: 1. ``"inverse"``: 1 / mean(h^2), h the token's residual stream: the normalisation behind it
            makes what is added there weigh by that, and a few tokens have streams a thousand times as long as others.
            ``"sink"``: the same, and the first token of each sequence times an eighth of the sequence's tokens: all
            others attend to it (Xiao et al., arXiv 2309.17453), so what it loses is lost to each of them.
    """
    weights = torch.ones(step.targets.shape, device=step.targets.device)
    if how != "equal" and stream is not None:
        weights = stream.float().square().mean(-1).clamp_min(torch.finfo(torch.float32).tiny).reciprocal()
    mask = step.inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == step.targets.shape:
        weights = weights * (mask != 0)
    if how == "sink":
        real = weights != 0
        first = real & (real.cumsum(1) == 1)
        weights = torch.where(first, weights * (real.sum(1, keepdim=True) / SINK).clamp_min(1.0), weights)
    return weights.reshape(-1)


def weights_for(x: Tensor, weights: Tensor, tokens: Tensor | None = None) -> Tensor:
    """``weights`` where the rows of ``x`` are the step's tokens; ones where they are others (an expert's).

    Args:
        x: [rows, inputs].
        weights: of the step's tokens, 0 for padding.
        tokens: int64 [rows], which tokens the rows are, where that is known: then they count what those do.
    """
    if tokens is not None:
        return weights[tokens]
    if x.shape[0] == weights.shape[0]:
        return weights
    if not bool((weights != 0).all()):
        problem = "holds padding, and which tokens a layer is given cannot be seen"
        raise PyPruneError("calibration", None, problem, "Give sequences of one length.")
    return weights.new_ones(x.shape[0])
