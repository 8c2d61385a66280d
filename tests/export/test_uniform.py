"""Profile uniform: stock transformers opens it, and what does not fit is refused with the nearest plan."""

from __future__ import annotations

import json
import warnings

import helpers_export as x
import helpers_surgery as h
import pytest
import torch
from helpers_families import build
from helpers_fresh import ask, fresh_answers, own_answer

import pyprune
from pyprune.checkpoint import load, save
from pyprune.checkpoint.profiles import uniform
from pyprune.checkpoint.profiles.source import of_model
from pyprune.discovery import discover
from pyprune.errors import PyPruneError
from pyprune.selection.plan import Plan
from pyprune.surgery import apply


def test_stock_transformers_without_remote_code_gives_the_same_logits_and_32_tokens(tmp_path) -> None:
    folders, expected = [], []
    for family in h.STOCK:
        model = x.made(family, h.uniform)
        folders.append(pyprune.export(model, tmp_path / family, "uniform"))
        ask(folders[-1], x.PROMPT)
        expected.append(own_answer(model, x.PROMPT))
    for found, own in zip(fresh_answers(folders, tmp_path / "code", remote=False), expected, strict=True):
        assert found["class"] == own["class"]
        assert torch.equal(found["logits"], own["logits"])
        assert torch.equal(found["said"], own["said"])


def test_the_width_of_a_head_is_written_out(tmp_path) -> None:
    model = x.made("qwen3", h.uniform, head_dim=128)
    pyprune.export(model, tmp_path / "out", "uniform")
    assert json.loads((tmp_path / "out/config.json").read_text())["head_dim"] == 128


def test_the_width_of_a_head_that_a_class_computes_is_not_written(tmp_path) -> None:
    from transformers import AutoModelForCausalLM, FalconConfig

    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2,
        new_decoder_architecture=True, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    pyprune.export(model, tmp_path / "out", "uniform")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(h.logits(opened), h.logits(model))


def refusal(model) -> str:
    with pytest.raises(PyPruneError) as caught:
        uniform.check(of_model(model).outline)
    return str(caught.value)


def test_different_widths_are_refused_with_the_nearest_common_ones() -> None:
    said = refusal(x.made())
    assert "intermediate_size in all layers, and it is 25 in layer 3, 40 in layer 0" in said
    assert "--widths" in said and "ffn=35" in said and "kv_heads=3" in said


def test_narrow_layers_are_refused_by_name() -> None:
    model = h.tiny("llama")
    [group] = [g for g in discover(model) if g.role == "vo_dim" and g.layer == 2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = apply(model, Plan((h.cut(group, 6),)))
    assert "model.layers.2.self_attn.v_proj is narrow" in refusal(model)


def test_head_counts_that_the_stock_class_cannot_have_are_refused() -> None:
    assert "GPT2LMHeadModel has no head_dim" in refusal(x.made("gpt2", h.uniform))
    model = h.tiny("llama", hidden_size=40, attention_bias=True)  # 6 heads do not divide 40
    said = refusal(apply(model, h.uniform(model)))
    assert "divides the hidden size 40, and there are 6" in said and "The nearest are 5 and 8" in said


def test_a_hetero_hf_folder_that_is_even_becomes_a_plain_one(tmp_path) -> None:
    model = x.made("llama", h.uniform)
    pyprune.export(model, tmp_path / "hf", "hetero-hf")
    pyprune.export(tmp_path / "hf", tmp_path / "plain", "uniform")
    config = json.loads((tmp_path / "plain/config.json").read_text())
    assert not {"auto_map", "pyprune_build"} & config.keys()
    assert not (tmp_path / "plain/modeling_pyprune.py").exists()
    assert torch.equal(h.logits(load(tmp_path / "plain")), h.logits(model))


@pytest.mark.parametrize("profile", ["uniform", "hetero-hf", "hetero-decilm", "gguf"])
def test_a_decilm_folder_is_refused_with_advice_that_works(tmp_path, profile) -> None:
    model = h.tiny("llama", intermediate_size=768, num_hidden_layers=2)
    [group] = [g for g in h.groups_of(model) if g.role == "ffn" and g.layer == 1]
    made = save(apply(model, Plan((h.cut(group, 512),))), None, tmp_path / "made")
    folder = pyprune.export(made, tmp_path / "deci", "hetero-decilm")
    out = tmp_path / "out.gguf"
    with pytest.raises(PyPruneError, match=rf"profile '{profile}'.*DeciLM.* export the one that it was") as e:
        pyprune.export(folder, out, profile, trust_remote_code=True)
    assert "hetero-hf, or uniform" not in str(e.value)
    assert not out.exists()


def test_layers_of_a_class_with_code_of_its_own_are_even_by_their_shapes(tmp_path) -> None:
    model = build("Baichuan 7B", tmp_path / "whole")
    uniform.check(model)
    found = discover(model).prunable(["ffn"])
    with pytest.raises(PyPruneError, match=r"the layers of BaichuanForCausalLM differ"):
        uniform.check(apply(model, Plan((h.cut(found[0], 8),))))
