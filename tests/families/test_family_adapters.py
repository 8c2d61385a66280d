"""Adapters make constructors honour what the configuration says, and change nothing else."""

from __future__ import annotations

import copy
import json

import helpers_surgery as h
import pytest
import torch
from helpers_discovery import half
from helpers_families import build
from transformers import GPT2LMHeadModel

from pyprune import families
from pyprune.checkpoint import load, save
from pyprune.discovery import discover
from pyprune.selection.plan import Cut, Plan
from pyprune.surgery import apply, skeleton
from pyprune.surgery.writable import refusal


def test_a_model_type_has_one_family():
    with pytest.raises(ValueError, match="has a family already: gpt2"):
        families.register(families.Family(name="again", model_types=("gpt2",)))


def test_families_are_found_by_model_type():
    assert families.find(h.tiny("gpt2").config).name == "gpt2"
    assert families.find(h.tiny("qwen2").config) is None
    assert {"gpt2", "llama"} <= {f.name for f in families.families()}


def test_gpt2_needs_no_adapter_while_heads_fill_the_hidden_size():
    config = h.tiny("gpt2").config
    assert skeleton.is_stock(config)
    config.head_dim = 8  # 6 heads of 8 are the hidden size of 48
    assert skeleton.is_stock(config)
    config.n_head = 5
    assert not skeleton.is_stock(config)


def test_gpt2_heads_keep_their_width():
    config = copy.deepcopy(h.tiny("gpt2").config)
    config.n_head, config.head_dim = 5, 8
    attention = skeleton.build(GPT2LMHeadModel, config).transformer.h[1].attn
    assert (attention.num_heads, attention.head_dim, attention.split_size) == (5, 8, 40)
    assert attention.c_attn.weight.shape == (48, 120) and attention.c_proj.weight.shape == (40, 48)
    assert attention.scaling == 8**-0.5 and attention.config is config


def test_a_head_count_whose_quotient_only_rounds_to_the_width_is_not_taken_for_stock():
    config = copy.deepcopy(h.tiny("gpt2", n_embd=16, n_head=8).config)
    config.n_head, config.head_dim = 7, 2  # 16 // 7 is 2 as well
    assert not skeleton.is_stock(config)
    assert skeleton.build(GPT2LMHeadModel, config).transformer.h[0].attn.c_attn.weight.shape == (16, 42)


@pytest.mark.parametrize(
    "options",
    [
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True, "attn_implementation": "eager"},
    ],
    ids=lambda o: next(iter(o)),
)
def test_gpt2_variants_compute_what_the_masked_model_computes(options):
    model = h.tiny("gpt2", **options)
    plan = h.ragged(model)
    masked = copy.deepcopy(model)
    h.mask_(masked, plan)
    small = apply(model, plan, verify=False)
    assert (h.logits(small) - h.logits(masked)).abs().max() <= 1e-4


def test_gpt2_with_cross_attention_is_built_whole():
    config = copy.deepcopy(h.tiny("gpt2", add_cross_attention=True).config)
    config.n_head, config.head_dim = 3, 8
    cross = skeleton.build(GPT2LMHeadModel, config).transformer.h[0].crossattention
    assert cross.c_attn.weight.shape == (48, 48) and cross.q_attn.weight.shape == (48, 24)


def test_the_stand_in_of_a_llama_is_the_same_network():
    model = h.tiny(
        "llama", rms_norm_eps=1e-4, rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
    )
    cls, config = families.find(model.config).stand_in(model.config)
    twin = cls(config).eval()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(h.logits(twin), h.logits(model))


def test_the_stand_in_of_a_llama_accepts_every_head_count():
    config = copy.deepcopy(h.tiny("llama").config)
    config.num_attention_heads = config.num_key_value_heads = 7
    assert "not a multiple" in refusal(config)
    _, other = families.find(config).stand_in(config)
    assert refusal(other) is None
    assert json.loads(other.to_json_string())["head_dim"] == 12


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_a_llama_with_biases_has_no_stand_in(bias):
    config = h.tiny("llama", **{bias: True}).config
    assert families.find(config).stand_in(config) is None


def test_alibi_heads_keep_their_slopes_in_every_layer(tmp_path):
    model = build("BLOOM", tmp_path)
    groups = discover(model).thaw(["kv_heads"]).prunable(["kv_heads"])
    plan = Plan((Cut(groups[0], ((1, 4, 5),)), Cut(groups[1], ((0, 2),))))
    masked = copy.deepcopy(model)
    h.mask_(masked, plan)
    small = apply(model, plan, verify=False)
    layers = [block.self_attention for block in small.transformer.h]
    assert [layer.num_heads for layer in layers] == [3, 2]
    assert [layer.kept_units.tolist() for layer in layers] == [[1, 4, 5], [0, 2]]
    assert small.config.alibi_heads == 6
    text = torch.randint(3, 100, (2, 12))
    padding = torch.ones(2, 12, dtype=torch.long)
    padding[0, :5] = 0
    for mask in (None, padding):
        with torch.no_grad():
            a, b = (m(text, attention_mask=mask).logits for m in (small, masked))
        assert (a - b)[padding.bool()].abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["BLOOM", "MPT"])
def test_alibi_survives_further_pruning_and_saving(name, tmp_path):
    model = build(name, tmp_path)
    small = apply(model, half(discover(model).thaw(["kv_heads"]).prunable(["kv_heads"])))
    attention = [m for m in small.modules() if hasattr(m, "kept_units")]
    before = [m.kept_units.tolist() for m in attention]
    groups = discover(small)
    heads = groups.prunable(["kv_heads"])
    layers = next(g for g in groups if g.role == "layers")
    cuts = (Cut(heads[0], ((0, 2),)), Cut(heads[1], ((1, 2),)), *half(groups.prunable(["ffn"])).cuts)
    masked = copy.deepcopy(small)
    h.mask_(masked, Plan(cuts))
    smaller = apply(small, Plan(cuts), copy=True, verify=False)
    assert (h.logits(smaller, 100) - h.logits(masked, 100)).abs().max() <= 1e-4
    last = apply(small, Plan((*cuts, Cut(layers, ((1,),)))))
    (kept,) = [m.kept_units.tolist() for m in last.modules() if hasattr(m, "kept_units")]
    assert kept == before[1][1:]
    loaded = load(save(last, None, tmp_path / "last"))
    assert torch.equal(h.logits(loaded, 100), h.logits(last, 100))


def test_a_dense_bloom_is_stock():
    from transformers import BloomConfig

    config = BloomConfig(hidden_size=48, n_head=6)
    assert skeleton.is_stock(config)
    config.head_dim, config.alibi_heads, config.intermediate_size = 8, 6, 192
    assert skeleton.is_stock(config)
    config.n_head = 3
    assert not skeleton.is_stock(config)


@pytest.mark.parametrize("name", ["GPT-NeoX", "GPT-J", "OPT"])
def test_the_width_of_heads_is_written_out_where_the_stock_class_divides(name, tmp_path):
    model = build(name, tmp_path)
    groups = {g.layer: g for g in discover(model).prunable(["kv_heads"])}
    plan = Plan((Cut(groups[0], ((0, 1, 2, 4, 5),)), Cut(groups[1], ((3,),))))
    small = apply(model, plan)
    assert small.config.head_dim == 8
    written = json.loads((save(small, None, tmp_path / "small") / "config.json").read_text())
    assert written["head_dim"] == 8 and "pyprune_resized" not in written
    loaded = load(tmp_path / "small")
    assert torch.equal(h.logits(loaded, 100), h.logits(small, 100))


def test_a_configuration_with_an_infinite_number_can_be_saved(tmp_path):
    assert refusal(build("Bamba (hybrid)", tmp_path).config) is None
