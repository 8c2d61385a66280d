"""Training an adapter: steps, validation, keeping the best, going on after an interruption.

Whatever is random in a step is drawn from (seed, step, process), and the order of the rows is fixed beforehand, so a
resumed run takes the very steps that an uninterrupted one takes. Several processes share each step's rows and add up
their gradients; a step's loss is the mean over all of its learned tokens, however they were divided.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyprune import progress
from pyprune.errors import PyPruneError
from pyprune.importance.losses import OVERFLOW
from pyprune.importance.modes import evaluating
from pyprune.recovery import adapter
from pyprune.recovery.loss import training_loss
from pyprune.recovery.packing import Row, collate
from pyprune.recovery.processes import Processes
from pyprune.recovery.schedule import Pace, rate
from pyprune.recovery.teacher import Teacher
from pyprune.recovery.unfinished import Checkpoint, History, Unfinished

VALIDATIONS = 10  # in a run, when nothing else is said
VALIDATION_SHARE = 0.1  # of the time that a run may take, at most
ONE_VALIDATION = 0.03  # of that time, at most
ADAM = ("step", "exp_avg", "exp_avg_sq")  # what it keeps of each parameter
SAVE_SECONDS = 600  # between two checkpoints at most


@dataclass(frozen=True)
class Training:
    """Settings of a training; the options of the command line explain them."""

    learning_rate: float
    lr_scheduler: str
    warmup_steps: int
    train_batch_size: int
    micro_batch_size: int
    max_grad_norm: float
    bf16: bool
    gradient_checkpointing: bool
    eval_steps: int | None
    early_stopping_patience: int
    max_minutes: float | None
    seed: int
    distill_weight: float = 0.0
    distill_temperature: float = 1.0


class Trainer:
    """Trains the adapter of ``wrapped``.

    Args:
        wrapped: peft's model; what requires gradients is trained.
        rows: in the order in which they are trained on.
        validation: rows to validate on.
        settings: how.
        positions: whether the model takes positions, by which it tells documents of a row apart.
        processes: who shares the work.
        teacher: what to learn from beside the text.
        unfinished: where checkpoints go; None keeps none.
    """

    def __init__(
        self, wrapped: Any, rows: Sequence[Row], validation: Sequence[Row], settings: Training, *, positions: bool,
        processes: Processes, teacher: Teacher | None = None, unfinished: Unfinished | None = None,
    ) -> None:  # fmt: skip
        self.model, self.rows, self.validation, self.settings = wrapped, rows, validation, settings
        self.positions, self.processes, self.teacher, self.unfinished = positions, processes, teacher, unfinished
        self.parameters = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
        self.device = next(iter(self.parameters.values())).device
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=settings.learning_rate, weight_decay=0.0)
        self.steps = math.ceil(len(rows) / settings.train_batch_size)
        self.pace = Pace(self.steps, settings.max_minutes)
        self.history = History()
        self.best: dict[str, Tensor] = {}
        self.validations_wanted = VALIDATIONS
        self._saved_at = 0.0

    def run(self, resume: bool = False) -> History:
        """Train to the end; the adapter is the best one afterwards, also when that is the one of step 0.

        Args:
            resume: go on from the last checkpoint, when there is one.
        """
        moment = self.unfinished.load() if resume and self.unfinished is not None else None
        self.model.train()
        checkpointing = _checkpointing(self.model) if self.settings.gradient_checkpointing else nullcontext()
        devices = [self.device] if self.device.type == "cuda" else []
        with checkpointing, torch.random.fork_rng(devices=devices), progress.bar("train", self._bar_total()) as line:
            if moment is None:
                self.pace.start()
                self._trim_validation()
                self._validate(0.0)
            else:
                self._restore(moment)
            self._fit_budget()
            shown = 0
            while self.history.step < self.steps:
                at = self._progress()
                if self._ends(at) or self._settled():
                    break
                loss = self._step(at)
                if loss is None:
                    break
                after = self._progress()
                line.advance(self._bar_at(after) - shown)
                shown = self._bar_at(after)
                line.say(f"train: loss {loss:.3f}, validation {self._lately():.2f}")
                if self._due(after):
                    self._validate(after)
                    self._save()
                elif self.pace.seconds() - self._saved_at > SAVE_SECONDS:
                    self._save()
            if self.history.validations[-1]["step"] != self.history.step:
                self._validate(1.0)
                self._save()
        adapter.put(self.model, self.best)
        self.model.eval()
        self.history.seconds = self.pace.seconds()
        return self.history

    def autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.device, self.settings.bf16)

    def nll(self) -> float:
        """Mean negative log-likelihood of a validation token, as the model is now, in nats."""
        return self._nll(self.validation_rows)

    @property
    def validation_rows(self) -> Sequence[Row]:
        """What is validated on: all of it, or as much as the time allows."""
        return self.validation[: self.history.validation_rows]

    @torch.no_grad()
    def _nll(self, rows: Sequence[Row]) -> float:
        size = 2 * self.settings.micro_batch_size
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        with evaluating(self.model):
            for batch in _batches(self._mine(rows), size):
                inputs = collate(batch, self.positions, self.device)
                labels = inputs.pop("labels")
                with self.autocast():
                    logits = self.model(**inputs, use_cache=False).logits
                sums[0] += training_loss(logits, labels).double()
                sums[1] += sum(row.learned for row in batch)
        total = self.processes.total(sums)
        return float(total[0] / total[1])

    def _step(self, at: float) -> float | None:
        """One optimizer step; the mean loss of its tokens, or None when it was not finite and nothing was changed."""
        s, step = self.settings, self.history.step
        torch.manual_seed(((s.seed * 1_000_003 + step) * 4099 + self.processes.rank) % 2**63)
        batch = self.rows[step * s.train_batch_size : (step + 1) * s.train_batch_size]
        batch = sorted(batch, key=lambda row: -len(row.ids))  # alike lengths together: less padding
        learned = sum(row.learned for row in batch)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        for part in _batches(self._mine(batch), s.micro_batch_size):
            loss = self._loss(part, 1 / learned)
            loss.backward()
            total += loss.detach().double()
        mean = float(self.processes.total(total))
        self._add_up_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), s.max_grad_norm or math.inf)
        if not (math.isfinite(mean) and bool(norm.isfinite())):
            problem = f"The loss was not finite at step {step}; training ended there, and the best is kept."
            self.history.notes.append(f"{problem} Try a lower learning_rate.")
            return None
        now = s.learning_rate * rate(at, step, s.lr_scheduler, s.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = now
        self.optimizer.step()
        self.history.step += 1
        self.history.tokens += learned
        self.history.losses.append(mean)
        self.history.rates.append(now)
        self._log({"step": self.history.step, "loss": mean, "rate": now, "seconds": round(self.pace.seconds(), 2)})
        return mean

    def _loss(self, rows: Sequence[Row], factor: float) -> Tensor:
        """``factor`` times the sum over the learned tokens of ``rows``."""
        s = self.settings
        inputs = collate(rows, self.positions, self.device)
        labels = inputs.pop("labels")
        with self.autocast():
            logits = self.model(**inputs, use_cache=False).logits
        if self.teacher is None or s.distill_weight == 0:
            return training_loss(logits, labels, factor=factor)
        answers = self.teacher(rows, self.device)
        return training_loss(logits, labels, answers, s.distill_weight, s.distill_temperature, factor)

    def _add_up_gradients(self) -> None:
        if self.processes.count == 1:
            return
        for p in self.parameters.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        flat = torch.cat([p.grad.reshape(-1) for p in self.parameters.values()])
        flat = self.processes.total(flat)
        for p, part in zip(
            self.parameters.values(), flat.split([p.numel() for p in self.parameters.values()]), strict=True
        ):
            p.grad = part.view_as(p)

    def _mine(self, rows: Sequence[Row]) -> Sequence[Row]:
        return rows[self.processes.rank :: self.processes.count]

    def _progress(self) -> float:
        """The same in every process: the main one's clock counts."""
        if self.settings.max_minutes is None:
            return self.pace.progress(self.history.step, 0.0)
        return self.pace.progress(self.history.step, float(self.processes.same([self.pace.seconds()])[0]))

    def _ends(self, at: float) -> bool:
        """Whether the time is up: less is left than half of what a step has taken so far."""
        usual = at / self.history.step if self.history.step and self.settings.max_minutes is not None else 0.0
        return at + usual / 2 >= 1

    def _validate(self, at: float) -> None:
        start = time.monotonic()
        nll = self.nll()
        took = time.monotonic() - start
        h = self.history
        if not math.isfinite(nll):
            if h.step == 0:
                raise PyPruneError("model", None, "its loss on the validation text is not finite", "It is damaged.")
            nll = OVERFLOW
        shown = math.exp(min(nll, 700.0))
        h.validations.append({"step": h.step, "nll": nll, "perplexity": shown, "seconds": took, "progress": at})
        if nll < h.best_nll:
            h.best_step, h.best_nll = h.step, nll
            self.best = adapter.copied(self.parameters)
        self._log({"step": h.step, "validation": nll})

    def _due(self, at: float) -> bool:
        if self.settings.eval_steps is not None:
            return self.history.step % self.settings.eval_steps == 0
        last, wanted = self.history.validations[-1]["progress"], self.validations_wanted
        return math.floor(at * wanted + 1e-9) > math.floor(last * wanted + 1e-9)

    def _trim_validation(self) -> None:
        """Under a time budget, as many rows as one validation has time for, by the time that some of them take."""
        if self.settings.max_minutes is None:
            return
        few = self.validation[: self.processes.count * 2]
        start = time.monotonic()
        self._nll(few)
        took = float(self.processes.same([time.monotonic() - start])[0])
        count = max(len(few), int(len(few) * ONE_VALIDATION * 60 * self.settings.max_minutes / max(took, 1e-6)))
        if count < len(self.validation):
            self.history.validation_rows = count
            problem = f"Validation is on {count} of its {len(self.validation)} rows"
            self.history.notes.append(f"{problem}: {self.settings.max_minutes:g} minutes leave no time for more.")

    def _fit_budget(self) -> None:
        """Validations take a tenth of the time at most, and the last one still fits in."""
        if self.settings.max_minutes is None:
            return
        one = float(self.processes.same([self.history.validations[0]["seconds"]])[0])
        allowed = VALIDATION_SHARE * 60 * self.settings.max_minutes
        self.validations_wanted = max(2, min(VALIDATIONS, int(allowed / max(one, 1e-3))))
        self.pace.minutes = max(0.5 * self.settings.max_minutes, self.settings.max_minutes - one / 60)

    def _settled(self) -> bool:
        """Whether the last validations have brought nothing better."""
        patience = self.settings.early_stopping_patience
        if patience == 0:
            return False
        since = [v for v in self.history.validations if v["step"] > self.history.best_step]
        return len(since) >= patience

    def _lately(self) -> float:
        return float(self.history.validations[-1]["perplexity"])

    def _bar_total(self) -> int:
        return self.steps if self.settings.max_minutes is None else 100

    def _bar_at(self, at: float) -> int:
        return self.history.step if self.settings.max_minutes is None else int(100 * at)

    def _log(self, entry: dict[str, Any]) -> None:
        if self.unfinished is not None and self.processes.main:
            self.unfinished.log(entry)

    def _save(self) -> None:
        self._saved_at = self.pace.seconds()
        if self.unfinished is None or not self.processes.main or self.history.step == 0:
            return
        self.history.seconds = self.pace.seconds()
        averages: dict[str, Tensor] = {}
        for name, p in self.parameters.items():
            held = self.optimizer.state.get(p, {})  # nothing for what no gradient has reached
            averages |= {f"{key}.{name}": held[key] for key in ADAM if key in held}
        self.unfinished.save(Checkpoint(self.history, self.parameters, averages, self.best))

    def _restore(self, moment: Checkpoint) -> None:
        self.history, self.best = moment.history, dict(moment.best)
        adapter.put(self.model, moment.adapter)
        for name, p in self.parameters.items():
            held = {k: moment.optimizer[f"{k}.{name}"] for k in ADAM if f"{k}.{name}" in moment.optimizer}
            if held:
                self.optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in held.items()}
        self.pace.start(self.history.seconds)
        self._saved_at = self.history.seconds


def autocast(device: torch.device, bf16: bool) -> AbstractContextManager[Any]:
    """Matrix products in bfloat16, or everything in the weights' own type."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def _batches(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    for at in range(0, len(rows), size):
        yield rows[at : at + size]


class _checkpointing:
    """Activations are recomputed inside the block."""

    def __init__(self, wrapped: Any) -> None:
        self.model: nn.Module = wrapped.get_base_model()

    def __enter__(self) -> None:
        model: Any = self.model
        if not getattr(model, "supports_gradient_checkpointing", False):
            name = type(model).__name__
            raise PyPruneError("gradient_checkpointing", True, f"is not possible with {name}", "Leave it out.")
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_enable({"use_reentrant": False})

    def __exit__(self, *raised: object) -> None:
        model: Any = self.model
        if hasattr(model, "activation_checkpointing_disable"):
            model.activation_checkpointing_disable()
        else:
            model.gradient_checkpointing_disable()
