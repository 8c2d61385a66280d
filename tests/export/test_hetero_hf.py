"""Profile hetero-hf: plain transformers, without pyprune, opens any widths."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import helpers_export as x
import helpers_surgery as h
import pytest
import torch
from helpers_discovery import half, token_ids
from helpers_families import NAMED, build
from helpers_fresh import ask, fresh_answers, own_answer

import pyprune
from pyprune.checkpoint import load, save
from pyprune.checkpoint.profiles import hetero_hf
from pyprune.checkpoint.profiles.source import of_model
from pyprune.discovery import discover
from pyprune.errors import PyPruneError
from pyprune.selection.plan import Plan
from pyprune.surgery import apply

FEW = ["Llama-3.1", "BLOOM", "GPT-2", "GPT-NeoX", "Qwen3-MoE", "Falcon, ALiBi"]
"""Constructed again; rows of a table; resized; conversion on opening; experts; narrow."""

OWN = [name for name, family in NAMED.items() if not family.remote]


def unevenly_cut(name: str, folder: Path):
    """A model of a named family, half of whose heads and channels are gone in the last layer only."""
    model = build(name, folder)
    family = NAMED[name]
    groups = [
        g
        for g in discover(model).thaw(["kv_heads"]).prunable()
        if g.role in {family.heads, *family.ffn} and g.units > 1 and g.layer == 1
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return apply(model, half(groups), verify=False)


@pytest.mark.parametrize("names", [FEW, pytest.param(OWN, marks=pytest.mark.slow)], ids=["few", "all"])
def test_families_open_without_pyprune_with_their_own_logits_and_tokens(tmp_path, names) -> None:
    folders, expected = [], []
    for number, name in enumerate(names):
        model = unevenly_cut(name, tmp_path / "unused")
        folder = tmp_path / f"f{number}"
        pyprune.export(model, folder, "hetero-hf")
        tokens = token_ids(model)
        ask(folder, tokens)
        folders.append(folder)
        expected.append(own_answer(model, tokens, new=8))
    for name, found, own in zip(names, fresh_answers(folders, tmp_path / "code", new=8), expected, strict=True):
        assert found["class"] == own["class"], name
        assert torch.allclose(found["logits"], own["logits"], rtol=1e-5, atol=1e-5), name
        assert torch.equal(found["said"], own["said"]), name


def test_per_layer_widths_give_bit_equal_logits_and_the_same_32_tokens_from_a_ragged_cache(tmp_path) -> None:
    model = x.made()
    kv_heads = {layer.self_attn.k_proj.out_features for layer in model.model.layers}
    assert len(kv_heads) == 4  # the cache holds different numbers of heads
    pyprune.export(model, tmp_path / "out", "hetero-hf")
    ask(tmp_path / "out", x.PROMPT)
    [found], own = fresh_answers([tmp_path / "out"], tmp_path / "code", again=True), own_answer(model, x.PROMPT)
    assert torch.equal(found["logits"], own["logits"])
    assert torch.equal(found["said"], own["said"])
    assert torch.equal(h.logits(load(tmp_path / "out")), h.logits(model))


@pytest.mark.slow
def test_narrow_layers_open_without_pyprune(tmp_path) -> None:
    folders, expected = [], []
    for family in ("llama", "gpt2"):
        model = h.tiny(family)
        groups = [g for g in discover(model) if g.role in ("vo_dim", "ffn", "kv_heads")]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = apply(model, Plan(tuple(h.cut(g, g.units // 2) for g in groups)))
        assert getattr(model.config, "pyprune_narrow", None)
        folders.append(pyprune.export(model, tmp_path / family, "hetero-hf"))
        ask(folders[-1], h.tokens())
        expected.append(own_answer(model, h.tokens()))
    for found, own in zip(fresh_answers(folders, tmp_path / "code"), expected, strict=True):
        torch.testing.assert_close(found["logits"], own["logits"], rtol=1e-5, atol=1e-5)
        assert torch.equal(found["said"], own["said"])


def test_the_folder_says_per_layer_config_and_how_to_open_it(tmp_path) -> None:
    pyprune.export(x.made(), tmp_path / "out", "hetero-hf")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["per_layer_config"]["3"] == {
        "intermediate_size": 25, "num_attention_heads": 1, "num_key_value_heads": 1,
    }  # fmt: skip
    assert config["auto_map"] == {"AutoModelForCausalLM": "modeling_pyprune.LlamaForCausalLM"}
    assert config["pyprune_build"] == {"stock": {}, "layers": "model.layers", "modules": {}, "tables": {}}
    card = (tmp_path / "out/README.md").read_text()
    assert "trust_remote_code=True" in card and card.count("## How to open it") == 1


def test_the_modelling_file_is_copied_as_it_stands_and_knows_nothing_of_pyprune(tmp_path) -> None:
    pyprune.export(x.made(), tmp_path / "out", "hetero-hf")
    text = (tmp_path / "out/modeling_pyprune.py").read_text()
    assert text == (Path(hetero_hf.__file__).parent / "files/modeling_pyprune.py").read_text()
    assert "import pyprune" not in text and "from pyprune" not in text


def test_a_folder_saved_again_by_pyprune_has_no_stale_record(tmp_path) -> None:
    pyprune.export(x.made(), tmp_path / "out", "hetero-hf")
    save(load(tmp_path / "out", trust_remote_code=True), None, tmp_path / "again")
    config = json.loads((tmp_path / "again/config.json").read_text())
    assert not {"auto_map", "pyprune_build"} & config.keys()


def test_attention_of_every_layer_follows_a_later_change_of_implementation(tmp_path) -> None:
    from pyprune.checkpoint.profiles.files import modeling_pyprune

    model = x.made()
    pyprune.export(model, tmp_path / "out", "hetero-hf")
    opened = modeling_pyprune.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    opened.set_attn_implementation("eager")
    chosen = {layer.self_attn.config._attn_implementation for layer in opened.model.layers}
    assert chosen == {"eager"}
    torch.testing.assert_close(h.logits(opened), h.logits(model))


def test_a_model_with_remote_code_is_refused(tmp_path) -> None:
    model = build("Baichuan 7B", tmp_path / "whole")
    with pytest.raises(PyPruneError, match=r"profile 'hetero-hf': BaichuanForCausalLM is no class of transformers"):
        hetero_hf.check(of_model(model).outline)
