"""The oracle over one entry of transformers' causal-LM mapping, stage by stage."""

from __future__ import annotations

import inspect
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from helpers_discovery import half, liven, masked, permuted
from tiny_configs import MORE_INPUTS, NOT_ALONE, causal_class, tiny_config
from torch import nn

from pyprune import checkpoint, families, surgery
from pyprune.discovery import Groups, discover
from pyprune.discovery.groups import Group
from pyprune.selection.plan import Plan

STAGES = ("built", "discovered", "shuffled", "sliced", "backward", "generated", "reloaded")
"""
built       constructed with random weights of order one, logits finite
discovered  FFN channels (or those of a state-space block) and, where there are two or more, heads can be pruned
shuffled    permuting the units of any prunable group changes no logit
sliced      half of the FFN channels and heads cut away by ``surgery.apply``: the logits are those of the masked model
backward    every parameter of the smaller model that had a gradient in the whole one gets a finite one
generated   the smaller model's cached generation equals its uncached one
reloaded    saved and opened again, the logits are equal bit for bit
"""


LENGTH = 13
"""Of the texts that models are run on: longer than what discovery saw, so that it cannot be right by luck."""


class Overtime(Exception):
    """A model took longer than its time."""


class Failed(Exception):
    """A stage did not pass; the text says why."""


@dataclass
class Outcome:
    """What happened to one model.

    Attributes:
        passed: stages that passed, in order.
        failed: stage -> reason. Stages that were not reached are in neither.
        exempt: stage -> why the check says nothing about pruning (the whole model fails it too).
        roles: role -> (prunable groups, all groups).
        notes: facts worth a word in the table.
    """

    model_type: str
    passed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    exempt: dict[str, str] = field(default_factory=dict)
    roles: dict[str, tuple[int, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Every stage passed, or is one that says nothing."""
        return not self.failed and set(self.passed) | set(self.exempt) == set(STAGES)


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises Overtime after so many seconds (main thread only)."""

    def stop(*_: Any) -> None:
        raise Overtime(f"took longer than {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@contextmanager
def without_families() -> Iterator[None]:
    """No family adapter is known inside."""
    known = dict(families._FAMILIES)
    families._FAMILIES.clear()
    try:
        yield
    finally:
        families._FAMILIES.update(known)


def has_family(model_type: str) -> bool:
    """Whether a family adapter serves this model type."""
    if model_type in NOT_ALONE:
        return False
    config = tiny_config(model_type)
    return families.find(config.get_text_config()) is not None or families.find(config) is not None


def model_types() -> list[str]:
    """Every entry of the installed transformers' causal-LM mapping."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build(model_type: str) -> nn.Module:
    """The tiny model in float32, its signals of order one."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if model_type in NOT_ALONE:
        raise Failed(NOT_ALONE[model_type])
    torch.manual_seed(0)
    config = tiny_config(model_type)
    model = causal_class(model_type)(config).eval()
    model.tie_weights()
    liven(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0  # as it is in every checkpoint: loading may zero it again
    return model


def token_ids(batch: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, 100, (batch, length), generator=torch.Generator().manual_seed(5))


def example_inputs(model_type: str) -> dict[str, Any] | None:
    """What ``discover`` is given; None where it makes its own."""
    more = MORE_INPUTS.get(model_type, {})
    ids = token_ids(3, 7)
    return {"input_ids": ids} | {k: torch.full_like(ids, v) for k, v in more.items()} if more else None


def run(model: nn.Module) -> torch.Tensor:
    """Logits of two fixed texts, float32 [2, LENGTH, vocabulary]."""
    takes = inspect.signature(model.forward).parameters
    torch.manual_seed(0)  # a few models draw (the hashes of Reformer)
    return model(input_ids=token_ids(), **({"use_cache": False} if "use_cache" in takes else {})).logits.float()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return run(model)


def check(model_type: str, seconds: int = 60) -> Outcome:
    """Run every stage; the first that fails ends it, except that the last three do not depend on each other."""
    out = Outcome(model_type)
    with time_limit(seconds), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _stages(out)
        except Overtime as error:
            out.failed[next(s for s in STAGES if s not in (*out.passed, *out.failed, *out.exempt))] = str(error)
    return out


def _stages(out: Outcome) -> None:
    model = _stage(out, "built", lambda: _built(out.model_type))
    if model is None:
        return
    groups = _stage(out, "discovered", lambda: _discovered(out, model))
    if groups is None:
        return
    _stage(out, "shuffled", lambda: _shuffled(model, groups))
    small = _stage(out, "sliced", lambda: _sliced(out, model, chosen(thawed(groups))))
    if small is None:
        return
    _stage(out, "backward", lambda: _backward(out, model, small))
    _stage(out, "generated", lambda: _generated(out, model, small))
    _stage(out, "reloaded", lambda: _reloaded(out, model, small))


def _stage(out: Outcome, name: str, work: Callable[[], Any]) -> Any:
    try:
        result = work()
    except Overtime:
        raise
    except Failed as error:
        out.failed[name] = str(error)
    except Exception as error:  # the table is to show whatever a model raises
        out.failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"
    else:
        if name not in out.exempt and name not in out.failed:
            out.passed.append(name)
        return True if result is None else result
    return None


def _built(model_type: str) -> nn.Module:
    model = build(model_type)
    if not torch.isfinite(logits(model)).all():
        raise Failed("logits are not finite")
    return model


def _discovered(out: Outcome, model: nn.Module) -> Groups:
    groups = discover(model, example_inputs(out.model_type))
    usable = thawed(groups)
    for role in groups.roles():
        found = [g for g in usable if g.role == role]
        out.roles[role] = (sum(g.prunable for g in found), len(found))
    missing = _missing(usable)
    if not chosen(usable):
        raise Failed("; ".join(missing) or "nothing to prune")
    if missing:
        out.failed["discovered"] = "; ".join(missing)
    return groups


def thawed(groups: Groups) -> Groups:
    """As the pipeline cuts them: surgery keeps the slopes of heads. (Shuffling such heads does change logits.)"""
    return groups.thaw(("kv_heads", "query_heads"))


def _missing(groups: Groups) -> list[str]:
    """Heads and FFN channels that the oracle would cut and cannot, with the first reason of each kind."""
    out = []
    cut = {g.role for g in chosen(groups)}
    for kind in (("ffn", "expert_ffn", "state", "channels"), ("kv_heads", "query_heads")):
        frozen = [g for g in groups if g.role in kind and g.role != "channels" and g.units > 1 and not g.prunable]
        if frozen and not cut & set(kind):
            out.append(f"{frozen[0].role} frozen: {frozen[0].frozen}")
    return out


def chosen(groups: Groups) -> list[Group]:
    """What the oracle cuts: FFN channels and KV heads; query heads where there is a single KV head.

    A model with neither (a state-space model) has the channels of its blocks cut.
    """
    wanted = [g for g in groups.prunable() if g.units > 1]
    # Query heads of a layer whose KV heads are cut stay; a layer with one KV head has a query_heads group of its own.
    heads = [g for g in wanted if g.role == "kv_heads" or (g.role == "query_heads" and g.within is None)]
    found = [g for g in wanted if g.role in ("ffn", "expert_ffn")] + heads
    return found or [g for g in wanted if g.role in ("state", "channels") and g.layer is not None]


def _shuffled(model: nn.Module, groups: Groups) -> None:
    wrong = interchangeable(model, groups)
    if wrong:
        raise Failed("WRONG: shuffling changes logits: " + ", ".join(wrong))


def interchangeable(model: nn.Module, groups: Groups) -> list[str]:
    """Names of prunable groups whose units cannot be shuffled without changing logits, with the difference."""
    before = logits(model)
    scale = max(1.0, float(before.abs().max()))
    wrong = []
    for g in groups.prunable():
        if g.role == "layers":
            continue
        difference = float((logits(permuted(model, [g])) - before).abs().max())
        if not difference <= 2e-4 * scale:
            wrong.append(f"{g.name} ({difference:.2g})")
    return wrong


def _sliced(out: Outcome, model: nn.Module, wanted: list[Group]) -> nn.Module:
    exact = [g for g in wanted if g.exact]
    small = _equal_to_masked(out, model, half(exact)) if exact else None
    if len(exact) == len(wanted) and small is not None:
        return small
    roles = ", ".join(sorted({g.role for g in wanted if not g.exact}))
    if small is None:
        out.exempt["sliced"] = f"a norm runs over {roles}: removal is not zeroing"
    else:
        out.notes.append(f"a norm runs over {roles}")
    return _applied(out, model, half(wanted))


def _applied(out: Outcome, model: nn.Module, plan: Plan) -> nn.Module:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        small = surgery.apply(model, plan, copy=True, verify=False)
    if any("narrow" in str(w.message) for w in told) and "narrow layers" not in out.notes:
        out.notes.append("narrow layers")
    return small


def _equal_to_masked(out: Outcome, model: nn.Module, plan: Plan) -> nn.Module:
    expected = logits(masked(model, plan))
    if float((expected - logits(model)).abs().max()) < 0.01:
        raise Failed("masking changes nothing: the check would be vacuous")
    small = _applied(out, model, plan)
    difference = float((expected - logits(small)).abs().max())
    if not difference <= 1e-4 * max(1.0, float(expected.abs().max())):
        raise Failed(f"WRONG: slicing differs from masking by {difference:.2g}")
    return small


def _gradients(model: nn.Module) -> set[str]:
    model.zero_grad()
    run(model).square().mean().backward()
    return {n for n, p in model.named_parameters() if p.grad is not None and bool(torch.isfinite(p.grad).all())}


def _backward(out: Outcome, model: nn.Module, small: nn.Module) -> None:
    try:
        whole = _gradients(model)
    except Exception as error:  # some refuse a gradient outside training, where they draw at random
        out.exempt["backward"] = f"the whole model raises {type(error).__name__}"
        return
    lost = whole - _gradients(small)
    model.zero_grad()
    small.zero_grad()
    if lost:
        raise Failed(f"no finite gradient in {min(lost)}")


def _continued(model: nn.Module, cache: bool) -> torch.Tensor:
    torch.manual_seed(0)
    return model.generate(
        input_ids=token_ids(), attention_mask=torch.ones(2, LENGTH, dtype=torch.long), max_new_tokens=6,
        do_sample=False, use_cache=cache, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip


def _same_with_cache(model: nn.Module) -> bool:
    return torch.equal(_continued(model, True), _continued(model, False))


def _generated(out: Outcome, model: nn.Module, small: nn.Module) -> None:
    error: Exception | None = None
    try:
        if _same_with_cache(small):
            return
    except Overtime:
        raise
    except Exception as caught:  # whole models are asked below whether they raise the same
        error = caught
    try:
        whole = "differs from uncached" if not _same_with_cache(model) else None
    except Overtime:
        raise
    except Exception as caught:
        whole = f"raises {type(caught).__name__}"
    if whole is not None:
        out.exempt["generated"] = f"the whole model's cached generation {whole}"
        return
    raise error if error is not None else Failed("cached generation differs from uncached")


def _round_trip(model: nn.Module) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        loaded = checkpoint.load(checkpoint.save(model, None, Path(folder) / "saved"))
        with torch.no_grad():
            for tensor in (*loaded.parameters(), *loaded.buffers()):
                # Matrix kernels round differently where a memory-mapped file leaves tensors unaligned.
                tensor.data = tensor.data.clone()
        return torch.equal(logits(loaded), logits(model))


def _reloaded(out: Outcome, model: nn.Module, small: nn.Module) -> None:
    if not _round_trip(small):
        raise Failed("logits differ after saving and loading")
