"""Values in their principal basis: the model stays what it was, and cuts of values lose less."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from helpers_compensation import ids, off
from helpers_discovery import liven
from helpers_llama import tiny_llama
from torch import nn

import pyprune
from pyprune import discover
from pyprune.basis import Rebased, change_basis
from pyprune.errors import PyPruneError
from pyprune.report.html import facts

pytestmark = pytest.mark.filterwarnings("ignore:No .* expresses the cuts:UserWarning")

LATENT = {
    "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 18, "kv_lora_rank": 14, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6, "v_head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "num_experts_per_tok": 2, "n_shared_experts": 1,
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "LlamaConfig": {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
                    "num_key_value_heads": 2, "attention_bias": True},
    "GPT2Config": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},  # q, k, v in one, [inputs, outputs]
    "OPTConfig": {"hidden_size": 32, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
                  "word_embed_proj_dim": 32, "max_position_embeddings": 64},  # biases on all four
    "Gemma3TextConfig": {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
                         "num_key_value_heads": 1, "head_dim": 8},
    "DeepseekV3Config": LATENT,  # values made from a latent, in one matrix with a part of the keys
}  # fmt: skip
GATED = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
         "num_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention", "full_attention"]}  # fmt: skip


def model_of(config: str, sizes: dict[str, Any]) -> nn.Module:
    import transformers as t

    t.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    made = getattr(t, config)(vocab_size=97, **sizes)
    return liven(t.AutoModelForCausalLM.from_config(made).eval())


def rebased(dense: nn.Module) -> tuple[nn.Module, Rebased]:
    model = copy.deepcopy(dense)
    return model, change_basis(model, list(discover(model)), ids())


@pytest.mark.parametrize("config", SIZES)
def test_the_model_computes_what_it_did_with_other_values(config: str) -> None:
    dense = model_of(config, SIZES[config])
    model, done = rebased(dense)
    wanted = [g for g in discover(dense) if g.role == "vo_dim"]
    assert done.groups == [g.name for g in wanted] and len(wanted) == 2 and not done.left
    assert off(model, dense) < 1e-9
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, dense.get_parameter(n))}
    assert changed == {m.tensor for g in wanted for m in g.members if m.parameter}
    assert [g.to_dict() for g in discover(model)] == [g.to_dict() for g in discover(dense)]


@pytest.mark.parametrize("config", SIZES)
def test_a_cut_of_values_loses_less(config: str) -> None:
    dense = model_of(config, SIZES[config])
    options: dict[str, Any] = {
        "widths": {"vo_dim": 0.5}, "roles": ["vo_dim"], "calibration": ids(), "criterion": "wanda", "copy": True
    }  # fmt: skip
    own, principal = (pyprune.prune(dense, value_basis=how, **options) for how in ("own", "principal"))
    assert off(principal.model, dense) < off(own.model, dense)
    assert principal.report.basis is not None and own.report.basis is None
    assert ("values", "in principal coordinates in 2 layers") in facts.done(principal.report.to_dict())
    assert "values" not in dict(facts.done(own.report.to_dict()))
    again = model_of(config, SIZES[config])
    assert all(torch.equal(a, b) for a, b in zip(dense.parameters(), again.parameters(), strict=True))


def test_the_units_that_carry_most_come_first() -> None:
    model, done = rebased(tiny_llama())
    groups = discover(model)
    scores = pyprune.score(model, groups, ids(), "wanda", roles=["vo_dim"])
    for name in done.groups:
        assert torch.equal(scores[name].argsort(dim=1, descending=True), torch.arange(8).expand(2, 8))
        assert all(1 <= count <= 8 for count in done.carrying[name])


def test_cutting_and_masking_agree_in_the_new_basis() -> None:
    from pyprune.compensation import compensate

    model, _ = rebased(tiny_llama())
    groups = discover(model)
    plan = pyprune.select(groups, pyprune.score(model, groups, ids(), "wanda", roles=["vo_dim"]), widths={"vo_dim": 5})
    done = compensate(model, plan, ids(), "obs")
    whole = copy.deepcopy(model)
    assert off(pyprune.apply(model, done.plan), whole) < 1e-9


def test_where_something_treats_dimensions_apart_the_weights_go_back(caplog: pytest.LogCaptureFixture) -> None:
    dense, model = tiny_llama(), tiny_llama()
    for layer in (dense.model.layers[1], model.model.layers[1]):
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, given: (given[0].tanh(),))
    with caplog.at_level(logging.WARNING):
        done = change_basis(model, list(discover(model)), ids())
    name = "model.layers.1.self_attn:vo_dim"
    note = f"Values of {name} stay in their own basis: another basis changes what the model computes."
    assert list(done.left) == [name] and done.notes == [note] and note in caplog.text
    assert done.groups == ["model.layers.0.self_attn:vo_dim", "model.layers.2.self_attn:vo_dim"]
    assert off(model, dense) < 1e-9
    for matrix in ("v_proj", "o_proj"):
        at = f"model.layers.1.self_attn.{matrix}.weight"
        assert torch.equal(model.get_parameter(at), dense.get_parameter(at))


def test_values_with_a_gate_for_every_dimension_stay() -> None:
    dense = model_of("Qwen3NextConfig", GATED)
    names = [g.name for g in discover(dense) if g.role == "vo_dim" and g.prunable and g.exact]
    model, done = rebased(dense)
    assert names and not done.groups and list(done.left) == names
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), dense.parameters(), strict=True))


def test_half_precision_keeps_its_type_and_nearly_its_outputs() -> None:
    dense = tiny_llama(dtype=torch.bfloat16)
    model, done = rebased(dense)
    assert len(done.groups) == 3 and next(model.parameters()).dtype == torch.bfloat16
    assert off(model, dense) < 1e-2


def test_without_values_to_cut_nothing_happens() -> None:
    model = tiny_llama()
    before = [p.clone() for p in model.parameters()]
    done = change_basis(model, [g for g in discover(model) if g.role == "ffn"], ids())
    assert done == Rebased()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_activations_that_are_no_numbers_are_refused_by_name() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.get_parameter("model.layers.1.self_attn.v_proj.weight")[0, 0] = float("inf")
    with pytest.raises(PyPruneError, match=r"layers\.1\.self_attn\.o_proj\.weight.*NaN or infinity"):
        change_basis(model, list(discover(model)), ids())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"roles": ["ffn"], "criterion": "wanda"}, "value_basis 'principal': is for role vo_dim, which is not cut"),
        ({}, "value_basis 'principal': is for role vo_dim, which is not cut"),
        ({"roles": ["vo_dim"], "criterion": "l2", "calibration": None}, "calibration: is missing, and value_basis"),
        ({"roles": ["vo_dim"], "stream": True}, "value_basis 'principal': runs the model on text"),
        ({"roles": ["vo_dim"], "scores_file": "scores.safetensors"}, "value_basis 'principal': makes other units"),
    ],
    ids=["another role", "a ratio alone", "no text", "stream", "scores of the own basis"],
)
def test_what_it_does_not_go_with_is_said_before_anything_runs(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PyPruneError, match=message):
        pyprune.prune(tiny_llama(), **{"ratio": 0.1, "value_basis": "principal", "calibration": ids(), **options})
