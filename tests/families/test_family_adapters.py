"""Adapters make constructors honour what the configuration says, and change nothing else."""

from __future__ import annotations

import copy
import json

import helpers_surgery as h
import pytest
import torch
from transformers import GPT2LMHeadModel

from pyprune import families
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
