"""Profile hetero-decilm: the arithmetic of its readers, and plain transformers as one of them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import helpers_export as x
import helpers_surgery as h
import pytest
import torch
from helpers_fresh import ask, fresh_answers, own_answer
from safetensors import safe_open

import pyprune
from pyprune.checkpoint.profiles import decilm
from pyprune.checkpoint.profiles.source import of_model
from pyprune.errors import PyPruneError
from pyprune.selection.layers import removable, without
from pyprune.selection.plan import Plan
from pyprune.surgery import apply


def dense(**changes):
    return h.tiny("llama", **{"intermediate_size": 768, "num_hidden_layers": 3, **changes})


def cut_ffn(model, widths: list[int], **kv_heads: int):
    groups = h.groups_of(model)
    ffn = [g for g in groups if g.role == "ffn"]
    return apply(model, Plan(tuple(h.cut(g, w) for g, w in zip(ffn, widths, strict=True) if w < g.units)))


def cut_blocks(model, **gone: list[int]):
    """Without the attention or the FFN of some layers."""
    for part, layers in gone.items():
        groups = pyprune.discover(model)
        model = apply(model, without(groups, removable(groups, len(layers), None, part, model.config)[0], layers))
    return model


def as_vllm_reads(config: dict) -> list[tuple[int, int, int]]:
    """(query heads, KV heads, FFN width) by layer, as vLLM's nemotron_nas computes them from attributes."""
    out = []
    for block in json.loads(json.dumps(config["block_configs"]), object_hook=lambda d: SimpleNamespace(**d)):
        heads = kv = size = 0
        if not block.attention.no_op:
            heads = config["num_attention_heads"]
            kv = heads // block.attention.n_heads_in_group
        if not block.ffn.no_op:
            size = int(2 * block.ffn.ffn_mult * config["hidden_size"] / 3)
            size = size if size % 256 == 0 else size + 256 - size % 256
        out.append((heads, kv, size))
    return out


def tensors_of(folder) -> dict[str, list[int]]:
    shapes = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}
    return shapes


def test_readers_compute_the_widths_that_the_weights_have(tmp_path) -> None:
    pyprune.export(cut_ffn(dense(), [256, 768, 512]), tmp_path / "out", "hetero-decilm")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert config["model_type"] == "nemotron-nas"
    assert "per_layer_config" not in config
    read = as_vllm_reads(config)
    assert [ffn for _, _, ffn in read] == [256, 768, 512]
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        for layer, (heads, kv, ffn) in enumerate(read):
            at = f"model.layers.{layer}"
            assert file.get_slice(f"{at}.self_attn.q_proj.weight").get_shape() == [heads * config["head_dim"], 48]
            assert file.get_slice(f"{at}.self_attn.k_proj.weight").get_shape() == [kv * config["head_dim"], 48]
            assert file.get_slice(f"{at}.mlp.gate_proj.weight").get_shape() == [ffn, 48]


def test_plain_transformers_without_pyprune_gives_bit_equal_logits_and_the_same_32_tokens(tmp_path) -> None:
    folders, expected = [], []
    gone = {"attention": [1, 2], "ffn": [1]}
    for name, changes, blocks in (
        ("plain", {}, {}),
        ("biases", {"attention_bias": True, "tie_word_embeddings": True}, {}),
        ("blocks gone", {}, gone),
    ):
        model = dense(**changes)
        model.tie_weights()
        model = cut_blocks(cut_ffn(model, [512, 256, 768]), **blocks)
        folders.append(pyprune.export(model, tmp_path / name, "hetero-decilm"))
        ask(folders[-1], x.PROMPT)
        expected.append(own_answer(model, x.PROMPT))
    for found, own in zip(fresh_answers(folders, tmp_path / "code"), expected, strict=True):
        assert found["class"] == "DeciLMForCausalLM"
        assert torch.equal(found["logits"], own["logits"])
        assert torch.equal(found["said"], own["said"])


def test_layers_without_attention_or_ffn_are_no_ops_without_the_norm_in_front(tmp_path) -> None:
    model = cut_blocks(cut_ffn(dense(num_hidden_layers=4), [512, 768, 256, 768]), attention=[1, 3], ffn=[1, 2])
    pyprune.export(model, tmp_path / "out", "hetero-decilm")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "pyprune_skipped" not in config
    read = as_vllm_reads(config)
    assert [(heads > 0, ffn) for heads, _, ffn in read] == [(True, 512), (False, 0), (True, 0), (False, 768)]
    names = [name.split(".", 3) for name in tensors_of(tmp_path / "out") if ".layers." in name]
    attention = {int(n[2]) for n in names if n[3].startswith("self_attn")}
    ffn = {int(n[2]) for n in names if n[3].startswith("mlp")}
    assert (attention, ffn) == ({0, 2}, {0, 3})
    assert {int(n[2]) for n in names if n[3] == "input_layernorm.weight"} == attention
    assert {int(n[2]) for n in names if n[3] == "post_attention_layernorm.weight"} == ffn


def test_the_index_of_several_files_loses_the_norms_too(tmp_path) -> None:
    pyprune.save(cut_blocks(dense(), attention=[1], ffn=[2]), None, tmp_path / "cut", max_shard_size="100KB")
    pyprune.export(tmp_path / "cut", tmp_path / "out", "hetero-decilm")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    shapes = tensors_of(tmp_path / "out")
    assert len(set(index["weight_map"].values())) > 1
    assert set(index["weight_map"]) == set(shapes)
    assert index["metadata"]["total_size"] == sum(4 * torch.Size(shape).numel() for shape in shapes.values())
    lost = set(tensors_of(tmp_path / "cut")) - set(shapes)
    assert lost == {"model.layers.1.input_layernorm.weight", "model.layers.2.post_attention_layernorm.weight"}


def test_pyprune_opens_it_when_its_code_is_allowed(tmp_path) -> None:
    from pyprune.checkpoint import load

    model = cut_ffn(dense(), [512, 256, 768])
    pyprune.export(model, tmp_path / "out", "hetero-decilm")
    with pytest.raises(PyPruneError, match="trust_remote_code"):
        load(tmp_path / "out")
    assert torch.equal(h.logits(load(tmp_path / "out", trust_remote_code=True)), h.logits(model))


def test_fewer_kv_heads_in_some_layers_are_groups_of_other_sizes() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from pyprune.surgery import skeleton

    config = LlamaConfig(**h.COMMON, **{**h.HEADS, "intermediate_size": 256})
    config.per_layer_config = {1: {"num_key_value_heads": 2}, 3: {"num_key_value_heads": 8}}
    config.allow_global_per_layer_attribute_access = True
    blocks = decilm.block_configs(skeleton.build(LlamaForCausalLM, config))
    assert [b["attention"]["n_heads_in_group"] for b in blocks] == [2, 4, 2, 1]


@pytest.mark.parametrize("hidden", [48, 576, 768, 1000, 2560, 4096, 5120, 8192, 16384])
def test_every_multiple_of_256_comes_back_from_its_multiplier(hidden: int) -> None:
    for width in range(256, 65_536, 256):
        assert decilm.intermediate_size(decilm.ffn_mult(width, hidden), hidden) == width


def refusal(model) -> str:
    with pytest.raises(PyPruneError) as caught:
        decilm.check(of_model(model).outline)
    return str(caught.value)


def test_other_ffn_widths_are_refused_with_the_nearest_that_fit() -> None:
    said = refusal(cut_ffn(dense(), [768, 700, 512]))
    assert "layer 1 has 700" in said and "512 or 768" in said
    said = refusal(cut_ffn(dense(), [768, 768, 100]))
    assert "layer 2 has 100" in said and "The nearest is 256:" in said


def test_missing_query_heads_in_one_layer_are_refused_with_the_reason() -> None:
    model = dense()
    [group] = [g for g in h.groups_of(model) if g.role == "kv_heads" and g.layer == 1]
    said = refusal(apply(model, Plan((h.cut(group, 3),))))
    assert "layer 1 has 6 where others have 8" in said and "8 query heads in every layer" in said


def test_other_classes_are_refused_by_name() -> None:
    assert "cannot hold a Qwen2ForCausalLM. It holds LlamaForCausalLM and MistralForCausalLM" in refusal(
        h.tiny("qwen2")
    )
