"""Cuts that no configuration expresses are made by modules of other sizes, with the counts that they need."""

from __future__ import annotations

import copy

import helpers_surgery as h
import pytest
import torch
from helpers_discovery import half, liven, logits, masked
from helpers_families import build

from pyprune.checkpoint import load, save
from pyprune.discovery import discover
from pyprune.errors import PyPruneError
from pyprune.selection.plan import Cut, Plan
from pyprune.surgery import apply, skeleton
from pyprune.surgery.narrow import NarrowLinear

pytestmark = pytest.mark.filterwarnings("ignore:No .* expresses")


@pytest.fixture
def model(tmp_path):
    """Six heads, three KV heads, both as wide as ``hidden_size // num_heads``."""
    return build("StableLM", tmp_path)


def attention(model, layer: int):
    return model.model.layers[layer].self_attn


def test_heads_keep_their_width_where_the_class_computes_it_from_their_number(model):
    plan = half(discover(model).prunable(["kv_heads"]))
    with pytest.warns(
        UserWarning, match=r"No StableLmConfig expresses .* modules are resized, for pyprune.load and profile hetero-hf"
    ):
        small = apply(model, plan)
    first = attention(small, 0)
    assert (first.num_heads, first.num_key_value_heads, first.num_key_value_groups, first.head_dim) == (2, 1, 2, 8)
    assert first.q_proj.weight.shape == (16, 48) and first.q_proj.out_features == 16
    assert first.o_proj.weight.shape == (48, 16) and first.o_proj.in_features == 16
    assert not any(isinstance(m, NarrowLinear) for m in small.modules())
    assert small.config.num_attention_heads == 6 and not skeleton.is_stock(small.config)


def test_query_heads_go_alone(model):
    plan = half(discover(model).prunable(["query_heads"]))
    expected = logits(masked(model, plan))
    small = apply(model, plan)
    assert (attention(small, 0).num_heads, attention(small, 0).num_key_value_groups) == (3, 1)
    assert (logits(small) - expected).abs().max() <= 1e-4


def test_layers_may_differ(model, tmp_path):
    groups = {g.layer: g for g in discover(model).prunable(["kv_heads"])}
    plan = Plan((Cut(groups[0], ((0, 2),)), Cut(groups[1], ((1,),))))
    expected = logits(masked(model, plan))
    small = apply(model, plan)
    assert [attention(small, i).num_heads for i in (0, 1)] == [4, 2]
    assert (logits(small) - expected).abs().max() <= 1e-4
    assert torch.equal(logits(load(save(small, None, tmp_path / "small"))), logits(small))


def test_resized_modules_keep_their_place_when_layers_before_them_go(model, tmp_path):
    groups = discover(model)
    heads = {g.layer: g for g in groups.prunable(["kv_heads"])}
    layers = next(g for g in groups if g.role == "layers")
    small = apply(model, Plan((Cut(heads[1], ((1,),)), Cut(layers, ((1,),)))))
    assert attention(small, 0).num_heads == 2
    assert next(iter(small.config.pyprune_resized)).startswith("model.layers.0.")
    assert torch.equal(logits(load(save(small, None, tmp_path / "small"))), logits(small))


def test_a_resized_model_is_pruned_again(model, tmp_path):
    small = apply(model, half(discover(model).prunable(["query_heads"])))
    plan = half(discover(small).prunable(["kv_heads", "ffn"]))
    expected = logits(masked(small, plan))
    smaller = apply(small, plan)
    assert smaller.config.intermediate_size == 20
    assert smaller.num_parameters() < small.num_parameters()
    assert (logits(smaller) - expected).abs().max() <= 1e-4
    assert torch.equal(logits(load(save(smaller, None, tmp_path / "smaller"))), logits(smaller))


def test_channels_of_an_ffn_without_a_width_of_its_own(tmp_path):
    model = build("MPT", tmp_path)
    before = dict(skeleton.families._FAMILIES)
    skeleton.families._FAMILIES.clear()
    try:
        small = apply(model, half(discover(model).prunable(["ffn"])))
        assert small.transformer.blocks[0].ffn.up_proj.out_features == 96
        assert list(small.config.pyprune_resized["transformer.blocks.0.ffn.up_proj"]) == ["weight"]
    finally:
        skeleton.families._FAMILIES.update(before)


def test_resized_modules_train_and_can_be_copied(model):
    small = apply(model, half(discover(model).prunable(["kv_heads"])))
    twin = copy.deepcopy(small)
    twin(h.tokens() % 100, labels=h.tokens() % 100).loss.backward()
    assert attention(twin, 1).k_proj.weight.grad.abs().sum() > 0


def test_stock_only_refuses_resized_modules(model):
    with pytest.raises(PyPruneError, match=r"no StableLmConfig gives .* Leave kv_heads whole"):
        apply(model, half(discover(model).prunable(["kv_heads", "ffn"])), stock_only=True)


def test_planning_on_the_meta_device_needs_no_weights(model):
    plan = half(discover(model).prunable(["kv_heads"]))
    small = apply(model.to("meta"), plan)
    assert attention(small, 0).num_heads == 2 and attention(small, 0).q_proj.weight.is_meta


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"model.layers.7.mlp": {"weight": [3]}}, "is no module of the model"),
        ({"model.layers.0.mlp": {"weight": [3]}}, r"mlp.weight.*is nothing that StableLmMLP has there"),
        ({"model.layers.0.self_attn": {"heads": 3}}, r"self_attn.heads.*is nothing that StableLmAttention has there"),
    ],
)
def test_a_record_that_does_not_fit_the_model_is_named(model, spec, message):
    config = copy.deepcopy(model.config)
    config.pyprune_resized = spec
    with pytest.raises(PyPruneError, match=message):
        skeleton.build(type(model), config)


def test_a_table_by_position_is_never_taken_for_counts(tmp_path):
    """Falcon with ALiBi: with fewer heads its slopes would be others, so its layers become narrow instead."""
    model = build("Falcon, ALiBi", tmp_path)
    plan = half(discover(model).thaw(["kv_heads"]).prunable(["kv_heads"]))
    expected = logits(masked(model, plan))
    with pytest.warns(UserWarning, match="layers become narrow"):
        small = apply(model, plan)
    layer = small.transformer.h[0].self_attention
    assert layer.num_heads == 6 and isinstance(layer.query_key_value, NarrowLinear)
    assert type(layer.query_key_value).__name__ == "NarrowFalconLinear"
    assert (logits(small) - expected).abs().max() <= 1e-4


def test_layers_of_several_kinds_in_one_class_are_built_as_the_kind_they_are(tmp_path):
    """Bamba's layer class takes its kind as an argument with a default."""
    model = build("Bamba (hybrid)", tmp_path)
    groups = discover(model)
    small = apply(model, half(groups.prunable(["kv_heads", "ffn"])))
    assert small.config.num_key_value_heads == 1 and small.config.intermediate_size == 20
    assert skeleton.is_stock(small.config)


SMALL = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "vocab_size": 101,
}


def test_a_class_that_reads_per_layer_configurations_itself_gets_them(tmp_path):
    """Gemma 4's rotary tables follow the head widths of single layers."""
    import transformers as t

    sizes = {**SMALL, "num_key_value_heads": 3, "head_dim": 8, "global_head_dim": 16, "sliding_window": 4,
             "layer_types": ["sliding_attention", "full_attention"], "vocab_size_per_layer_input": 101,
             "hidden_size_per_layer_input": 10, "num_kv_shared_layers": 0}  # fmt: skip
    model = liven(t.Gemma4ForCausalLM(t.Gemma4TextConfig(**sizes)).eval())
    groups = discover(model)
    small = apply(model, half([g for g in groups.prunable(["kv_heads", "ffn"]) if g.units > 1]))
    assert torch.equal(logits(load(save(small, None, tmp_path / "small"))), logits(small))


def test_a_module_that_layers_share_is_cut_once(tmp_path):
    import transformers as t

    sizes = {**SMALL, "num_hidden_layers": 3, "num_key_value_heads": 6, "attention_hidden_size": 96,
             "attention_head_dim": 16, "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
             "mamba_d_state": 4, "mamba_dt_rank": 4, "n_mamba_heads": 2, "use_mamba_kernels": False}  # fmt: skip
    model = liven(t.ZambaForCausalLM(t.ZambaConfig(**sizes)).eval())
    plan = half(discover(model).prunable(["kv_heads", "ffn"]))
    expected = logits(masked(model, plan))
    small = apply(model, plan)
    first, second = (small.model.layers[i].shared_transf for i in (1, 2))
    assert first.self_attn.q_proj.weight is second.self_attn.q_proj.weight
    assert first.self_attn.q_proj.out_features == 48
    assert (logits(small) - expected).abs().max() <= 1e-4
    assert torch.equal(logits(load(save(small, None, tmp_path / "small"))), logits(small))
