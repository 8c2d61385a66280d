"""The compensation stage: the output projections of a model take over for the units that a plan removes.

The model is still dense. Block by block, in order, and in a block projection by projection, the inputs that the already
compensated part gives are reduced to a Gram matrix, the projection is refitted, and the columns of removed units become
zero: from there on the model computes what the pruned one will. Slicing afterwards (:func:`pyprune.apply`) drops zero
columns. Projections are found by what a plan's groups cut: a matrix along whose inputs a unit lies.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pyprune import progress as bars
from pyprune.compensation.refit import PENALTIES, Sums, refit
from pyprune.compensation.removal import removed_units
from pyprune.errors import PyPruneError, unknown_name
from pyprune.importance.calibration import Calibration, batch_rows, check_vocabulary, load_calibration, take
from pyprune.importance.inputs import InputTaps, Use
from pyprune.importance.steps import Forward, Step, make_steps
from pyprune.importance.taps import Key
from pyprune.importance.walk import TOKEN_WEIGHTS, Walk, token_weights, walking, weights_for
from pyprune.selection.plan import Cut, Plan

MODES = ("none", "bias", "least-squares", "obs")
TARGETS = ("own", "stream")
STEP_TOKENS = 4096
KEPT_BYTES = 512 * 2**20  # inputs of a block's last projection that are kept, so that the block need not run again
HELD_OUT = 5  # one in so many calibration samples chooses the penalty
INSIDE = ("kv_heads", "query_heads", "qk_dim", "vo_dim", "ffn", "expert_ffn", "latent", "state", "channels")


@dataclass(frozen=True)
class Compensated:
    """One matrix that was compensated: its tensor and expert, inputs kept of how many, calibration rows, and the
    figures of :class:`pyprune.compensation.refit.Refit` (errors are None in mode ``bias``)."""

    tensor: str
    expert: int | None
    kept: int
    of: int
    rows: int
    penalty: float | None = None
    blend: float = 0.0
    before: float | None = None
    after: float | None = None


@dataclass
class Compensation:
    """What was done.

    Attributes:
        mode: ``bias``, ``least-squares`` or ``obs``.
        plan: what to apply now: the plan as given; with mode ``obs``, of the same widths and with other units.
        matrices: one entry for each projection, in the order in which they were compensated.
        notes: what a reader of the result should know, as sentences.
        details: token weights, target, samples that fitted and that chose.
    """

    mode: str
    plan: Plan
    matrices: list[Compensated] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {"mode": self.mode, **self.details, "matrices": [asdict(m) for m in self.matrices], "notes": self.notes}


def compensate(
    model: nn.Module,
    plan: Plan,
    batches: Any,
    mode: str = "least-squares",
    *,
    token_weighting: str = "inverse",
    target: str = "own",
    penalties: Sequence[float] = PENALTIES,
    progress: bool | None = None,
) -> Compensation:
    """Change the weights of ``model`` **in place** so that it loses as little as it can when ``plan`` is applied.

    Modes: ``least-squares`` refits the columns that stay (and the bias, where there is one), by
    :func:`pyprune.compensation.refit.refit`; one in five samples is held out to choose the penalty. ``obs`` first
    chooses anew which units of a matrix's inputs go, as many as ``plan`` says, by what the refit cannot make up for
    (:mod:`pyprune.compensation.removal`), on the inputs that the compensated blocks give; units inside stacked experts
    stay as planned. ``bias`` moves the mean of what the removed columns contributed into the bias (FLAP, arXiv
    2312.11983, section 4.3).

    Args:
        model: dense, of the shapes that ``plan`` speaks of; its weights in memory.
        plan: cuts inside layers, each of them exact.
        batches: calibration: anything that :func:`load_calibration` reads without a tokenizer.
        mode: ``"least-squares"``, ``"obs"`` or ``"bias"``.
        token_weighting: ``"inverse"``: a token counts 1 / mean(h^2), h its residual stream behind the block;
            ``"equal"``. Mode ``bias`` always counts tokens equally, so that the mean is the mean.
        target: what a refit aims at: ``"own"``, the layer's own output with all its columns, on the same inputs;
            ``"stream"``, that output plus what the residual stream behind the block lacks to the dense model's, for
            projections whose output is added to that stream as it is. The held-out error decides between the two and
            half way.
        penalties: values of lam that are tried.
        progress: False silences the progress bar; None leaves it to :mod:`pyprune.progress`.

    Returns:
        What was done, how much it helped on held-out tokens, and the plan to apply.

    Raises:
        PyPruneError: an unknown mode; a plan that removes more than units inside layers; fewer than two samples; no
            bias to move a mean into; weights or activations with NaN or infinity.
    """
    for option, value, known in (
        ("compensation", mode, MODES[1:]), ("token_weights", token_weighting, TOKEN_WEIGHTS),
        ("compensation_target", target, TARGETS),
    ):  # fmt: skip
        if value not in known:
            raise unknown_name(option, value, known)
    check_plan(plan, mode)
    calibration = load_calibration(batches)
    check_samples(calibration, mode)
    check_vocabulary(calibration, model)
    with bars.shown(progress is not False):
        return _Stage(model, plan, calibration, mode, token_weighting, target, penalties).run()


def check_plan(plan: Plan, mode: str) -> None:
    """Raises PyPruneError when ``plan`` cuts what no projection can take over for."""
    for cut in plan.cuts:
        if cut.group.role not in INSIDE or not cut.group.exact:
            problem = f"cannot make up for cuts of {cut.group.role}"
            raise PyPruneError("compensation", mode, problem, "Cut heads and FFN channels only, or use none.")


def check_samples(calibration: Calibration, mode: str) -> None:
    """Raises PyPruneError when there are too few samples to hold one out."""
    if mode != "bias" and calibration.samples < 2:
        hint = "Give more calibration, or split it into samples."
        raise PyPruneError("samples", calibration.samples, "leave none to choose the penalty with", hint)


class _Stage:
    def __init__(
        self, model: nn.Module, plan: Plan, calibration: Calibration, mode: str, weighting: str, target: str,
        penalties: Sequence[float],
    ) -> None:  # fmt: skip
        self.model, self.mode, self.target, self.penalties = model, mode, target, penalties
        self.weighting = "equal" if mode == "bias" else weighting
        self.parameters = dict(model.named_parameters())
        self.cuts = {cut.group.name: cut for cut in plan.cuts}
        self.chosen: set[str] = set()  # groups whose units were chosen anew
        self.gone = _positions(self.cuts.values(), self.parameters)
        self.storages = {p.untyped_storage().data_ptr() for p in self.parameters.values()}  # what may be written to
        self.steps, self.held = _steps(calibration, next(model.parameters()).device, mode)
        self.result = Compensation(mode, plan, details={
            "token_weights": self.weighting, "target": target, "calibration": calibration.to_dict(),
            "held_out_samples": sum(s.rows for s, h in zip(self.steps, self.held, strict=True) if h),
        })  # fmt: skip

    def run(self) -> Compensation:
        matrices = {n: self.parameters[n] for n in self.gone if self.parameters[n].dim() in (2, 3)}
        for name in self.gone:
            if not bool(self.parameters[name].isfinite().all()):
                hint = "Load a checkpoint with sound weights."
                raise PyPruneError("model", name, "holds NaN or infinity", hint)
        if not matrices:
            return self.result
        if self.mode == "bias":
            self._check_biases(matrices)
        with walking(self.model, matrices), torch.no_grad():
            walk = Walk(self.model, self.steps)
            dense = Walk(self.model, self.steps) if self.target == "stream" and walk.whole is None else None
            compensated: set[str] = set()
            with bars.bar("compensating", len(walk.blocks)) as bar:
                for i, block in enumerate(walk.blocks):
                    inside = {id(p) for p in block.parameters()}
                    here = {n: p for n, p in matrices.items() if id(p) in inside}
                    if dense is not None:
                        for number, _, out in dense.run(i, {}):
                            dense.leave(number, out)
                    order = self._projections(walk, i, here)
                    self._mask_others({n for n in self.gone if id(self.parameters[n]) in inside}, set(order))
                    left = False
                    for name in order:
                        left = self._compensate(walk, dense, i, name, last=name == order[-1])
                    compensated |= set(order)
                    if not left:
                        walk.advance(i)
                    bar.advance()
        self._note(compensated)
        self.result.plan = Plan(tuple(self.cuts.values()), self.result.plan.details)
        return self.result

    def _check_biases(self, matrices: Mapping[str, nn.Parameter]) -> None:
        """Before anything is changed: some matrix whose inputs the plan cuts has a bias."""
        with walking(self.model, matrices), torch.no_grad(), InputTaps(matrices) as taps:
            Forward(self.model)(self.steps[0].part(slice(0, 1)))
        for use in taps.uses:
            if (
                self._bias_of(use) is not None
                and use.input_dim(matrices[use.key.name].dim()) in self.gone[use.key.name]
            ):
                return
        problem = "needs output projections with a bias, and this model has none where units go"
        raise PyPruneError("compensation", self.mode, problem, "Use least-squares.")

    def _bias_of(self, use: Use) -> Tensor | None:
        """The bias of a use, where it is a parameter that can be written to."""
        own = use.bias is not None and use.bias.untyped_storage().data_ptr() in self.storages
        return use.bias if own else None

    def _projections(self, walk: Walk, i: int, here: Mapping[str, nn.Parameter]) -> list[str]:
        """Names of the matrices whose inputs the plan cuts, in the order in which block ``i`` uses them."""
        if not here:
            return []
        uses = walk.once(i, here)
        found = [u.key.name for u in uses if u.input_dim(here[u.key.name].dim()) in self.gone[u.key.name]]
        return list(dict.fromkeys(found))

    def _mask_others(self, names: set[str], refitted: set[str]) -> None:
        """Zero what goes with units that no projection of the block reads, such as dimensions of queries and keys."""
        for cut in self.cuts.values():
            if any(m.tensor in refitted for m in cut.group.members):
                continue
            for tensor, dim, positions in cut.removed_positions():
                if tensor in names:
                    p = self.parameters[tensor]
                    p.index_fill_(dim, torch.from_numpy(positions).to(p.device), 0.0)

    def _compensate(self, walk: Walk, dense: Walk | None, i: int, name: str, last: bool) -> bool:
        """Compensate one matrix. True where the walk has left the block with that: ``last`` is the block's last matrix,
        and what the change of it adds to the stream was added without running the block again."""
        p = self.parameters[name]
        keeps = last and walk.whole is None and p.dim() == 2 and self._input_bytes(walk, p) <= KEPT_BYTES
        is_added = (dense is not None or keeps) and walk.is_added(i, p)
        added, keeps = is_added and dense is not None, is_added and keeps
        kept: list[Tensor] = []
        before = p.detach().clone() if keeps else None
        train: dict[Key, Sums] = {}
        held: dict[Key, Sums] = {}
        biases: dict[Key, Tensor] = {}
        shift: Tensor | None = None  # the bias before
        transposed = False
        for number, uses, stream in walk.run(i, {name: p}):
            weights = token_weights(walk.steps[number], stream, self.weighting)
            for use in uses:
                transposed = use.transposed
                x, wanted = use.x, None
                bias = self._bias_of(use)
                if bias is not None:
                    biases[use.key] = bias
                    shift = bias.clone() if shift is None else shift
                    x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
                if added and dense is not None and stream is not None:
                    wanted = _target(use, p, dense.stream(number), stream)
                part = held if self.held[number] else train
                for sums in (train, held):
                    if use.key not in sums:
                        wide = torch.promote_types(x.dtype, torch.float32)
                        sums[use.key] = Sums(x.new_zeros(x.shape[1], x.shape[1], dtype=wide))
                part[use.key].add(x, weights_for(x, weights, use.tokens), wanted)
            if keeps:
                kept.append(uses[0].x)
                walk.leave(number, stream)
        dim = p.dim() - 2 if transposed else p.dim() - 1
        if self.mode == "obs" and p.dim() == 2:
            self._choose(name, dim, p.t() if transposed else p, biases.get(Key(name)), train[Key(name)])
        gone = self.gone[name][dim]
        for key in sorted(train, key=lambda k: k.expert or 0):
            matrix = p if key.expert is None else p[key.expert]
            self._write(key, matrix.t() if transposed else matrix, gone, biases.get(key), train[key], held[key])
        untouched = range(p.shape[0]) if p.dim() == 3 else []
        for expert in untouched:  # experts that no token reached
            if Key(name, expert) not in train:
                (p[expert].t() if transposed else p[expert])[:, torch.from_numpy(gone).to(p.device)] = 0
        if before is not None:
            change = p.t() - before.t() if transposed else p - before
            offset = None if shift is None else biases[Key(name)] - shift
            for number, x in enumerate(kept):
                stream = walk.stream(number)
                stream += linear(x, change, offset).reshape(stream.shape)
        return before is not None

    def _input_bytes(self, walk: Walk, p: nn.Parameter) -> int:
        """Bytes of a projection's inputs over all steps, at most."""
        return sum(s.targets.numel() for s in walk.steps) * max(p.shape) * p.element_size()

    def _choose(self, name: str, dim: int, matrix: Tensor, bias: Tensor | None, train: Sums) -> None:
        """Choose anew which units go of the groups along a matrix's inputs, as many of each as were planned."""
        gram, weight = train.gram.double(), _joint(matrix, bias)
        if not bool(gram.isfinite().all()) or not train.rows:
            return
        taken = np.empty(0, dtype=np.int64)
        for cut in list(self.cuts.values()):
            member = next((m for m in cut.group.members if (m.tensor, m.dim) == (name, dim)), None)
            if member is None:
                continue
            positions = member.index.positions()
            if cut.group.name not in self.chosen:
                self.chosen.add(cut.group.name)
                goes = removed_units(gram, weight, positions, cut.group.units - cut.width, taken)
                kept = tuple(tuple(np.flatnonzero(~row).tolist()) for row in goes)
                cut = self.cuts[cut.group.name] = Cut(cut.group, kept)
            stays = np.zeros(positions.shape[:2], dtype=bool)
            for o, row in enumerate(cut.kept):
                stays[o, list(row)] = True
            taken = np.union1d(taken, positions[~stays].reshape(-1))
        self.gone = _positions(self.cuts.values(), self.parameters)

    def _write(self, key: Key, matrix: Tensor, gone: np.ndarray, bias: Tensor | None, train: Sums, held: Sums) -> None:
        """Fit one matrix [outputs, inputs] and write it, and its bias, in place."""
        if not bool(train.gram.isfinite().all() and held.gram.isfinite().all()):
            hint = "Load the model in float32 or bfloat16, and look at the calibration text."
            raise PyPruneError("model", key.name, "is given inputs with NaN or infinity", hint)
        weight = _joint(matrix, None if self.mode == "bias" else bias)
        inputs = matrix.shape[1]
        removed = torch.from_numpy(gone).to(weight.device)
        stays = torch.ones(inputs, dtype=torch.bool, device=weight.device)
        stays[removed] = False
        entry = partial(Compensated, key.name, key.expert, int(stays.sum()), inputs, train.rows)
        if self.mode == "bias":
            if bias is None or not train.rows:
                matrix[:, removed] = 0
                return
            means = train.gram[:-1, -1].double() / train.gram[-1, -1].double()
            bias += (weight[:, removed] @ means[removed]).to(bias.dtype)
            matrix[:, removed] = 0
            self.result.matrices.append(entry())
            return
        if bias is not None:
            stays = torch.cat([stays, stays.new_ones(1)])
        found = refit(weight, stays.nonzero()[:, 0], train, held, self.penalties)
        matrix.copy_(found.weight[:, :inputs])
        if bias is not None:
            bias.copy_(found.weight[:, inputs])
        self.result.matrices.append(
            entry(penalty=found.penalty, blend=found.blend, before=found.before, after=found.after)
        )

    def _note(self, compensated: set[str]) -> None:
        notes = self.result.notes
        if self.mode == "bias":
            without = len(compensated - {m.tensor for m in self.result.matrices})
            if without:
                notes.append(f"{without} output projections have no bias and were not compensated.")
        few = [m for m in self.result.matrices if m.penalty is not None and m.rows < m.kept]
        if few:
            notes.append(
                f"{len(few)} projections were refitted on fewer tokens than they have inputs ({few[0].tensor}: "
                f"{few[0].rows} for {few[0].kept}); more calibration text would serve them better."
            )
        for cut in self.cuts.values():
            if cut.group.role == "qk_dim":
                continue
            if not any(m.tensor in compensated for m in cut.group.members):
                notes.append(f"No projection could take over for {cut.group.name}.")


def _joint(matrix: Tensor, bias: Tensor | None) -> Tensor:
    """Float64 [outputs, inputs], with the bias as the weight of a last input that is always one."""
    wide = matrix.double()
    return wide if bias is None else torch.cat([wide, bias.double()[:, None]], dim=1)


def _positions(cuts: Iterable[Cut], tensors: Container[str]) -> dict[str, dict[int, np.ndarray]]:
    """Tensor -> dim -> positions that go."""
    gone: dict[str, dict[int, np.ndarray]] = {}
    for cut in cuts:
        for tensor, dim, positions in cut.removed_positions():
            if tensor in tensors:
                dims = gone.setdefault(tensor, {})
                dims[dim] = np.union1d(dims.get(dim, positions), positions)
    return gone


def _steps(calibration: Calibration, device: torch.device, mode: str) -> tuple[list[Step], list[bool]]:
    """Steps, and which of them are held out: one in :data:`HELD_OUT` samples, evenly over the calibration."""
    rows = [take(b, slice(r, r + 1)) for b in calibration for r in range(batch_rows(b))]
    count = 0 if mode == "bias" else max(1, len(rows) // HELD_OUT)
    chosen = {len(rows) * (2 * k + 1) // (2 * count) for k in range(count)}
    fit = [r for k, r in enumerate(rows) if k not in chosen]
    out = [r for k, r in enumerate(rows) if k in chosen]
    steps = [make_steps(part, device, tokens=STEP_TOKENS) if part else [] for part in (fit, out)]
    return [*steps[0], *steps[1]], [False] * len(steps[0]) + [True] * len(steps[1])


def _target(use: Use, p: nn.Parameter, wanted: Tensor, stream: Tensor) -> Tensor:
    """Own output plus what the stream lacks, [rows, outputs]."""
    matrix = p if use.key.expert is None else p[use.key.expert]
    own = use.x @ (matrix if use.transposed else matrix.t())
    if use.bias is not None:
        own = own + use.bias
    return own + (wanted - stream).reshape(own.shape)
