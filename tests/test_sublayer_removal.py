"""Attention or FFN blocks out of real classes: what is left computes what the old model does with zeros for them."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers_fresh import ask, fresh_answers, own_answer
from helpers_run import tiny_llama as saved_llama
from helpers_surgery import tiny
from test_layer_removal import MODELS, blocks_of, double_a_matrix, ids, tokens
from torch.nn.functional import cosine_similarity, cross_entropy

import pyprune
from pyprune.discovery import discover
from pyprune.errors import PyPruneError
from pyprune.importance.depth import score_layers
from pyprune.selection.layers import removable, without
from pyprune.selection.quantities import measure_budget
from pyprune.surgery import apply

NAMES = {"llama": ("self_attn", "mlp"), "gpt2": ("attn", "mlp"), "gemma3": ("self_attn", "mlp")}
PARTS = ("attention", "ffn")


def part_of(model, family: str, part: str, layer: int):
    return getattr(blocks_of(model)[layer], NAMES[family][PARTS.index(part)])


def giving_zeros(model, family: str, gone: list[tuple[str, int]]):
    """A copy whose blocks give zeros, by forwards of this file's own."""
    out = copy.deepcopy(model)
    for part, layer in gone:
        module = part_of(out, family, part, layer)
        real = module.forward

        def zeros(*args, real=real, **kwargs):
            given = real(*args, **kwargs)
            return (torch.zeros_like(given[0]), *given[1:]) if isinstance(given, tuple) else torch.zeros_like(given)

        module.forward = zeros
    return out


def plan_for(model, part: str, gone: list[int]):
    groups = discover(model)
    return without(groups, removable(groups, len(gone), None, part, model.config)[0], gone)


def generated(model, **options):
    return model.generate(ids(2, 9), max_new_tokens=8, do_sample=False, pad_token_id=2, **options)


@pytest.mark.parametrize("family", MODELS)
def test_the_cut_model_is_the_old_one_with_zeros_for_those_blocks(family: str, tmp_path) -> None:
    model = MODELS[family]()
    expected = giving_zeros(model, family, [("attention", 1), ("attention", 3), ("ffn", 0), ("ffn", 3)])
    groups = discover(model)
    fewer = apply(model, plan_for(model, "attention", [1, 3]), copy=True)
    smaller = apply(fewer, plan_for(fewer, "ffn", [0, 3]), copy=True)
    with torch.no_grad():
        assert (smaller(ids()).logits - expected(ids()).logits).abs().max() < 1e-5
    gone = [n for n, _ in model.named_parameters() if n not in dict(smaller.named_parameters())]
    inside = {id(p) for part, i in [("attention", 1), ("attention", 3), ("ffn", 0), ("ffn", 3)]
              for p in part_of(model, family, part, i).parameters()}  # fmt: skip
    assert {id(p) for n, p in model.named_parameters() if n in gone} == inside
    assert smaller.num_parameters() == groups.num_parameters() - sum(groups.numel(n) for n in gone)

    pyprune.save(smaller, None, tmp_path / "out")
    again = pyprune.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(ids()).logits, smaller(ids()).logits)
    assert torch.equal(generated(again, use_cache=True), generated(again, use_cache=False))


@pytest.mark.slow
def test_plain_transformers_opens_the_export_with_its_own_logits_and_tokens(tmp_path) -> None:
    folders, expected = [], []
    for number, (family, part) in enumerate([("llama", "attention"), ("gpt2", "ffn")]):
        model = MODELS[family]()
        smaller = apply(model, plan_for(model, part, [1, 2]))
        folders.append(pyprune.export(smaller, tmp_path / str(number), "hetero-hf"))
        ask(folders[-1], ids(2, 9))
        expected.append(own_answer(smaller, ids(2, 9), new=8))
    for found, own in zip(fresh_answers(folders, tmp_path / "code", new=8), expected, strict=True):
        assert torch.allclose(found["logits"], own["logits"], rtol=1e-5, atol=1e-5)
        assert torch.equal(found["said"], own["said"])


@torch.no_grad()
def stream_behind(model, layer: int) -> torch.Tensor:
    seen = []
    hook = blocks_of(model)[layer].register_forward_hook(lambda m, a, o: seen.append(o[0] if type(o) is tuple else o))
    model(ids())
    hook.remove()
    return seen[0].double()


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_influence_compares_what_leaves_the_layer_with_and_without_the_block(family: str, part: str) -> None:
    model = MODELS[family]()
    expected = []
    for layer in range(4):
        y, x = stream_behind(model, layer), stream_behind(giving_zeros(model, family, [(part, layer)]), layer)
        expected.append(1 - float(cosine_similarity(x, y, dim=-1).mean()))
    group = removable(discover(model), 1, None, part)[0]
    before = copy.deepcopy(model.state_dict())
    assert score_layers(model, group, ids(), 1)[group.name][0].tolist() == pytest.approx(expected, rel=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or "forward" in m.__dict__ for m in model.modules())


@torch.no_grad()
def loss_of(model) -> float:
    logits = model(ids(), use_cache=False).logits.double()
    return float(cross_entropy(logits[:, :-1].flatten(0, 1), ids()[:, 1:].flatten()))


@pytest.mark.parametrize("part", PARTS)
def test_perplexity_removes_the_block_whose_absence_costs_least_one_after_the_other(part: str) -> None:
    model = tiny("llama")
    tried, gone, losses = list(range(part == "attention", 4)), [], []
    for _ in range(2):
        found = {
            i: loss_of(giving_zeros(model, "llama", [(part, j) for j in (*gone, i)])) for i in tried if i not in gone
        }
        gone.append(min(found, key=found.__getitem__))
        losses.append(found[gone[-1]])
    plan = pyprune.select_layers(model, discover(model), ids(), 2, "perplexity", part=part)
    assert plan.details["removal_order"] == gone
    assert plan.details["losses"] == pytest.approx(losses, rel=1e-5)


def test_the_attention_that_a_cache_is_measured_by_stays() -> None:
    gemma = MODELS["gemma3"]()  # kinds: sliding, sliding, full, twice
    assert removable(discover(gemma), 1, None, "attention", gemma.config)[2] == (0, 2)
    llama = tiny("llama")
    assert removable(discover(llama), 1, None, "attention", llama.config)[2] == (0,)
    with pytest.raises(PyPruneError, match=r"remove_layers 4: is too many: the model has 4 layers with attention, 1"):
        pyprune.select_layers(llama, discover(llama), ids(), 4, part="attention")


@pytest.mark.parametrize(
    "more",
    [
        {"ratio": 0.35},
        {"ratio": 0.35, "iterative_steps": 2},
        {"ratio": 0.35, "compensation": "least-squares", "criterion": "wanda"},
    ],
)
@pytest.mark.parametrize("part", PARTS)
def test_blocks_first_and_widths_then_come_to_the_total_asked_for(part: str, more) -> None:
    dense = saved_llama()
    out = pyprune.prune(dense, remove_layers=1, layer_part=part, calibration=tokens(), copy=True, **more)
    assert out.report.parameters["with_embeddings"]["ratio"] == pytest.approx(0.35, abs=0.005)
    assert out.model.num_parameters() == out.report.parameters["with_embeddings"]["after"]
    assert len(out.model.config.pyprune_skipped) == 1 and out.report.depth["layer_part"] == part
    if "compensation" not in more:
        again = apply(dense, out.plan, copy=True)
        assert all(torch.equal(v, out.model.state_dict()[k]) for k, v in again.state_dict().items())


def test_a_cut_model_is_cut_again_layers_and_widths_and_blocks() -> None:
    model = tiny("llama")
    first = apply(model, plan_for(model, "attention", [1, 2]), copy=True)
    out = pyprune.prune(first, remove_layers=1, widths={"ffn": 0.5, "kv_heads": 1}, calibration=ids(), copy=True)
    (gone,) = out.plan.details["removed_layers"]
    left = [i for i in (0, 1, 2, 3) if i != gone]
    skipped = [f"model.layers.{left.index(i)}.self_attn" for i in (1, 2) if i != gone]
    assert list(out.model.config.pyprune_skipped) == skipped
    assert len(out.model.model.layers) == 3
    second = pyprune.prune(first, remove_layers=1, layer_part="attention", calibration=ids(), copy=True)
    assert sorted(second.model.config.pyprune_skipped) == [f"model.layers.{i}.self_attn" for i in (1, 2, 3)]


def test_no_layer_without_attention_comes_first() -> None:
    """A cache would be taken for empty: tokens behind it would get wrong positions."""
    model = tiny("llama")
    first = apply(model, plan_for(model, "attention", [1]), copy=True)
    groups = discover(first)
    assert removable(groups, 1, None, "layer", first.config)[2] == (0,)
    assert removable(groups, 1, None, "ffn", first.config)[2] == ()
    group = removable(groups, 1)[0]
    with pytest.raises(PyPruneError, match="says other things with a KV cache"):
        apply(first, without(groups, group, [0]), copy=True)
    fine = apply(first, without(groups, group, [2]), copy=True)
    assert torch.equal(generated(fine, use_cache=True), generated(fine, use_cache=False))


def test_a_budget_of_memory_counts_no_cache_of_attention_that_is_gone() -> None:
    model = tiny("llama")
    smaller = apply(model, plan_for(model, "attention", [1, 2]), copy=True)
    terms = [measure_budget(m, discover(m), "memory").terms for m in (model, smaller)]
    assert [len(t) for t in terms] == [8, 4]


def test_a_wrong_cut_is_noticed(monkeypatch) -> None:
    model = tiny("llama")
    double_a_matrix(monkeypatch)
    with pytest.raises(PyPruneError, match="the smaller model is not the old one"):
        apply(model, plan_for(model, "attention", [1]), copy=True)


def opt():
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    return OPTForCausalLM(
        OPTConfig(vocab_size=128, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4,
                  max_position_embeddings=64, word_embed_proj_dim=32)
    ).eval()  # fmt: skip


def test_what_is_no_module_of_its_own_is_refused() -> None:
    model = opt()
    with pytest.raises(PyPruneError, match="layer_part 'ffn': ffn can only go where it is a module of its own"):
        pyprune.select_layers(model, discover(model), ids(), 1, part="ffn")
    plan = pyprune.select_layers(model, discover(model), ids(), 1, part="attention")
    assert len(apply(model, plan).config.pyprune_skipped) == 1


def made(name: str, **sizes):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vocab_size=128, bos_token_id=0, eos_token_id=1, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


BERT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
CARRIERS = [
    ("Bloom", {"hidden_size": 32, "n_layer": 3, "n_head": 4}, "attention", "transformer.h.1.self_attention"),
    ("Bloom", {"hidden_size": 32, "n_layer": 3, "n_head": 4}, "ffn", "transformer.h.1.mlp"),
    ("Mpt", {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64}, "ffn", "transformer.blocks.1.ffn"),
    ("Bert", {**BERT, "is_decoder": True}, "attention", "bert.encoder.layer.1.attention"),
]


@pytest.mark.parametrize(("name", "sizes", "part", "block"), CARRIERS)
def test_a_block_that_adds_the_residual_itself_is_not_removed(name: str, sizes, part: str, block: str) -> None:
    """Zeros in its place would leave a model that says the same whatever it is asked."""
    model = made(name, **sizes)
    with pytest.raises(PyPruneError, match=rf"layer_part: {block} carries the residual stream itself"):
        apply(model, plan_for(model, part, [1]))


def test_a_block_that_carries_the_stream_is_refused_before_anything_is_scored(monkeypatch) -> None:
    def never(*args, **kwargs):
        raise AssertionError("scored")

    monkeypatch.setattr("pyprune.layer_removal.score_layers", never)
    name, sizes, part, _ = CARRIERS[0]
    with pytest.raises(PyPruneError, match="carries the residual stream itself"):
        pyprune.prune(made(name, **sizes), remove_layers=1, layer_part=part, calibration=ids())


def test_a_block_beside_one_that_carries_the_stream_goes() -> None:
    model = made("Mpt", **CARRIERS[2][1])
    expected = copy.deepcopy(model)
    real = expected.transformer.blocks[1].attn.forward
    expected.transformer.blocks[1].attn.forward = lambda *a, **k: (torch.zeros_like(a[0]), *real(*a, **k)[1:])
    smaller = apply(model, plan_for(model, "attention", [1]), copy=True)
    with torch.no_grad():
        assert (smaller(ids()).logits - expected(ids()).logits).abs().max() < 1e-5


def test_a_class_without_a_cache_loses_a_block_too() -> None:
    model = made("OpenAIGPT", n_embd=32, n_layer=3, n_head=4, n_positions=64)
    smaller = apply(model, plan_for(model, "ffn", [1]))
    assert list(smaller.config.pyprune_skipped) == ["transformer.h.1.mlp"]


@pytest.mark.parametrize("part", PARTS)
def test_hidden_channels_are_cut_beside_blocks_that_go(part: str) -> None:
    out = pyprune.prune(
        saved_llama(), remove_layers=1, layer_part=part, widths={"hidden": 24}, criterion="l2", calibration=tokens()
    )
    assert out.model.config.hidden_size == 24 and len(out.model.config.pyprune_skipped) == 1
    assert out.model.num_parameters() == out.report.parameters["with_embeddings"]["after"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"remove_layers": 1, "layer_part": "mlp"}, "layer_part 'mlp': is not known"),
        ({"ratio": 0.2, "layer_part": "ffn"}, "layer_part 'ffn': says what goes of layers, and none are removed"),
        (
            {"ratio": 0.2, "layer_criterion": "perplexity"},
            "layer_criterion 'perplexity': says what goes of layers, and",
        ),
        ({"remove_layers": 1, "layer_part": "ffn", "ratio": 0.05}, "remove_layers 1: 1 FFNs alone are"),
        (
            {"remove_layers": 1, "layer_part": "ffn", "profile": "uniform"},
            "profile 'uniform': holds what the stock class",
        ),
        ({"remove_layers": 1, "layer_part": "ffn", "profile": "gguf"}, "profile 'gguf': is written for layers with"),
    ],
)
def test_requests_that_cannot_be_met_are_refused_before_anything_is_scored(options, line: str, monkeypatch) -> None:
    def never(*args, **kwargs):
        raise AssertionError("scored")

    monkeypatch.setattr("pyprune.layer_removal.score_layers", never)
    with pytest.raises(PyPruneError) as told:
        pyprune.prune(saved_llama(), calibration=tokens(), **options)
    assert str(told.value).startswith(line)
