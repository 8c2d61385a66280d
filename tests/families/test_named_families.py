"""Half of the heads and half of the FFN channels of every named family: pruned, run, generated, saved, opened."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers_discovery import half, logits, masked, token_ids
from helpers_families import NAMED, build

from pyprune.checkpoint import load, save
from pyprune.discovery import discover
from pyprune.selection.plan import Plan
from pyprune.surgery import apply


def groups_to_cut(model, family):
    """Heads and FFN channels; heads that only a computed table froze are thawed, since surgery keeps its values."""
    wanted = {family.heads, *family.ffn}
    groups = discover(model).thaw(["kv_heads"])
    return [g for g in groups.prunable() if g.role in wanted and g.units > 1 and g.layer is not None]


def generated(model, cache: bool) -> torch.Tensor:
    return model.generate(
        input_ids=token_ids(model), attention_mask=torch.ones(2, 9, dtype=torch.long), max_new_tokens=6,
        do_sample=False, use_cache=cache, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip


def told(small_of) -> tuple:
    """What it makes, and the notices about widths that no configuration expresses."""
    with warnings.catch_warnings(record=True) as notices:
        warnings.simplefilter("always")
        small = small_of()
    return small, [str(w.message) for w in notices if "for pyprune.load and profile hetero-hf" in str(w.message)]


@pytest.mark.parametrize("name", NAMED)
def test_half_of_the_heads_and_of_the_ffn_goes_and_everything_works(name, tmp_path):
    family = NAMED[name]
    model = build(name, tmp_path / "whole")
    groups = groups_to_cut(model, family)
    assert {g.role for g in groups} == {family.heads, *family.ffn} - {None}

    exact = half([g for g in groups if g.exact])
    expected = logits(masked(model, exact))
    assert (expected - logits(model)).abs().max() > 0.05  # the check below is about something
    if exact.cuts:
        small, _ = told(lambda: apply(model, exact, copy=True, verify=False))
        assert (logits(small) - expected).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max()))

    plan = half(groups)
    small, notices = told(lambda: apply(model, plan, copy=True))
    assert_dense(small, model, plan)
    assert len(notices) == bool(family.note) and all(family.note in text for text in notices), notices
    assert torch.equal(generated(small, cache=True), generated(small, cache=False))

    folder = save(small, None, tmp_path / "small", plan=plan)
    loaded = load(folder, trust_remote_code=family.remote)
    assert type(loaded).__name__ == type(model).__name__
    assert torch.equal(logits(loaded), logits(small))
    assert torch.equal(generated(loaded, cache=True), generated(small, cache=True))
    if family.stock:
        from transformers import AutoModelForCausalLM

        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder).eval()), logits(small))


def assert_dense(small, model, plan: Plan) -> None:
    """Every parameter has the planned shape: nothing is masked."""
    tensors = {n: tuple(t.shape) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    planned = plan.new_shapes(tensors)
    assert {n: tuple(p.shape) for n, p in small.named_parameters()} == {
        n: planned[n] for n, _ in model.named_parameters()
    }
