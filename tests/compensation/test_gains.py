"""Gains: numbers that multiply what matrices read, so that a changed model says again what the dense one says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_compensation import ids
from helpers_families import liven
from helpers_llama import tiny_llama
from torch import Tensor, nn
from torch.nn.functional import log_softmax

import pyprune
from pyprune.compensation import gains as module
from pyprune.compensation.gains import fit_gains, reference
from pyprune.errors import PyPruneError
from pyprune.importance.calibration import load_calibration
from pyprune.importance.divergence import divergence, divergence_and_seed, summary

SIZES = {"vocab_size": 97, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS: dict[str, dict[str, Any]] = {
    "GPT2Config": {"vocab_size": 97, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64},  # [inputs, outputs]
    "OPTConfig": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 24, "max_position_embeddings": 64},  # biases
    "Phi3Config": {**SIZES, "intermediate_size": 48, "pad_token_id": 0},  # queries, keys and values in one matrix
    "MixtralConfig": {**SIZES, "intermediate_size": 32, "num_local_experts": 4, "num_key_value_heads": 2},
}
WEAKENED = ("o_proj.weight", "attn.c_proj.weight", "out_proj.weight")


def model_of(config: str) -> nn.Module:
    import transformers as t

    t.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    return liven(t.AutoModelForCausalLM.from_config(getattr(t, config)(**MODELS[config])).eval())


def weakened(dense: nn.Module, by: float = 0.75) -> tuple[nn.Module, str]:
    """A copy whose last attention adds less, and the matrix that does it."""
    model = copy.deepcopy(dense)
    name = [n for n, _ in model.named_parameters() if n.endswith(WEAKENED)][-1]
    with torch.no_grad():
        model.get_parameter(name).mul_(by)
    return model, name


def fitted(model: nn.Module, dense: nn.Module, batches: Any, **options: Any) -> module.Gains:
    says = reference(dense, load_calibration(batches))
    return fit_gains(model, says, **options)


def off(model: nn.Module, dense: nn.Module, tokens: Tensor) -> float:
    """KL(dense || model) in nats a token, over the whole vocabulary."""
    with torch.no_grad():
        p, q = (log_softmax(m(tokens).logits.double(), -1) for m in (dense, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("top", [5, 96, 500])
def test_the_seed_is_the_gradient_of_the_divergence(top: int) -> None:
    torch.manual_seed(0)
    dense, logits = 3 * torch.randn(7, 97), (3 * torch.randn(7, 97)).double().requires_grad_()
    places, values = summary(dense, top)
    p, q = log_softmax(dense.double(), -1), log_softmax(logits, -1)
    inside = torch.zeros(7, 97, dtype=torch.bool).scatter(1, places.long(), True)
    rest = [x.exp().masked_fill(inside, 0.0).sum(-1) for x in (p, q)]
    wanted = (p.exp() * (p - q)).masked_fill(~inside, 0.0).sum() + (rest[0] * (rest[0] / rest[1]).log()).sum()
    (0.5 * wanted).backward()
    total, seed = divergence_and_seed(logits.detach(), places, values, 0.5)
    assert total == pytest.approx(wanted.item(), rel=1e-5)
    assert total == pytest.approx(divergence(logits.detach(), places, values), rel=1e-5)
    torch.testing.assert_close(seed, logits.grad, rtol=1e-4, atol=1e-6)


def test_the_seed_is_finite_where_a_token_is_certain() -> None:
    sure = torch.full((2, 97), -200.0)
    sure[:, 3] = 200.0
    places, values = summary(sure, 4)
    for logits in (sure, -sure, torch.zeros(2, 97)):
        total, seed = divergence_and_seed(logits, places, values, 1.0)
        assert total == total and bool(seed.isfinite().all())


def test_a_matrix_that_is_too_weak_gets_its_strength_back() -> None:
    dense = tiny_llama()
    model, name = weakened(dense)
    found = fitted(model, dense, ids(40, 24))
    assert found.kept and found.after < 0.1 * found.before
    assert found.values[name].shape == (dense.get_parameter(name).shape[1],)
    values = found.values[name.replace("o_proj", "v_proj")].mean()  # values are made once, and read once
    assert float(found.values[name].mean() * values) == pytest.approx(1 / 0.75, rel=0.1)
    assert off(model, dense, ids(10, 24, seed=1)) < 0.1 * off(weakened(dense)[0], dense, ids(10, 24, seed=1))


@pytest.mark.parametrize("config", MODELS)
def test_any_way_of_storing_matrices_serves_and_the_weights_take_the_gains_in(config: str) -> None:
    dense = model_of(config)
    model, name = weakened(dense)
    found = fitted(model, dense, ids(40, 24))
    assert found.kept and name in found.values and found.after < 0.5 * found.before
    held = [r for r, chosen in enumerate(_held(40)) if chosen]
    assert off(model, dense, ids(40, 24)[held]) == pytest.approx(found.after, rel=1e-2)


def _held(samples: int) -> list[bool]:
    calibration = load_calibration(torch.arange(2 * samples).view(samples, 2))
    out = {int(r["input_ids"][0, 0]) // 2 for r in module.split_rows(calibration)[1]}
    return [r in out for r in range(samples)]


def test_channels_that_stay_have_a_gain_each_after_a_cut() -> None:
    dense = tiny_llama()
    out = pyprune.prune(
        dense, widths={"kv_heads": 1, "ffn": 16}, criterion="wanda", compensation="least-squares",
        compensation_gains=True, calibration=ids(40, 24), copy=True,
    )  # fmt: skip
    made = out.report.compensation[0]["gains"]
    assert made["kept"] and made["after"] < made["before"]
    assert all(low < mean < high for low, mean, high in made["values"].values())
    without = pyprune.prune(
        dense, widths={"kv_heads": 1, "ffn": 16}, criterion="wanda", compensation="least-squares",
        calibration=ids(40, 24), copy=True,
    )  # fmt: skip
    assert without.report.compensation[0].get("gains") is None
    unseen = ids(20, 24, seed=5)
    assert off(out.model, dense, unseen) < off(without.model, dense, unseen)


def test_the_dense_model_itself_is_left_bit_for_bit() -> None:
    dense = tiny_llama()
    model = copy.deepcopy(dense)
    found = fitted(model, dense, ids(10, 16))
    assert not found.kept and same(model, dense)


def test_gains_that_do_not_help_held_out_text_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_llama()
    model, _ = weakened(dense)
    before = copy.deepcopy(model)
    monkeypatch.setattr(module, "share_of_step", lambda done: -1.0)  # uphill
    found = fitted(model, dense, ids(20, 16))
    assert not found.kept and found.after > found.before and same(model, before)


def test_weights_that_something_else_reads_too_keep_their_values() -> None:
    class Reading(nn.Module):
        """Adds what a matrix holds to the stream, beside multiplying by it."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * (1 + 30 * (self.inner.weight.square().mean() - 0.09))

        @property
        def weight(self) -> Tensor:
            return self.inner.weight

    dense = tiny_llama()
    dense.model.layers[2].mlp.down_proj = Reading(dense.model.layers[2].mlp.down_proj)
    model = copy.deepcopy(dense)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(0.6)
    before = copy.deepcopy(model)
    says = reference(dense, load_calibration(ids(20, 16)))
    found = fit_gains(model, says)
    assert not found.kept and "more than matrix products" in found.note
    assert same(model, before)


def test_weights_near_the_end_of_their_type_come_back_from_the_trial() -> None:
    dense = tiny_llama().to(torch.float16)
    with torch.no_grad():  # a channel that hardly speaks, read by a weight that no float16 has twice
        dense.model.layers[0].mlp.up_proj.weight[5] *= 1e-5
        dense.model.layers[0].mlp.down_proj.weight[3, 5] = 40000.0
    model = weakened(dense)[0]
    found = fitted(model, dense, ids(20, 16))
    assert found.note is None and all(p.isfinite().all() for p in model.parameters())
    unread = set(dict(model.named_parameters())) - set(found.values)
    assert found.kept or same(model, weakened(dense)[0])
    assert all(torch.equal(model.get_parameter(n), weakened(dense)[0].get_parameter(n)) for n in unread)


def test_an_interrupted_trial_leaves_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_llama()
    model = weakened(dense)[0]
    before = copy.deepcopy(model)
    says = reference(dense, load_calibration(ids(20, 16)))
    real, calls = module._Fit._divergence, []

    def stopped(self: Any, numbers: Any) -> float:
        calls.append(numbers)
        if len(calls) == 3:  # with the weights doubled
            raise KeyboardInterrupt
        return real(self, numbers)

    monkeypatch.setattr(module._Fit, "_divergence", stopped)
    with pytest.raises(KeyboardInterrupt):
        fit_gains(model, says)
    assert same(model, before)


def test_what_is_reported_is_what_the_rounded_weights_give(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_llama().to(torch.bfloat16)
    model = weakened(dense)[0]
    says = reference(dense, load_calibration(ids(20, 16)))
    found = fit_gains(model, says)
    assert found.kept
    monkeypatch.setattr(module, "STEPS", 1)  # what it begins at is all that is looked at
    again = fit_gains(model, says)
    assert again.before == pytest.approx(found.after, rel=1e-6)


def test_a_pruned_model_that_gives_nan_has_none() -> None:
    dense = tiny_llama()
    model = weakened(dense)[0]
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    found = fitted(model, dense, ids(20, 16))
    assert (found.before, found.kept, found.values) == (None, False, {}) and "NaN" in found.note


def test_padding_counts_nothing() -> None:
    dense = tiny_llama()
    model, _ = weakened(dense)
    tokens = ids(20, 16)
    mask = (torch.arange(24) < 16).long()[None]
    padded = [{"input_ids": torch.cat([row, ids(1, 8, seed=9)[0]])[None], "attention_mask": mask} for row in tokens]
    plain = [{"input_ids": row[None], "attention_mask": torch.ones(1, 16, dtype=torch.int64)} for row in tokens]
    found = [fitted(copy.deepcopy(model), dense, batches) for batches in (padded, plain)]
    assert found[0].before == pytest.approx(found[1].before, rel=1e-4)
    # Passes hold as many samples as fit with their padding, so steps differ a little.
    assert found[0].after == pytest.approx(found[1].after, rel=0.5)


def test_nothing_of_the_fit_is_left_behind() -> None:
    dense = tiny_llama()
    model, _ = weakened(dense)
    model.train()
    fitted(model, dense, ids(20, 16))
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all("forward" not in m.__dict__ for m in model.modules())


def test_a_second_run_takes_the_gains_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_llama()
    first, second = weakened(dense)[0], weakened(dense)[0]
    found = fitted(first, dense, ids(20, 16), cache=tmp_path)
    monkeypatch.setattr(module._Fit, "run", lambda self: pytest.fail("fitted anew"))
    assert fitted(second, dense, ids(20, 16), cache=tmp_path).to_dict() == found.to_dict()
    assert same(first, second)
    with pytest.raises(pytest.fail.Exception):
        fitted(weakened(dense)[0], dense, ids(20, 16, seed=3), cache=tmp_path)
    with pytest.raises(pytest.fail.Exception):
        fitted(weakened(dense, 0.6)[0], dense, ids(20, 16), cache=tmp_path)


def test_the_same_cut_again_runs_neither_model_and_another_one_not_the_dense_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = module.Forward.__call__

    def counted(self: Any, step: Any) -> Any:
        seen.append(step.rows)
        return real(self, step)

    monkeypatch.setattr(module.Forward, "__call__", counted)
    dense, text = tiny_llama(), load_calibration(ids(20, 16))
    says = reference(dense, text, tmp_path)
    first, second = weakened(dense)[0], weakened(dense)[0]
    found = fit_gains(first, says, cache=tmp_path)
    assert found.kept and seen
    seen.clear()
    again = reference(dense, text, tmp_path)
    assert all(torch.equal(p, q) for a, b in zip(says.said, again.said, strict=True) for p, q in zip(a, b, strict=True))
    assert fit_gains(second, again, cache=tmp_path).to_dict() == found.to_dict()
    assert same(first, second) and not seen
    reference(weakened(dense)[0], text, tmp_path)
    assert sum(seen) == text.samples  # another model is asked


def test_a_model_without_blocks_says_why_there_are_none() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(97, 8), nn.Linear(8, 97)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.embed(input_ids))

    dense = Plain()
    says = reference(dense, load_calibration(ids(4, 8)))
    found = fit_gains(copy.deepcopy(dense), says)
    assert not found.kept and "no list of blocks" in found.note


def test_blocks_that_text_does_not_pass_have_none() -> None:
    dense = tiny_llama()
    dense.tower = nn.ModuleList(nn.Linear(300, 300) for _ in range(2))  # larger than the decoder, and never called
    found = fitted(copy.deepcopy(dense), dense, ids(4, 8))
    assert not found.kept and "text passes no matrix" in found.note


def test_blocks_that_let_no_gradient_through_have_none() -> None:
    dense = tiny_llama()
    model, _ = weakened(dense)
    model.model.forward = torch.no_grad()(type(dense.model).forward.__get__(model.model))
    before = copy.deepcopy(model.state_dict())
    found = fitted(model, dense, ids(4, 8))
    assert not found.kept and "no gradient passes" in found.note
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_a_dense_model_that_gives_nan_is_refused() -> None:
    dense = tiny_llama()
    with torch.no_grad():
        dense.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(PyPruneError, match="gives logits with NaN or infinity"):
        reference(dense, load_calibration(ids(4, 8)))


def test_gains_without_a_compensation_are_refused() -> None:
    with pytest.raises(PyPruneError, match="compensation_gains True: are fitted behind a compensation"):
        pyprune.prune(tiny_llama(), ratio=0.2, criterion="l2", compensation_gains=True, calibration=ids(4, 8))


def test_one_sample_leaves_none_to_decide_with() -> None:
    with pytest.raises(PyPruneError, match="samples 1: leave none"):
        reference(tiny_llama(), load_calibration(ids(1, 8)))
    with pytest.raises(PyPruneError, match="samples 1: leave none"):
        pyprune.prune(
            tiny_llama(), ratio=0.2, roles=["ffn"], criterion="wanda", compensation="least-squares",
            compensation_gains=True, calibration=ids(1, 8),
        )  # fmt: skip
