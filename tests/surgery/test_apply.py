"""A plan becomes a dense, smaller model that computes what the masked one computes."""

from __future__ import annotations

import copy
import warnings

import helpers_surgery as h
import pytest
import torch
from transformers import LlamaModel

from pyprune.discovery import discover
from pyprune.errors import PyPruneError
from pyprune.selection.plan import Cut, Plan
from pyprune.surgery import apply

PLANS = {"uniform": h.uniform, "per layer": h.ragged}


def generate(model, use_cache: bool) -> torch.Tensor:
    return model.generate(h.tokens(6), max_new_tokens=12, do_sample=False, use_cache=use_cache)


@pytest.mark.parametrize("shape", PLANS)
@pytest.mark.parametrize("family", h.FAMILIES)
def test_slicing_equals_masking(family, shape):
    model = h.tiny(family)
    plan = PLANS[shape](model)
    masked = copy.deepcopy(model)
    h.mask_(masked, plan)
    small = apply(model, plan, verify=False)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in masked.parameters())
    assert (h.logits(small) - h.logits(masked)).abs().max() <= 1e-4
    assert (h.logits(masked) - h.logits(h.tiny(family))).abs().max() > 0.1  # the cut units mattered


@pytest.mark.parametrize("shape", PLANS)
@pytest.mark.parametrize("family", h.FAMILIES)
def test_generation_with_a_cache_gives_the_tokens_of_generation_without(family, shape):
    model = h.tiny(family)
    small = apply(model, PLANS[shape](model))
    assert torch.equal(generate(small, True), generate(small, False))


@pytest.mark.parametrize("family", h.FAMILIES)
def test_a_plan_without_cuts_gives_bit_identical_logits(family):
    model = h.tiny(family)
    before = h.logits(model)
    assert torch.equal(h.logits(apply(model, Plan())), before)


@pytest.mark.parametrize("family", h.FAMILIES)
def test_the_smaller_model_is_of_the_same_class_with_the_planned_shapes(family):
    model = h.tiny(family)
    plan = h.uniform(model)
    wanted = plan.new_shapes({n: tuple(t.shape) for n, t in model.named_parameters()})
    small = apply(model, plan)
    assert type(small) is type(model)
    assert {n: tuple(t.shape) for n, t in small.named_parameters()} == wanted


def test_query_heads_stay_equal_in_every_kv_head():
    model = h.tiny("llama", num_attention_heads=12, num_key_value_heads=4, head_dim=4)
    groups = h.groups_of(model)
    small = apply(model, h.uniform_plan(groups, kv_heads=3, query_heads=2))
    attention = small.model.layers[0].self_attn
    assert (attention.q_proj.out_features, attention.k_proj.out_features) == (3 * 2 * 4, 3 * 4)
    assert attention.num_key_value_groups == 2
    assert (small.config.num_attention_heads, small.config.num_key_value_heads, small.config.head_dim) == (6, 3, 4)


def test_uniform_widths_are_plain_configuration_values():
    model = h.tiny("qwen2")
    small = apply(model, h.uniform(model))
    assert not small.config.is_heterogeneous
    c = small.config
    assert (c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.intermediate_size) == (6, 3, 6, 23)


def test_per_layer_widths_are_recorded_as_sparse_overrides():
    model = h.tiny("llama")
    small = apply(model, h.ragged(model))
    overrides = small.config.to_dict()["per_layer_config"]
    assert overrides == {
        "1": {"num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 35},
        "2": {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 30},
        "3": {"num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 25},
    }
    assert small.config.intermediate_size == 40  # the common value is the original one


def test_an_attribute_that_all_layers_share_stays_common_when_another_differs():
    model = h.tiny("llama")
    groups = h.groups_of(model)
    cuts = [h.cut(g, 3) for g in groups if g.role == "kv_heads"]
    cuts += [h.cut(g, 30 + g.layer) for g in groups if g.role == "ffn"]
    small = apply(model, Plan(tuple(cuts)))
    overrides = small.config.to_dict()["per_layer_config"]
    assert small.config.num_key_value_heads == 3
    assert {k for own in overrides.values() for k in own} == {"intermediate_size"}


def test_layers_with_their_own_widths_follow_a_later_change_of_the_attention_implementation():
    model = h.tiny("llama")
    small = apply(model, h.ragged(model))
    before = h.logits(small)
    small.set_attn_implementation("eager")
    assert {layer.self_attn.config._attn_implementation for layer in small.model.layers} == {"eager"}
    assert torch.allclose(h.logits(small), before, atol=1e-5)


def test_a_model_with_its_own_widths_can_be_copied():
    model = h.tiny("llama")
    small = apply(model, h.ragged(model))
    twin = copy.deepcopy(small)
    twin.set_attn_implementation("eager")
    assert small.model.layers[2].self_attn.config._attn_implementation == "sdpa"
    assert twin.model.layers[2].self_attn.config._attn_implementation == "eager"


@pytest.mark.parametrize("family", h.FAMILIES)
def test_removed_layers_are_gone_and_the_rest_compute_as_before(family):
    model = h.tiny(family)
    groups = h.groups_of(model)
    layers = next(g for g in groups if g.role == "layers")
    path = layers.modules[0].rpartition(".")[0]
    reference = copy.deepcopy(model)
    kept = (0, 2, 3)
    stack = torch.nn.ModuleList(reference.get_submodule(path)[i] for i in kept)
    reference.get_submodule(path.rpartition(".")[0]).register_module(path.rpartition(".")[2], stack)
    reference.config.num_hidden_layers = 3

    small = apply(model, Plan((Cut(layers, (kept,)),)))
    with torch.no_grad():
        expected = reference(h.tokens(), use_cache=False).logits
    assert torch.equal(h.logits(small), expected)
    assert small.config.num_hidden_layers == 3
    assert torch.equal(generate(small, True), generate(small, False))


def test_lists_with_one_entry_a_layer_lose_the_removed_layers():
    types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    model = h.tiny("qwen3", layer_types=types, use_sliding_window=True, sliding_window=4)
    layers = next(g for g in h.groups_of(model) if g.role == "layers")
    small = apply(model, Plan((Cut(layers, ((1, 2, 3),)),)))
    assert small.config.layer_types == types[1:]
    assert [layer.self_attn.layer_idx for layer in small.model.layers] == [0, 1, 2]


def test_layers_and_per_layer_widths_together():
    model = h.tiny("llama")
    groups = h.groups_of(model)
    layers = next(g for g in groups if g.role == "layers")
    cuts = [c for c in h.ragged_plan(groups).cuts if c.group.layer != 1]
    small = apply(model, Plan((Cut(layers, ((0, 2, 3),)), *cuts)))
    assert [layer.mlp.up_proj.out_features for layer in small.model.layers] == [40, 30, 25]
    assert torch.equal(generate(small, True), generate(small, False))


def test_the_residual_stream_can_be_narrowed():
    model = h.tiny("qwen2")
    small = apply(model, h.uniform_plan(h.groups_of(model), hidden=36))
    assert small.config.hidden_size == 36
    assert small.config.head_dim == 6  # what 48 over 8 heads was
    assert h.logits(small).isfinite().all()


def test_a_pruned_model_can_be_pruned_again():
    model = h.tiny("llama")
    once = apply(model, h.ragged(model))
    groups = h.llama_like(once)
    plan = Plan(tuple(h.cut(g, 10) for g in groups if g.role == "ffn"))
    masked = copy.deepcopy(once)
    h.mask_(masked, plan)
    twice = apply(once, plan)
    assert (h.logits(twice) - h.logits(masked)).abs().max() <= 1e-4
    assert twice.config.intermediate_size == 10
    assert set(twice.config.to_dict()["per_layer_config"]["3"]) == {"num_attention_heads", "num_key_value_heads"}


def test_ties_are_those_of_the_model():
    tied = h.tiny("llama", tie_word_embeddings=True)
    tied.tie_weights()
    small = apply(tied, h.uniform(tied))
    assert small.lm_head.weight is small.model.embed_tokens.weight
    untied = h.tiny("llama")
    small = apply(untied, h.uniform(untied))
    assert small.lm_head.weight is not small.model.embed_tokens.weight


def test_modes_gradients_types_and_generation_settings_are_carried_over():
    model = h.tiny("llama").to(torch.bfloat16).train()
    model.model.layers[1].mlp.eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.generation_config.temperature = 0.25
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    small = apply(model, h.uniform(model))
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert small.training and small.model.layers[0].mlp.training and not small.model.layers[1].mlp.training
    assert not small.model.embed_tokens.weight.requires_grad and small.lm_head.weight.requires_grad
    assert small.generation_config.temperature == 0.25
    assert any(getattr(m, "gradient_checkpointing", False) for m in small.modules())


def test_buffers_that_no_checkpoint_holds_are_carried_over():
    model = h.tiny("llama")
    model.model.rotary_emb.inv_freq.mul_(0.5)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    small = apply(model, h.uniform(model))
    assert torch.equal(small.model.rotary_emb.inv_freq, frequencies)


def test_the_smaller_model_trains():
    model = h.tiny("llama")
    small = apply(model, h.ragged(model))
    small(h.tokens(), labels=h.tokens()).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())


def test_a_copy_leaves_the_model_alone():
    model = h.tiny("llama")
    before = h.logits(model)
    small = apply(model, h.uniform(model), copy=True)
    assert torch.equal(h.logits(model), before)
    owners = {p.data_ptr() for p in model.parameters()}
    assert not owners & {p.data_ptr() for p in small.parameters()}


def test_without_a_copy_the_weights_move():
    model = h.tiny("llama")
    embeddings = model.model.embed_tokens.weight
    small = apply(model, h.uniform(model))
    assert small.model.embed_tokens.weight.data_ptr() == embeddings.data_ptr()
    assert all(p.is_meta for p in model.parameters())


def test_planning_on_the_meta_device_needs_no_weights():
    with torch.device("meta"):
        model = h.tiny("llama")
    small = apply(model, h.ragged(model), copy=True)
    assert small.model.layers[3].mlp.up_proj.weight.shape == (25, 48)


def test_a_cut_that_the_arithmetic_depends_on_elsewhere_is_caught():
    model = h.tiny("llama")
    groups = h.groups_of(model)
    group = next(g for g in groups if g.role == "ffn")
    wrong = h.Group(group.name, "ffn", group.module, 0, 40, group.members[1:])  # gate_proj forgotten
    members = (h.Member("model.layers.0.mlp.gate_proj.weight", 0, h.IndexMap(1, 40, (h.Lattice(39, 0, -1),))),)
    wrong = h.Group(group.name, "ffn", group.module, 0, 40, members + wrong.members)  # and then reversed
    with pytest.raises(PyPruneError, match="not the old one without the removed units"):
        apply(model, Plan((h.cut(wrong, 20),)))


@pytest.mark.parametrize("scale", [lambda x, size: x * size**0.5, lambda x, size: x * torch.tensor(size**0.5)])
def test_a_number_that_forward_computes_from_a_removed_size_is_caught(scale, monkeypatch):
    real = LlamaModel.forward

    def scaled(self, input_ids=None, inputs_embeds=None, **more):
        return real(self, inputs_embeds=scale(self.embed_tokens(input_ids), self.config.hidden_size), **more)

    monkeypatch.setattr(LlamaModel, "forward", scaled)
    model = h.tiny("llama")
    plan = h.uniform_plan(h.groups_of(model), hidden=36)
    with pytest.raises(PyPruneError, match=r"arithmetic: (mul|lift_fresh) 6 where .* 6\.9282\. Leave hidden whole"):
        apply(model, plan)


def test_a_plan_for_another_model_is_refused():
    plan = h.uniform(h.tiny("llama"))
    with pytest.raises(PyPruneError, match=r"made for another model") as caught:
        apply(h.tiny("llama", intermediate_size=20), plan)
    assert caught.value.option == "plan"
    with pytest.raises(PyPruneError, match="no such tensor"):
        apply(h.tiny("gpt2"), plan)


def test_a_plan_for_a_narrower_model_is_refused_while_the_weights_are_there():
    found = discover(h.tiny("llama"))
    plan = Plan.from_json(h.uniform_plan(found, ffn=20).to_json())
    wider = h.tiny("llama", intermediate_size=96)
    with pytest.raises(PyPruneError, match=r"made for another model") as caught:
        apply(wider, plan)
    assert "dimension 0 of 40; this model has [96, 48]" in str(caught.value)
    assert not any(p.is_meta for p in wider.parameters())
    assert apply(h.tiny("llama"), plan).config.intermediate_size == 20


def test_what_cannot_be_pruned_is_refused_by_name():
    plan = Plan()
    with pytest.raises(PyPruneError, match="is not a transformers model"):
        apply(torch.nn.Linear(2, 2), plan)
    hooked = h.tiny("llama")
    hooked.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(PyPruneError, match=r"model.layers.1.mlp.*1 hooks"):
        apply(hooked, plan)
    extended = h.tiny("llama")
    extended.model.layers[0].mlp.extra = torch.nn.Linear(2, 2)
    with pytest.raises(PyPruneError, match=r"model.layers.0.mlp.extra.bias.*its class does not create it"):
        apply(extended, plan)


def test_an_adapter_has_to_be_merged_first():
    import peft

    model = peft.get_peft_model(h.tiny("llama"), peft.LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(PyPruneError, match="merge_and_unload"):
        apply(model, Plan())


def test_a_compiled_wrapper_is_taken_off():
    model = h.tiny("llama")
    plan = h.uniform(model)
    expected = h.logits(apply(model, plan, copy=True))
    assert torch.equal(h.logits(apply(torch.compile(model), plan)), expected)


def test_head_counts_that_a_configuration_class_refuses_are_no_obstacle():
    model = h.tiny("llama", hidden_size=40)  # 6 heads do not divide 40
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = apply(model, h.uniform(model))
    assert small.config.num_attention_heads == 6
    assert torch.equal(generate(small, True), generate(small, False))


@pytest.mark.parametrize("copied", [False, True])
def test_a_model_that_does_not_run_is_told_before_its_weights_change(copied):
    model = h.tiny("llama")
    plan = h.uniform(model)
    model.model.layers[1].mlp.to(torch.bfloat16)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(PyPruneError, match=r"model 'LlamaForCausalLM': does not run on token ids: .* one data type"):
        apply(model, plan, copy=copied)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
