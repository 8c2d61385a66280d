"""What whole decoder layers, or their attention or FFN alone, are worth: their influence on the stream, or what the
loss says when they are left out.

A layer is left out in a trial by handing on the residual stream that entered it, a sub-block by zeros in place of what
it gives. Nothing is changed in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from pyprune import progress as bars
from pyprune.discovery.groups import Group
from pyprune.errors import PyPruneError, unknown_name
from pyprune.importance.blocks import Call, NotSweepable, intercepted, like, stream_of, with_new_stream
from pyprune.importance.calibration import Calibration, check_vocabulary, load_calibration
from pyprune.importance.losses import IGNORED
from pyprune.importance.modes import in_memory
from pyprune.importance.scores import Scores
from pyprune.importance.steps import Forward, Step, make_steps
from pyprune.importance.walk import walking

LAYER_CRITERIA = ("block_influence", "perplexity")
STEP_TOKENS = 1024  # tokens in one forward pass, at least a batch: its logits are all in memory


def check_layer_criterion(name: str) -> str:
    """``name``, when it is known; raises PyPruneError otherwise."""
    if name not in LAYER_CRITERIA:
        raise unknown_name("layer_criterion", name, LAYER_CRITERIA)
    return name


def score_layers(
    model: nn.Module,
    group: Group,
    batches: Any,
    count: int,
    criterion: str = "block_influence",
    protected: Sequence[int] = (),
    *,
    progress: bool | None = None,
) -> Scores:
    """Which ``count`` decoder layers, or sub-blocks of layers, go first, and what each is worth.

    ``block_influence`` is one minus the mean cosine between what enters a layer and what leaves it, over calibration
    tokens (padding left out); the layers of least influence go, all at once:

        BI_i = 1 - mean_t  x_t . y_t / (|x_t| |y_t|)

    Men et al. 2024, "ShortGPT" (arXiv 2403.03853), equation 1. One forward pass. Of a sub-block, x_t is what leaves its
    layer without it; each layer is run twice then.

    ``perplexity`` removes one layer after the other, each time the one without which the calibration loss (nats per
    token; the mean over samples) is least: Song et al. 2024, "SLEB" (arXiv 2402.09025). ``count`` rounds
    of one forward pass for each layer still there, from that layer on.

    Args:
        model: a causal LM; it is left as it was.
        group: of role ``layers`` or ``sublayers`` (:func:`pyprune.selection.layers.sublayers`).
        batches: what :func:`pyprune.importance.calibration.load_calibration` reads without a tokenizer.
        count: how many go.
        criterion: one of :data:`LAYER_CRITERIA`.
        protected: numbers of layers that stay.
        progress: False silences the bar; None leaves it to :mod:`pyprune.progress`.

    Returns:
        Scores of the one group, float32 [1, units]: the influence; or the loss without the layer minus the whole
        model's, in the round in which the layer went (of those that stay, in the last round; protected ones have the
        largest value). ``details["removed"]`` has the layers in the order in which they go, ``details["calibration"]``
        what was read; for ``perplexity`` also ``details["loss"]`` of the whole model and ``details["losses"]`` after
        each removal.

    Raises:
        PyPruneError: too many layers, an unfit calibration, NaN or infinity behind a layer (it is named), or layers
            that are not called once each with a residual stream.
    """
    check_layer_criterion(criterion)
    tried = [i for i in range(group.units) if i not in set(protected)]
    if not 1 <= count <= len(tried) or count >= group.units:
        most = min(len(tried), group.units - 1)
        raise PyPruneError("remove_layers", count, f"is not between 1 and {most}", "Ask for fewer.")
    model = in_memory(model)
    calibration = load_calibration(batches)
    check_vocabulary(calibration, model)
    trial = _Trial(model, group, calibration)
    details: dict[str, Any] = {"criterion": criterion, "calibration": calibration.to_dict()}
    with bars.shown(progress is not False), walking(model, {}), torch.no_grad():
        try:
            if criterion == "block_influence":
                values = trial.influence()
                order = sorted(tried, key=lambda i: (float(values[i]), -i))
                details["removed"] = order[:count]
            else:
                values = trial.greedy(tried, count, details)
        except NotSweepable as reason:
            hint = "Choose layers by hand: widths with layers=N and scores, or cut widths only."
            raise PyPruneError("remove_layers", count, f"cannot be tried on this model: {reason}", hint) from None
    return Scores({group.name: values.float().reshape(1, -1)}, criterion, details)


@contextmanager
def without_layers(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Within it these blocks give back the residual stream that enters them; they run all the same, for the form."""

    def handler(j: int, given: Tensor, call: Call, rest: list[Any]) -> Any:
        return with_new_stream(call(given), given)

    with intercepted(list(blocks), handler):
        yield


@contextmanager
def silenced(parts: Sequence[nn.Module], which: Callable[[int], bool] = lambda i: True) -> Iterator[None]:
    """Within it these modules give zeros in place of the tensor, or of the first of a tuple, that they give.

    Args:
        which: asked with a module's number at every call: whether it does now.
    """

    def hook(i: int) -> Any:
        return lambda module, arguments, out: (
            with_new_stream(out, torch.zeros_like(stream_of(out))) if which(i) else None
        )

    handles = [part.register_forward_hook(hook(i)) for i, part in enumerate(parts)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Trial:
    """Forward passes over calibration with some of the layers, or some of their sub-blocks, left out.

    Attributes:
        blocks: the decoder layer of every unit.
        parts: the sub-block of every unit; empty where units are layers.
        silent: units whose sub-blocks give zeros now.
    """

    def __init__(self, model: nn.Module, group: Group, calibration: Calibration) -> None:
        self.names = group.modules
        inner = group.role == "sublayers"
        homes = [name.rpartition(".")[0] for name in group.modules] if inner else group.modules
        self.blocks = [model.get_submodule(name) for name in homes]
        self.parts = [model.get_submodule(name) for name in group.modules] if inner else []
        self.silent: set[int] = set()
        if len({id(block) for block in self.blocks}) < len(self.blocks):
            raise PyPruneError("remove_layers", None, "layers of this model share modules", "Cut widths only.")
        self.forward = Forward(model)
        device = next(model.parameters()).device
        self.steps = make_steps(calibration, device, tokens=STEP_TOKENS)
        self.samples = calibration.samples
        self.forms: dict[int, Callable[[Tensor], Any]] = {}  # layer -> how it returns a stream

    def influence(self) -> Tensor:
        """Block influence, float64 [layers]."""
        total = torch.zeros(len(self.blocks), dtype=torch.float64)
        tokens = 0.0
        with bars.bar("block influence", len(self.steps)) as bar:
            for step in self.steps:
                counted = _tokens_of(step)
                tokens += float(counted.sum())

                def compare(j: int, given: Tensor, out: Tensor, call: Call, counted: Tensor = counted) -> None:
                    if self.parts:
                        self.silent = {j}
                        given = stream_of(call(given))
                        self.silent = set()
                    if given.shape != out.shape or given.shape[:2] != counted.shape:
                        raise NotSweepable("a layer changes the shape of the residual stream")
                    cosine = cosine_similarity(given.double(), out.double(), dim=-1)
                    total[j] += float((cosine * counted).sum())

                self._streams(step, (), compare)
                bar.advance()
        return 1 - total / tokens

    def greedy(self, tried: Sequence[int], count: int, details: dict[str, Any]) -> Tensor:
        """Loss increases, float64 [layers]; fills in ``removed``, ``loss`` and ``losses``."""
        gone: list[int] = []
        losses: list[float] = []
        values = torch.zeros(len(self.blocks), dtype=torch.float64)
        rounds = sum(len(tried) - done for done in range(count))
        with bars.bar("leaving layers out", rounds * len(self.steps)) as bar:
            for done in range(count):
                left = [i for i in tried if i not in gone]
                dense, without = self._losses(left, gone, bar)
                if not done:
                    details["loss"] = dense
                for i, loss in without.items():
                    values[i] = loss - details["loss"]
                least = min(left, key=lambda i: (without[i], -i))
                gone.append(least)
                losses.append(without[least])
        for i in set(range(len(self.blocks))) - set(tried):
            values[i] = values[list(tried)].max()
        details.update(removed=gone, losses=losses)
        return values

    def _losses(self, candidates: Sequence[int], gone: Sequence[int], bar: bars.Bar) -> tuple[float, dict[int, float]]:
        """Mean loss without ``gone``, and without each candidate besides."""
        base, without = 0.0, dict.fromkeys(candidates, 0.0)
        for step in self.steps:
            streams: dict[int, Tensor] = {}

            def remember(j: int, given: Tensor, out: Tensor, call: Call, streams: dict[int, Tensor] = streams) -> None:
                streams[j] = given

            logits = self._streams(step, gone, remember)
            base += self._summed(logits, step, None)
            for i in candidates:
                without[i] += self._summed(self._from(step, i, gone, streams[i]), step, i)
                bar.advance()
        return base / self.samples, {i: total / self.samples for i, total in without.items()}

    def _streams(self, step: Step, gone: Sequence[int], seen: Callable[[int, Tensor, Tensor, Call], None]) -> Tensor:
        """One forward pass without ``gone``: ``seen(unit, what enters its layer, what leaves, the layer)`` for every
        other unit; the logits."""
        calls: list[int] = []

        def handler(j: int, given: Tensor, call: Call, rest: list[Any]) -> Any:
            calls.append(j)
            if j in gone:
                return call(given) if self.parts else self.forms[j](given)
            out = call(given)
            y = stream_of(out)
            self.forms[j] = like(out)
            if not bool(y.isfinite().all()):
                hint = "Load the model in float32 or bfloat16, and look at the calibration text."
                raise PyPruneError("model", self.names[j], "gives NaN or infinity on the calibration text", hint)
            seen(j, given, y, call)
            return out

        self.silent = set(gone)
        with intercepted(self.blocks, handler), silenced(self.parts, lambda i: i in self.silent):
            logits = self.forward(step)
        if calls != list(range(len(self.blocks))):
            raise NotSweepable("its layers are not called once each in their order")
        return logits

    def _from(self, step: Step, first: int, gone: Sequence[int], stream: Tensor) -> Tensor:
        """Logits without units ``first`` and ``gone``, where ``stream`` is what enters the layer of ``first``."""

        def handler(j: int, given: Tensor, call: Call, rest: list[Any]) -> Any:
            x = stream if j == first else given
            stays = self.parts or j not in (first, *gone)
            return call(x) if j >= first and stays else self.forms[j](x)

        self.silent = {first, *gone}
        with intercepted(self.blocks, handler), silenced(self.parts, lambda i: i in self.silent):
            return self.forward(step)

    def _summed(self, logits: Tensor, step: Step, layer: int | None) -> float:
        """Sum over samples of the mean loss of a sample's own tokens."""
        total = 0.0
        for row, wanted in zip(logits, step.targets.to(logits.device), strict=True):
            total += float(cross_entropy(row.float(), wanted, ignore_index=IGNORED).double())
        if total != total or total == float("inf"):
            problem = "is NaN or infinite on the calibration text"
            where = "the loss" if layer is None else f"the loss without {self.names[layer]}"
            raise PyPruneError("model", where, problem, "Load the model in float32 or bfloat16.")
        return total


def _tokens_of(step: Step) -> Tensor:
    """1 for a token, 0 for padding: float64 [batch, length]."""
    mask = step.inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == step.targets.shape:
        return (mask != 0).double()
    return torch.ones(step.targets.shape, dtype=torch.float64, device=step.targets.device)
