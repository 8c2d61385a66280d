"""The compensation stage: the output projections of a model take over for the units that a plan removes.

The model is still dense. Block by block, in order, and in a block projection by projection, the inputs that the already
compensated part gives are reduced to a Gram matrix, the projection is refitted, and the columns of removed units become
zero: from there on the model computes what the pruned one will. Slicing afterwards (:func:`pyprune.apply`) drops zero
columns. Projections are found by what a plan's groups cut: a matrix along whose inputs a unit lies.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyprune import progress as bars
from pyprune.compensation.cache import LIMIT, Folder, SumsCache
from pyprune.compensation.checks import check_names, check_plan, check_samples, check_worth
from pyprune.compensation.course import Course, LastChange
from pyprune.compensation.feeders import rows_of
from pyprune.compensation.gather import Gathered, gather, split_steps
from pyprune.compensation.inner import InnerRefit, Projection
from pyprune.compensation.refit import PENALTIES, Sums, fits, refit
from pyprune.compensation.removal import removed_units
from pyprune.compensation.result import Compensated, Compensation
from pyprune.errors import PyPruneError
from pyprune.importance.calibration import Calibration, check_vocabulary, load_calibration
from pyprune.importance.fingerprint import fingerprint_of_model
from pyprune.importance.inputs import InputTaps, Use
from pyprune.importance.modes import in_memory, own_modes
from pyprune.importance.steps import Forward
from pyprune.importance.taps import Key
from pyprune.importance.walk import walking
from pyprune.selection.plan import Cut, Plan

KEPT_BYTES = 512 * 2**20  # inputs of a block's last projection that are kept, so that the block need not run again


@own_modes()
def compensate(
    model: nn.Module,
    plan: Plan,
    batches: Any,
    mode: str = "least-squares",
    *,
    token_weights: str = "inverse",
    target: str = "own",
    scope: str = "outputs",
    penalties: Sequence[float] = PENALTIES,
    worth: Mapping[str, Any] | None = None,
    cache: str | Path | Folder | None = None,
    cache_limit: float = LIMIT,
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
        token_weights: ``"inverse"``: a token counts 1 / mean(h^2), h its residual stream behind the block;
            ``"sink"``: the same, the first token of each sequence as an eighth of its tokens; ``"equal"``. Mode
            ``bias`` always counts tokens equally, so that the mean is the mean.
        target: what a refit aims at: ``"own"``, the layer's own output with all its columns, on the same inputs;
            ``"stream"``, that output plus what the residual stream behind the block lacks to the dense model's, for
            projections whose output is added to that stream as it is. The held-out error decides between the two and
            half way.
        scope: ``"outputs"``: projections that read removed units are refitted; ``"ffn"``: what feeds those of an FFN
            too, by :mod:`pyprune.compensation.inner`. It goes with refits towards the own output.
        penalties: values of lam that are tried.
        worth: of mode ``obs``: group name -> what its units are worth to the whole model, [outer, units], such as
            scores of the dense model by ``token_fisher``; it then has a say beside the layer's own output
            (:mod:`pyprune.compensation.removal`). Groups that are not named are chosen by the output alone.
        cache: folder where the sums of the calibration stay (:mod:`pyprune.compensation.cache`): what another run did
            on the same model and text, up to where the models first differ, needs no forward pass.
        cache_limit: GiB that such sums may take in the folder.
        progress: False silences the progress bar; None leaves it to :mod:`pyprune.progress`.

    Returns:
        What was done, how much it helped on held-out tokens, and the plan to apply.

    Raises:
        PyPruneError: an unknown mode; a plan that removes more than units inside layers; fewer than two samples; no
            bias to move a mean into; weights or activations with NaN or infinity.
    """
    model = in_memory(model)
    check_names(mode, token_weights, target, scope)
    check_worth(worth, mode, plan)
    check_plan(plan, mode)
    calibration = load_calibration(batches)
    check_samples(calibration, mode)
    check_vocabulary(calibration, model)
    with bars.shown(progress is not False):
        stage = _Stage(
            model, plan, calibration, mode, token_weights, target, scope, penalties, worth or {}, cache, cache_limit
        )  # fmt: skip
        return stage.run()


class _Stage:
    def __init__(
        self, model: nn.Module, plan: Plan, calibration: Calibration, mode: str, weighting: str, target: str,
        scope: str, penalties: Sequence[float], worth: Mapping[str, Any], cache: str | Path | Folder | None,
        cache_limit: float,
    ) -> None:  # fmt: skip
        self.model, self.mode, self.target, self.scope, self.penalties = model, mode, target, scope, penalties
        self.worth = worth
        self.weighting = "equal" if mode == "bias" else weighting
        self.parameters = dict(model.named_parameters())
        self.cuts = {cut.group.name: cut for cut in plan.cuts}
        self.chosen: set[str] = set()  # groups whose units were chosen anew
        self.gone = _positions(self.cuts.values(), self.parameters)
        self.storages = {p.untyped_storage().data_ptr() for p in self.parameters.values()}  # what may be written to
        self.steps, self.held = split_steps(calibration, next(model.parameters()).device, mode)
        self.result = Compensation(mode, plan, details={
            "token_weights": self.weighting, "target": target, "scope": scope, "calibration": calibration.to_dict(),
            "held_out_samples": sum(s.rows for s, h in zip(self.steps, self.held, strict=True) if h),
        })  # fmt: skip

        settings = [self.weighting, target, self.held, KEPT_BYTES]
        self.cache = SumsCache(
            cache, cache_limit,
            lambda: [fingerprint_of_model(model), [[s.inputs, s.targets] for s in self.steps], settings],
        )  # fmt: skip

    def run(self) -> Compensation:
        matrices = {n: self.parameters[n] for n in self.gone if self.parameters[n].dim() in (2, 3)}
        for name in self.gone:
            if not bool(self.parameters[name].isfinite().all()):
                hint = "Load a checkpoint with sound weights."
                raise PyPruneError("model", name, "holds NaN or infinity", hint)
        if not matrices:
            return self.result
        with walking(self.model, matrices), torch.no_grad():
            if self.mode == "bias":
                self._check_biases(matrices)
            course = self._course()
            asked, self.weighting = self.weighting, course.weighting(self.weighting)
            self.result.details["token_weights"] = self.weighting
            if self.weighting != asked:
                self.result.notes.append(f"All tokens count alike, for the model is run as a whole: {course.whole}.")
            compensated: set[str] = set()
            with bars.bar("compensating", len(course.blocks)) as bar:
                for i, block in enumerate(course.blocks):
                    course.enter(i)
                    inside = {id(p) for p in block.parameters()}
                    order = self._projections(course, i, {n: p for n, p in matrices.items() if id(p) in inside})
                    self._mask_others(course, i, {n for n in self.gone if id(self.parameters[n]) in inside}, set(order))
                    for name in order:
                        self._compensate(course, i, name, last=name == order[-1])
                    if not order:
                        course.leave(i)
                    compensated |= set(order)
                    bar.advance()
        self._note(compensated)
        if self.cache.folder is not None:
            self.result.details["sums_read"] = self.cache.read
        self.result.plan = Plan(tuple(self.cuts.values()), self.result.plan.details)
        return self.result

    def _course(self) -> Course:
        """The walk; whether the model can be run block by block is tried once for a model and text."""
        made: list[Course] = []

        def tried() -> list[str | None]:
            made.append(Course(self.model, self.steps, self.target == "stream"))
            return [made[0].whole]

        known = self.cache.answer("whole", tried)
        return made[0] if made else Course(self.model, self.steps, self.target == "stream", known)

    def _check_biases(self, matrices: Mapping[str, nn.Parameter]) -> None:
        """Before anything is changed: some matrix whose inputs the plan cuts has a bias."""

        def tried() -> bool:
            with InputTaps(matrices) as taps:
                Forward(self.model)(self.steps[0].part(slice(0, 1)))
            return any(
                self._bias_of(u) is not None and u.input_dim(matrices[u.key.name].dim()) in self.gone[u.key.name]
                for u in taps.uses
            )

        if not self.cache.answer(["biases", {n: sorted(self.gone[n]) for n in matrices}], tried):
            problem = "needs output projections with a bias, and this model has none where units go"
            raise PyPruneError("compensation", self.mode, problem, "Use least-squares.")

    def _bias_of(self, use: Use) -> Tensor | None:
        """The bias of a use, where it is a parameter that can be written to."""
        own = use.bias is not None and use.bias.untyped_storage().data_ptr() in self.storages
        return use.bias if own else None

    def _projections(self, course: Course, i: int, here: Mapping[str, nn.Parameter]) -> list[str]:
        """Names of the matrices whose inputs the plan cuts, in the order in which block ``i`` uses them."""
        if not here:
            return []
        uses = self.cache.answer(
            ["uses", i, sorted(here)],
            lambda: [[u.key.name, u.input_dim(here[u.key.name].dim())] for u in course.once(i, here)],
        )
        return list(dict.fromkeys(name for name, dim in uses if dim in self.gone[name]))

    def _mask_others(self, course: Course, i: int, names: set[str], refitted: set[str]) -> None:
        """Zero what goes with units that no projection of the block reads, such as dimensions of queries and keys."""
        for cut in self.cuts.values():
            if any(m.tensor in refitted for m in cut.group.members):
                continue
            for tensor, dim, positions in cut.removed_positions():
                if tensor in names:
                    p = self.parameters[tensor]
                    course.before_change(i, p)
                    p.index_fill_(dim, torch.from_numpy(positions).to(p.device), 0.0)
                    self.cache.follow(tensor, p)

    def _compensate(self, course: Course, i: int, name: str, last: bool) -> None:
        """Compensate one matrix; behind the ``last`` one of a block the course leaves it. What the change of that adds
        to the stream is added without running the block again, where that is all it does."""
        p = self.parameters[name]
        feeds = self._feeders(name, p)
        keeps = not feeds and last and course.whole is None and p.dim() == 2 and self._input_bytes(p) <= KEPT_BYTES
        added = course.beside or keeps
        if added:
            added = self.cache.answer(["added", i, name], lambda: course.is_added(i, p))
        keeps = added and keeps
        wanted = course.dense_stream if added and course.beside else None
        inputs: list[Tensor] | None = None
        found = self.cache.sums(name, self.parameters)
        if found is None:
            inputs = [] if keeps else None
            passes = course.run(i, name, p, inputs)
            found = gather(p, passes, self.steps, self.held, self.weighting, self._bias_of, wanted)
            self.cache.keep(name, found, self.parameters)
        course.before_change(i, p)
        for bias in found.biases.values():
            course.before_change(i, bias)
        dense = (p.detach().clone(), [b.clone() for b in found.biases.values()]) if feeds else None
        change = None
        if keeps:
            own = found.biases.get(Key(name))
            was = None if own is None else own.clone()
            change = LastChange(name, p, p.detach().clone(), found.transposed, own, was)
        fitted = self._refit(name, p, found)
        self.cache.follow(name, keeps, p, list(found.biases.values()))
        if dense is not None and fitted is not None:
            self._refit_feeders(course, i, name, found, dense, fitted)
        if last:
            course.leave(i, change, inputs)

    def _feeders(self, name: str, p: nn.Parameter) -> bool:
        """Whether what feeds a projection is to be refitted."""
        if self.scope != "ffn" or p.dim() != 2:
            return False
        return sum(bool(rows_of(c, name, dim, self.parameters)[1]) for c in self.cuts.values() for dim in (0, 1)) == 1

    def _refit_feeders(
        self, course: Course, i: int, name: str, found: Gathered, dense: tuple[Tensor, list[Tensor]], fitted: Tensor
    ) -> None:
        """Refit what feeds a projection, and the projection again, and say so in its entry.

        Args:
            dense: the projection and its biases as they were.
            fitted: as in :class:`Refit`.
        """
        p, entry = self.parameters[name], self.result.matrices[-1]
        dim = p.dim() - 2 if found.transposed else p.dim() - 1
        choices = (rows_of(cut, name, dim, self.parameters) for cut in self.cuts.values())
        inputs, feeders = next((c for c in choices if c[1]), (np.empty(0, dtype=np.int64), []))
        bias = found.biases.get(Key(name))
        if entry.after is None or not feeders or fitted.shape[1] != len(inputs) + (bias is not None):
            return
        written: dict[str, Tensor] = {name: p, **{r.tensor: self.parameters[r.tensor] for r in feeders}}
        written |= {} if bias is None else {f"{name}, bias": bias}
        matrices = [w.t() if found.transposed else w for w in (p, dense[0])]
        projection = Projection(
            name, matrices[0], bias, (matrices[1], dense[1][0] if bias is not None else None),
            torch.from_numpy(inputs).to(p.device), fitted, feeders, entry.after,
        )  # fmt: skip
        inner = InnerRefit(course, self.parameters, self.held, self.weighting, self.penalties, self.cache)
        about = inner.run(i, projection, written)
        if about:
            self.result.matrices[-1] = replace(entry, **about, after_outputs=entry.after)
            self.cache.follow(name, list(written.values()))

    def _refit(self, name: str, p: nn.Parameter, found: Gathered) -> Tensor | None:
        """Write what stays of a matrix, or of every expert, in place; of a matrix, ``fitted`` of its :class:`Refit`."""
        fitted = None
        dim = p.dim() - 2 if found.transposed else p.dim() - 1
        if self.mode == "obs" and p.dim() == 2:
            bias = found.biases.get(Key(name))
            self._choose(name, dim, p.t() if found.transposed else p, bias, found.train[Key(name)])
        gone = self.gone[name][dim]
        for key in sorted(found.train, key=lambda k: k.expert or 0):
            matrix = p if key.expert is None else p[key.expert]
            matrix = matrix.t() if found.transposed else matrix
            fitted = self._write(key, matrix, gone, found.biases.get(key), found.train[key], found.held[key])
        untouched = range(p.shape[0]) if p.dim() == 3 else []
        for expert in untouched:  # experts that no token reached
            if Key(name, expert) not in found.train:
                matrix = p[expert].t() if found.transposed else p[expert]
                matrix[:, torch.from_numpy(gone).to(p.device)] = 0
        return fitted if p.dim() == 2 else None

    def _input_bytes(self, p: nn.Parameter) -> int:
        """Bytes of a projection's inputs over all steps, at most."""
        return sum(s.targets.numel() for s in self.steps) * max(p.shape) * p.element_size()

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
                worth = self.worth.get(cut.group.name)
                worth = None if worth is None else torch.as_tensor(worth)
                goes = removed_units(gram, weight, positions, cut.group.units - cut.width, taken, worth)
                kept = tuple(tuple(np.flatnonzero(~row).tolist()) for row in goes)
                cut = self.cuts[cut.group.name] = Cut(cut.group, kept)
            stays = np.zeros(positions.shape[:2], dtype=bool)
            for o, row in enumerate(cut.kept):
                stays[o, list(row)] = True
            taken = np.union1d(taken, positions[~stays].reshape(-1))
        self.gone = _positions(self.cuts.values(), self.parameters)

    def _write(
        self, key: Key, matrix: Tensor, gone: np.ndarray, bias: Tensor | None, train: Sums, held: Sums
    ) -> Tensor | None:
        """Fit one matrix [outputs, inputs] and write it, and its bias, in place; what :meth:`_refit` returns."""
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
                return None
            means = train.gram[:-1, -1].double() / train.gram[-1, -1].double()
            shifted = bias.double() + weight[:, removed] @ means[removed]
            matrix[:, removed] = 0
            if not fits(shifted, bias.dtype):
                return None
            bias.copy_(shifted)
            self.result.matrices.append(entry())
            return None
        if bias is not None:
            stays = torch.cat([stays, stays.new_ones(1)])
        found = refit(weight, stays.nonzero()[:, 0], train, held, self.penalties, dtype=matrix.dtype)
        matrix.copy_(found.weight[:, :inputs])
        if bias is not None:
            bias.copy_(found.weight[:, inputs])
        self.result.matrices.append(
            entry(penalty=found.penalty, blend=found.blend, before=found.before, after=found.after)
        )
        return found.fitted

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
