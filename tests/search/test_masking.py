"""Candidates are measured on the dense model as if they had been cut, and its weights are never touched."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers_families import build
from helpers_llama import tiny_llama
from helpers_mixtures import mixture
from torch import Tensor, nn

from pyprune import apply, discover, score, select
from pyprune.compensation import compensate
from pyprune.compensation.gather import split_steps
from pyprune.errors import PyPruneError
from pyprune.importance.calibration import load_calibration
from pyprune.importance.steps import make_steps
from pyprune.importance.walk import Walk, walking
from pyprune.search.fitness import Fitness
from pyprune.search.masking import Exchanged, Masking
from pyprune.search.refits import PENALTY, Refits, penalty
from pyprune.search.sites import find_sites
from pyprune.selection.units import removal_order


def ids(samples: int = 12, length: int = 16, seed: int = 0, vocabulary: int = 97) -> Tensor:
    return torch.randint(3, vocabulary, (samples, length), generator=torch.Generator().manual_seed(seed))


class Set:
    """Everything up to a fitness, for the groups that a plan may cut."""

    def __init__(self, model: nn.Module, plan_options: dict, mode: str = "none", criterion: str = "l2") -> None:
        self.model = model
        self.groups = discover(model)
        roles = list(plan_options["widths"])
        self.scores = score(model, self.groups, ids(8), criterion, roles=roles)
        self.plan = select(self.groups, self.scores, **plan_options)
        cut = self.groups.prunable(roles)
        orders = {g.name: removal_order(self.scores[g.name].double().numpy()) for g in cut}
        self.held = make_steps(load_calibration(ids(4, seed=5)), torch.device("cpu"), tokens=32)
        walk = Walk(model, self.held)
        self.sites = find_sites(model, walk.blocks, cut, orders, self.held)
        parameters = dict(model.named_parameters())
        self.masking = Masking({n: parameters[n] for n in {**self.sites.read, **self.sites.made}})
        self.refits = Refits(model, self.sites, mode)
        self.blocks = walk.blocks if walk.whole is None else None
        self.widths = {g.name: g.units for g in cut} | {c.group.name: c.width for c in self.plan.cuts}

    def fitness(self, **options) -> Fitness:
        return Fitness(self.model, self.blocks, self.refits, self.masking, self.held, **options)

    def logits(self, x: Tensor) -> Tensor:
        self.refits.at(self.widths, self.masking)
        with walking(self.model, self.masking.watched), torch.no_grad(), self.masking:
            return self.model(x).logits


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("make", "widths"),
    [
        (tiny_llama, {"kv_heads": 1, "ffn": 13}),
        (lambda: tiny_llama(attention_bias=True, mlp_bias=True), {"kv_heads": 1, "ffn": 13}),
        (tiny_llama, {"query_heads": 1, "ffn": 20}),
        (tiny_llama, {"kv_heads": 1, "query_heads": 1}),
        (tiny_llama, {"qk_dim": 4, "vo_dim": 5}),
        (lambda: build("GPT-2", Path()), {"kv_heads": 3, "ffn": 100}),
        (lambda: mixture("mixtral"), {"kv_heads": 2, "expert_ffn": 16}),
        (lambda: mixture("qwen2_moe"), {"expert_ffn": 8, "ffn": 20}),
    ],
    ids=["llama", "biases", "query heads", "both heads", "head dims", "gpt2", "mixtral", "qwen2_moe"],
)  # fmt: skip
def test_a_masked_model_gives_the_logits_of_the_sliced_one(make, widths: dict[str, int]) -> None:
    model = make().eval()
    found = Set(model, {"widths": widths})
    before = bits(model)
    x = ids(3, seed=9)
    masked = found.logits(x)
    assert same(model, before)
    with torch.no_grad():
        dense, sliced = model(x).logits, apply(model, found.plan, copy=True)(x).logits
    assert (dense - sliced).abs().max() > 0.01
    torch.testing.assert_close(masked, sliced, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"mlp_bias": True, "attention_bias": True}], ids=["plain", "biases"])
def test_refits_made_for_a_plan_are_those_of_the_compensation_stage(changes: dict[str, bool]) -> None:
    model = tiny_llama(**changes)
    found = Set(model, {"widths": {"kv_heads": 1, "ffn": 16}}, "least-squares", "wanda")
    calibration = load_calibration(ids(120))
    steps, _ = split_steps(calibration, torch.device("cpu"), "least-squares")  # with a penalty, all are fitted
    with walking(model, found.masking.watched):
        found.refits.collect(steps, found.masking, "inverse", found.widths)
    masked = found.logits(ids(3, seed=9))
    done = compensate(model, found.plan, calibration, penalties=(PENALTY,))
    assert {m.penalty for m in done.matrices} == {PENALTY}
    with torch.no_grad():
        torch.testing.assert_close(masked, model(ids(3, seed=9)).logits, rtol=1e-2, atol=2e-3)


def test_moved_means_are_those_of_the_compensation_stage() -> None:
    model = build("GPT-2", Path())
    found = Set(model, {"widths": {"ffn": 100}}, "bias")
    calibration = load_calibration(ids(20))
    with walking(model, found.masking.watched):
        fit = make_steps(calibration, torch.device("cpu"), tokens=4096)
        found.refits.collect(fit, found.masking, "inverse", found.widths)
    masked = found.logits(ids(3, seed=9))
    compensate(model, found.plan, calibration, "bias")
    with torch.no_grad():
        torch.testing.assert_close(masked, model(ids(3, seed=9)).logits, rtol=1e-3, atol=1e-4)


def test_the_divergence_is_the_textbook_formula() -> None:
    model = tiny_llama()
    found = Set(model, {"widths": {"kv_heads": 1, "ffn": 16}})
    fitness = found.fitness()
    cut = apply(model, found.plan, copy=True)
    x = torch.cat([s.inputs["input_ids"] for s in found.held])
    with torch.no_grad():
        p, q = (m(x).logits.double().log_softmax(-1) for m in (model, cut))
    want = float((p.exp() * (p - q)).sum(-1).mean())
    assert want > 0.05
    assert fitness.of(found.widths) == pytest.approx(want, rel=1e-4)
    assert fitness.of({}) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}], ids=["head", "tied"])
def test_of_a_large_vocabulary_the_likeliest_tokens_take_part(
    changes: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyprune.search.fitness.WORDS", 40)
    model = tiny_llama(**changes)
    found = Set(model, {"widths": {"kv_heads": 1, "ffn": 16}})
    fitness = found.fitness()
    cut = apply(model, found.plan, copy=True)
    x = torch.cat([s.inputs["input_ids"] for s in found.held])
    with torch.no_grad():
        dense, other = (m(x).logits.double() for m in (model, cut))
    words = dense.softmax(-1).sum((0, 1)).topk(40).indices
    p, q = (logits[..., words].log_softmax(-1) for logits in (dense, other))
    want = float((p.exp() * (p - q)).sum(-1).mean())
    assert fitness.words == 40 and want > 0.05
    assert fitness.of(found.widths) == pytest.approx(want, rel=1e-4)
    assert fitness.of({}) == pytest.approx(0, abs=1e-5)


def test_logits_that_are_not_the_head_s_keep_the_whole_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that multiplies by something else than the weight it names."""
    monkeypatch.setattr("pyprune.search.fitness.WORDS", 40)
    model = tiny_llama()
    found = Set(model, {"widths": {"ffn": 16}})
    whole = found.fitness().of(found.widths)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: nn.Linear(4, 97))
    fitness = found.fitness()
    assert fitness.words == 97 and fitness.of(found.widths) != pytest.approx(whole, rel=1e-6)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    assert found.fitness().of(found.widths) == pytest.approx(fitness.of(found.widths), rel=1e-6)


@pytest.mark.parametrize("what", ["bias", "masked within the part", "masked beyond the part"])
def test_logits_with_a_bias_or_a_mask_behind_the_head_keep_the_whole_vocabulary(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    found = Set(model, {"widths": {"ffn": 16}})
    forward, bias = model.forward, torch.randn(97, generator=torch.Generator().manual_seed(0))

    def behind(*args, **kwargs):
        out = forward(*args, **kwargs)
        if what == "bias":
            out.logits = out.logits + bias
        else:
            out.logits[..., [5, 6] if what == "masked within the part" else [90, 91]] = -1e4
        return out

    monkeypatch.setattr(model, "forward", behind)
    whole = found.fitness()
    monkeypatch.setattr("pyprune.search.fitness.WORDS", 40)
    fitness = found.fitness()
    assert fitness.words == 97
    assert fitness.of(found.widths) == pytest.approx(whole.of(found.widths), rel=1e-6)


def test_padding_does_not_count() -> None:
    model = tiny_llama()
    found = Set(model, {"widths": {"ffn": 12}})
    x = ids(2, 12)
    padded = torch.cat([x, torch.zeros(2, 4, dtype=torch.int64)], 1)
    mask = (torch.arange(16) < 12).long().expand(2, -1)
    values = []
    for batch in ({"input_ids": x}, {"input_ids": padded, "attention_mask": mask}):
        found.held = make_steps([batch], torch.device("cpu"))
        values.append(found.fitness().of(found.widths))
    assert values[1] == pytest.approx(values[0], rel=1e-4)


@pytest.mark.parametrize("stream_bytes", [0, 12_000, 1 << 20])
def test_candidates_computed_from_the_bases_streams_are_measured_to_the_same_bits(stream_bytes: int) -> None:
    found = Set(tiny_llama(num_hidden_layers=5), {"widths": {"ffn": 12}})
    whole, parts = found.fitness(), found.fitness(stream_bytes=stream_bytes)
    names = [n for n in found.widths if n.endswith("ffn")]
    parts.rebase(found.widths)
    for name in names:
        child = {**found.widths, name: 20}
        assert parts.of(child) == whole.of(child)
    child = {**found.widths, names[2]: 17, names[4]: 7}
    parts.rebase(child)
    assert parts.of(child) == whole.of(child)
    assert parts.of(found.widths) == whole.of(found.widths)
    kept = sum(x.numel() * x.element_size() for streams in parts._streams for x in streams.values())
    assert kept <= stream_bytes and (kept > 0) == (stream_bytes > 0)


def test_refitted_matrices_stay_below_the_bound_and_do_not_depend_on_it() -> None:
    model = tiny_llama()
    found = Set(model, {"widths": {"ffn": 12}}, "least-squares", "wanda")
    size = 32 * 24 * 4
    values = []
    for bound in (size, 100 * size):
        found.refits = Refits(model, found.sites, "least-squares", bound)
        with walking(model, found.masking.watched):
            found.refits.collect(found.held, found.masking, "inverse", found.widths)
        fitness = found.fitness()
        values.append([fitness.of({**found.widths, n: w}) for n in found.widths for w in (5, 9)])
        assert found.refits._bytes <= bound
    assert values[0] == values[1]


def test_roles_that_masking_cannot_stand_for_are_refused() -> None:
    model = tiny_llama()
    groups = discover(model)
    hidden = groups.prunable(["hidden"])
    steps = make_steps(load_calibration(ids(2)), torch.device("cpu"))
    with pytest.raises(PyPruneError, match=r"roles 'hidden': search masks units"):
        find_sites(model, [model], hidden, {}, steps)


class Experts(nn.Module):
    """Experts with modules of their own, each run only for the tokens that are sent to it: every other of long text."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.experts = nn.ModuleList([mlp, copy.deepcopy(mlp)])

    def forward(self, hidden: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        chosen = torch.arange(hidden.shape[1]) % 2 * (hidden.shape[1] > 4)
        for number, expert in enumerate(self.experts):
            if bool((chosen == number).any()):
                out[:, chosen == number] = expert(hidden[:, chosen == number])
        return out


def test_an_expert_that_the_first_samples_do_not_reach_is_masked_too() -> None:
    model = tiny_llama()
    model.model.layers[1].mlp = Experts(model.model.layers[1].mlp)
    batches = [{"input_ids": ids(2, length)} for length in (4, 8)]
    steps = make_steps(batches, torch.device("cpu"))
    cut = [g for g in discover(model) if ".experts." in g.name and g.role in ("ffn", "expert_ffn")]
    assert len(cut) == 2
    found = find_sites(model, model.model.layers, cut, {}, steps)
    assert set(found.block_of) == {g.name for g in cut}
    assert list(found.read) == [f"model.layers.1.mlp.experts.{k}.down_proj.weight" for k in (0, 1)]
    with pytest.raises(PyPruneError, match=r"no matrix product reads or makes the units of .* on the calibration text"):
        find_sites(model, model.model.layers, cut, {}, steps[:1])


def test_a_dense_model_with_nan_is_refused() -> None:
    model = tiny_llama()
    found = Set(model, {"widths": {"ffn": 12}})
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(PyPruneError, match="gives logits with NaN or infinity"):
        found.fitness()


def test_a_candidate_that_gives_nan_is_the_worst() -> None:
    found = Set(tiny_llama(), {"widths": {"ffn": 12}})
    fitness = found.fitness()
    found.refits._matrix = lambda key, weight, bias, widths: _nan(weight)  # type: ignore[method-assign]
    assert fitness.of(found.widths) == float("inf")


def _nan(weight: Tensor) -> Exchanged:
    return Exchanged(torch.full_like(weight, float("nan")))


def test_few_tokens_leave_columns_near_what_they_were() -> None:
    assert penalty(100, 400) == penalty(100, 10_000) == PENALTY
    assert penalty(100, 40) == pytest.approx(10 * PENALTY)
