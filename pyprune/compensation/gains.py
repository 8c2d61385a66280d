"""Gains: a number for each channel that a matrix reads, so that the whole model says again what the dense one says.

Refits fit every layer to its own output. What they miss of it makes outputs smaller than they were, and what layers
miss together no layer sees. Here every input of every matrix of a decoder block is multiplied by one number. All of
them together minimise the divergence of the model's next-token distributions from the dense model's,

    min over g   sum_t KL(p_t || q_t(g)),

by Adam (Kingma and Ba 2015, algorithm 1) over the samples that are not held out. There are no labels: p is what the
dense model says. The held-out samples decide whether the gains stay, with the weights as they would be, rounded. Then
the weights take them in: the model on disk has no trace of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyprune import progress as bars
from pyprune.compensation.cache import LIMIT, Folder, SumsCache
from pyprune.compensation.checks import check_samples
from pyprune.compensation.gather import split_rows
from pyprune.compensation.reconstruction import share_of_step
from pyprune.errors import PyPruneError
from pyprune.importance.blocks import NotSweepable, find_blocks
from pyprune.importance.calibration import Calibration, check_vocabulary
from pyprune.importance.divergence import divergence, divergence_and_seed, real_tokens, scored, summary
from pyprune.importance.fingerprint import fingerprint_of_model
from pyprune.importance.inputs import InputTaps, read_product, with_input
from pyprune.importance.modes import in_memory, own_modes
from pyprune.importance.recomputing import recomputed
from pyprune.importance.rehearsal import few_tokens
from pyprune.importance.scoring import scoring_state
from pyprune.importance.steps import Forward, Step, make_steps
from pyprune.importance.words import likely, narrowed

TOP = 128  # of the dense model's most likely tokens that are kept for each token
STEP_TOKENS = 1024  # for one step of the gains, about
PASS_TOKENS = 512  # in one pass through the model on the CPU, where logits would be most of the memory
STEPS = 48  # at least; a small calibration is gone through more than once
RATE = 0.01  # the largest step of a gain
DECAYS = (0.9, 0.95)  # beta_1 and beta_2
BOUNDS = (0.5, 2.0)


@dataclass
class Reference:
    """What the dense model says about a calibration.

    Attributes:
        steps: samples, some of them held out.
        held: which are.
        said: for each step, :func:`pyprune.importance.divergence.summary` of the tokens that count.
        words: which tokens of a large vocabulary take part (:mod:`pyprune.importance.words`), or None for all.
    """

    steps: list[Step]
    held: list[bool]
    said: list[tuple[Tensor, Tensor]]
    words: Tensor | None = None


@dataclass
class Gains:
    """What was found.

    Attributes:
        before: held-out divergence from the dense model, nats a token.
        after: the same with the gains.
        kept: whether they were taken into the weights.
        values: matrix -> the gain of each of its inputs, float32 [inputs].
        note: why there are none, or None.
    """

    before: float | None = None
    after: float | None = None
    kept: bool = False
    values: dict[str, Tensor] = field(default_factory=dict)
    note: str | None = None

    def figures(self) -> dict[str, Any]:
        """All but the values, JSON-serialisable."""
        return {"before": self.before, "after": self.after, "kept": self.kept, "note": self.note}

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable: of each matrix's values the least, the mean and the greatest."""
        spread = {n: [float(x) for x in (v.min(), v.mean(), v.max())] for n, v in self.values.items()}
        return {**self.figures(), "values": spread}


@torch.no_grad()
def reference(
    model: nn.Module, calibration: Calibration, cache: str | Path | Folder | None = None, cache_limit: float = LIMIT
) -> Reference:
    """What ``model``, the dense one, says about every sample: 1 KiB a token.

    Args:
        cache: folder where it stays for another cut of the same model, calibrated on the same text.
        cache_limit: as in :func:`pyprune.compensation.compensate`.

    Raises:
        PyPruneError: it gives NaN or infinity, there is one sample only, or a token id is not in its vocabulary.
    """
    model = in_memory(model)
    device = next(model.parameters()).device
    check_samples(calibration, "gains", gains=True)
    check_vocabulary(calibration, model)
    size = PASS_TOKENS if device.type == "cpu" else STEP_TOKENS
    fit, out = (make_steps(rows, device, tokens=size) for rows in split_rows(calibration))
    steps, held = [*fit, *out], [False] * len(fit) + [True] * len(out)
    kept = SumsCache(cache, cache_limit, lambda: [fingerprint_of_model(model), [s.inputs for s in steps], TOP])
    found = kept.weights("what the model says")
    if found is None:
        said, words = _asked(model, steps)
        tensors = {f"{j}.{i}": t for j, pair in enumerate(said) for i, t in enumerate(pair)}
        kept.keep_weights("what the model says", {}, tensors if words is None else {**tensors, "words": words})
        return Reference(steps, held, said, words)
    tensors = {n: t.to(device) for n, t in found[1].items()}
    return Reference(
        steps, held, [(tensors[f"{j}.0"], tensors[f"{j}.1"]) for j in range(len(steps))], tensors.get("words")
    )


def _asked(model: nn.Module, steps: Sequence[Step]) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
    """``said`` and ``words`` of a :class:`Reference`."""
    said, forward = [], Forward(model)
    with scoring_state(model, {}), torch.no_grad():
        words = likely(forward, steps)
        narrow = narrowed(model, words)
        forward.around = lambda: narrow
        for step in bars.track(steps, "what the dense model says"):
            logits = scored(forward(step), real_tokens(step))
            if not bool(logits.isfinite().all()):
                hint = "Load the model in float32 or bfloat16, and look at the calibration text."
                raise PyPruneError("model", type(model).__name__, "gives logits with NaN or infinity", hint)
            said.append(summary(logits, TOP))
    return said, words


@own_modes()
def fit_gains(
    model: nn.Module,
    dense: Reference,
    cache: str | Path | Folder | None = None,
    cache_limit: float = LIMIT,
) -> Gains:
    """Multiply the matrices of ``model`` **in place** by the gains, where these bring it nearer to the dense model.

    Args:
        model: pruned, of any shapes; its weights in memory.
        dense: of the model that it was.
        cache: folder where gains that were found stay for the same model and text.
        cache_limit: as in :func:`pyprune.compensation.compensate`.
    """
    model = in_memory(model)
    kept = SumsCache(cache, cache_limit, lambda: [fingerprint_of_model(model), _key(dense)])
    with scoring_state(model, {}):
        try:
            fit = _Fit(model, dense, kept)
            known = kept.weights("gains")
            found = fit.run() if known is None else Gains(**known[0], values=known[1])
            if known is None:
                kept.keep_weights("gains", found.figures(), found.values)
        except NotSweepable as reason:
            return Gains(note=f"No gains were fitted: {reason}.")
        if found.kept:
            fit.set(found.values)
            fit.fold()
    return found


def _key(dense: Reference) -> list[Any]:
    return [[s.inputs for s in dense.steps], dense.held, [list(pair) for pair in dense.said], dense.words]


class _Scaling(InputTaps):
    """Within it, as a context manager, watched matrices are multiplied by their gains where they are used.

    Args:
        parameters: name -> matrix.
        factors: name -> its gains, float32 [inputs].
        rounded: multiply the matrices, as the weights will be in the end, and not what enters them.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], factors: Mapping[str, Tensor], rounded: bool
    ) -> None:  # fmt: skip
        super().__init__(parameters)
        self._factors, self._rounded = factors, rounded

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = read_product(func, args, kwargs)
        key = None if found is None else self._find(found[1])[0]
        if found is not None and key is not None and key.name in self._factors:
            x, weight, _, transposed = found
            by = self._factors[key.name]
            if self._rounded:
                rounded = (weight * (by[:, None] if transposed else by)).to(weight.dtype)
                args, kwargs = with_input(args, kwargs, weight, rounded)
            else:
                args, kwargs = with_input(args, kwargs, x, x * by.to(x.dtype))
        return func(*args, **kwargs)


class _Fit:
    """Args: as of :func:`fit_gains`. Raises NotSweepable: no decoder blocks, or none that text passes."""

    def __init__(self, model: nn.Module, dense: Reference, kept: SumsCache) -> None:
        self.dense, self.forward, self.blocks, self.kept = dense, Forward(model), find_blocks(model), kept
        inside = {id(p) for block in self.blocks for p in block.parameters()}
        watched = {n: p for n, p in model.named_parameters() if id(p) in inside and p.dim() == 2}
        dims = kept.answer("dims", lambda: self._input_dims(watched))
        self.dims = {n: dims[n] for n in watched if n in dims}
        if not self.dims:
            raise NotSweepable("text passes no matrix of the longest list of blocks")
        self.matrices = {n: watched[n] for n in self.dims}
        self.factors = {
            n: torch.ones(p.shape[self.dims[n]], device=p.device).requires_grad_() for n, p in self.matrices.items()
        }
        self.narrow = narrowed(model, dense.words)
        self.rounded = False
        self.forward.around = self._around

    @contextmanager
    def _around(self) -> Iterator[None]:
        with self.narrow, _Scaling(self.matrices, self.factors, self.rounded):
            yield

    @torch.no_grad()
    def _input_dims(self, watched: Mapping[str, nn.Parameter]) -> dict[str, int]:
        """Of the matrices that text passes: along which dimension inputs lie."""
        few = few_tokens(self.dense.steps[0].inputs, self.dense.steps[0].targets.device)
        with InputTaps(watched) as taps:
            self.forward(few)
        return {u.key.name: u.input_dim(2) for u in taps.uses if u.key.expert is None}

    def run(self) -> Gains:
        """Fit the gains, and measure; the weights stay as they are.

        Raises:
            NotSweepable: no gradient reaches the gains.
        """
        held = [j for j, out in enumerate(self.dense.held) if out]
        fit = [j for j, out in enumerate(self.dense.held) if not out]
        before = self._divergence(held)
        if not math.isfinite(before):
            return Gains(note="No gains were fitted: the pruned model gives NaN or infinity.")
        refused = self._refused(held[:1])
        if refused is not None:
            return Gains(before, note=f"Gains were left out: {refused}.")
        self._descend(fit)
        self.rounded = True
        after = self._divergence(held)
        self.rounded = False
        if not math.isfinite(after):
            return Gains(before, note="Gains were left out: with them the model gives NaN or infinity.")
        return Gains(before, after, after < before, {n: f.detach() for n, f in self.factors.items()})

    @torch.no_grad()
    def _refused(self, numbers: Sequence[int]) -> str | None:
        """Why the model does not compute with multiplied weights what it does with multiplied inputs of them, or None.

        Tried with gains of 2, half of the matrices at a time, that no weight is rounded by. A matrix whose doubled
        weights its type does not hold (float16 ends at 65,504) stays as it is.
        """
        double = [float(p.abs().max()) <= torch.finfo(p.dtype).max / 2 for p in self.matrices.values()]
        for turn in (0, 1):
            for i, factors in enumerate(self.factors.values()):
                factors.fill_(1.0 + (double[i] and i % 2 == turn))
            wanted = self._divergence(numbers)
            self.fold()
            try:
                given = self._folded(numbers)
            finally:
                for factors in self.factors.values():
                    factors.reciprocal_()
                self.fold()
                for factors in self.factors.values():
                    factors.fill_(1.0)
            if not (math.isfinite(given) and math.isfinite(wanted)):
                return "with weights twice as large, on trial, the model gives NaN or infinity"
            if not abs(given - wanted) <= 1e-3 * wanted + 1e-6:
                return "the weights are used by more than matrix products"
        return None

    def _folded(self, numbers: Sequence[int]) -> float:
        """The divergence without gains, which the weights have taken in."""
        kept = {n: f.clone() for n, f in self.factors.items()}
        for factors in self.factors.values():
            factors.fill_(1.0)
        try:
            return self._divergence(numbers)
        finally:
            self.set(kept)

    def _descend(self, numbers: Sequence[int]) -> None:
        counts = [len(self.dense.said[j][0]) for j in numbers]
        together = max(1, round(STEP_TOKENS * len(counts) / sum(counts)))  # passes for a step
        each = math.ceil(len(numbers) / together)
        rounds = math.ceil(STEPS / each)
        adam = torch.optim.Adam(self.factors.values(), lr=RATE, betas=DECAYS)
        course = torch.optim.lr_scheduler.LambdaLR(adam, lambda k: share_of_step((k + 1) / (rounds * each)))
        random = torch.Generator().manual_seed(0)
        with bars.bar("fitting gains", rounds * each) as bar:
            for _ in range(rounds):
                for chosen in torch.randperm(len(numbers), generator=random).split(together):
                    tokens = sum(counts[k] for k in chosen.tolist())
                    for k in chosen.tolist():
                        self._backward(numbers[k], 1 / tokens)
                    adam.step()
                    adam.zero_grad()
                    course.step()
                    with torch.no_grad():
                        for factors in self.factors.values():
                            factors.clamp_(*BOUNDS)
                    bar.advance()

    def _backward(self, number: int, factor: float) -> None:
        """Add the gradient of ``factor`` times a step's divergence."""
        step = self.dense.steps[number]
        with recomputed(self.forward, self.blocks):
            logits = scored(self.forward(step), real_tokens(step))
            if not logits.requires_grad:
                raise NotSweepable("no gradient passes its blocks")
            _, seed = divergence_and_seed(logits, *self.dense.said[number], factor)
            torch.autograd.backward(logits, seed)

    @torch.no_grad()
    def _divergence(self, numbers: Sequence[int]) -> float:
        """Mean over the tokens of some steps, nats."""
        total = tokens = 0.0
        for j in numbers:
            step, said = self.dense.steps[j], self.dense.said[j]
            total += divergence(scored(self.forward(step), real_tokens(step)), *said)
            tokens += len(said[0])
        return total / tokens

    @torch.no_grad()
    def set(self, values: Mapping[str, Tensor]) -> None:
        """Take these gains."""
        for name, given in values.items():
            self.factors[name].copy_(given)

    @torch.no_grad()
    def fold(self) -> None:
        """Multiply the weights by the gains."""
        for name, p in self.matrices.items():
            by = self.factors[name]
            p.mul_(by[None, :] if self.dims[name] == 1 else by[:, None])
