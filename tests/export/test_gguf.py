"""Profile gguf: the file's numbers and tensors, and two programs that read it."""

from __future__ import annotations

import helpers_export as x
import helpers_surgery as h
import numpy as np
import pytest
import torch

import pyprune
from pyprune.checkpoint.profiles import gguf_file
from pyprune.checkpoint.profiles.source import of_model
from pyprune.discovery import discover
from pyprune.errors import PyPruneError
from pyprune.selection.plan import Plan
from pyprune.surgery import apply

gguf = pytest.importorskip("gguf")

TEMPLATE = "{% for m in messages %}<|start|>{{ m.content }}<|end|>{% endfor %}"


def read(file):
    """(field name -> value, tensor name -> reader's tensor)."""
    reader = gguf.GGUFReader(file)
    return {name: f.contents() for name, f in reader.fields.items()}, {t.name: t for t in reader.tensors}


def uniform_file(tmp_path, **options):
    model = x.made("llama", h.uniform)
    return model, pyprune.export(model, tmp_path / "m.gguf", "gguf", tokenizer=x.bpe_tokenizer(TEMPLATE), **options)


def test_even_layers_are_llama_with_single_numbers(tmp_path) -> None:
    _, file = uniform_file(tmp_path)
    fields, _ = read(file)
    assert fields["general.architecture"] == "llama"
    for name, value in {
        "block_count": 4, "embedding_length": 48, "feed_forward_length": 23, "attention.head_count": 6,
        "attention.head_count_kv": 3, "attention.key_length": 12, "attention.value_length": 12,
        "rope.dimension_count": 12, "context_length": 64, "vocab_size": 300,
    }.items():  # fmt: skip
        assert fields[f"llama.{name}"] == value, name


def test_uneven_layers_are_deci_with_one_number_a_layer(tmp_path) -> None:
    model = x.made()
    fields, tensors = read(pyprune.export(model, tmp_path / "m.gguf", "gguf"))
    assert fields["general.architecture"] == "deci"
    assert fields["deci.feed_forward_length"] == [layer.mlp.up_proj.out_features for layer in model.model.layers]
    assert fields["deci.attention.head_count_kv"] == [4, 3, 2, 1]
    assert fields["deci.attention.head_count"] == [8, 3, 2, 1]
    assert list(tensors["blk.3.ffn_up.weight"].shape) == [48, 25]


def test_matrices_have_the_type_asked_for_and_norms_float32(tmp_path) -> None:
    for dtype, kind in {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}.items():
        model, file = uniform_file(tmp_path, dtype=dtype, overwrite=True)
        _, tensors = read(file)
        down = tensors["blk.1.ffn_down.weight"]
        assert down.tensor_type.name == kind
        assert tensors["blk.1.attn_norm.weight"].tensor_type.name == "F32"
        expected = model.model.layers[1].mlp.down_proj.weight.detach().to(getattr(torch, dtype)).float().numpy()
        stored = gguf.quants.dequantize(down.data, down.tensor_type)
        assert np.array_equal(stored, expected)


def test_rows_of_query_and_key_heads_go_from_halves_to_neighbours(tmp_path) -> None:
    model = x.made(attention_bias=True)
    _, tensors = read(pyprune.export(model, tmp_path / "m.gguf", "gguf"))
    attention = model.model.layers[1].self_attn
    for name, target in (("q_proj", "attn_q"), ("k_proj", "attn_k")):
        layer = getattr(attention, name)
        order = [
            head * 12 + half * 6 + i for head in range(layer.out_features // 12) for i in range(6) for half in (0, 1)
        ]
        for kind in ("weight", "bias"):
            expected = getattr(layer, kind).detach().numpy()[order]
            assert np.array_equal(tensors[f"blk.1.{target}.{kind}"].data, expected)
    assert np.array_equal(tensors["blk.1.attn_v.weight"].data, attention.v_proj.weight.detach().numpy())


def test_tied_embeddings_are_stored_once(tmp_path) -> None:
    for tied in (False, True):
        model = x.made(tie_word_embeddings=tied)
        _, tensors = read(pyprune.export(model, tmp_path / "m.gguf", "gguf", overwrite=True))
        assert ("output.weight" in tensors) is not tied


def test_llama3_rotary_factors_are_what_transformers_scales_by(tmp_path) -> None:
    model = x.made(rope_parameters=x.LLAMA3_ROPE)
    _, tensors = read(pyprune.export(model, tmp_path / "m.gguf", "gguf"))
    plain = 1e4 ** -(torch.arange(0, 12, 2) / 12)
    factors = torch.from_numpy(tensors["rope_freqs.weight"].data.copy())
    torch.testing.assert_close(plain / factors, model.model.rotary_emb.inv_freq)


def test_a_sliding_window_shortens_the_context_to_where_both_agree(tmp_path) -> None:
    model = x.made("mistral", sliding_window=16)
    fields, _ = read(pyprune.export(model, tmp_path / "m.gguf", "gguf"))
    assert fields["deci.context_length"] == 16


def test_the_tokenizer_its_special_tokens_and_the_chat_template_are_inside(tmp_path) -> None:
    tokenizer = x.bpe_tokenizer(TEMPLATE)
    _, file = uniform_file(tmp_path)
    fields, _ = read(file)
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "gpt-2"
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == 300
    assert {t: i for i, t in enumerate(tokens[: len(tokenizer)])} == tokenizer.get_vocab()
    assert fields["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == TEMPLATE
    types = fields["tokenizer.ggml.token_type"]
    assert types[tokenizer.eos_token_id] == gguf.TokenType.CONTROL and types[299] == gguf.TokenType.UNUSED


def test_transformers_own_reader_gives_the_same_logits_and_32_tokens(tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model, file = uniform_file(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name)
    torch.testing.assert_close(h.logits(opened), h.logits(model), rtol=1e-5, atol=1e-5)
    assert x.greedy(opened) == x.greedy(model)


def test_pyprune_prunes_what_it_exported(tmp_path) -> None:
    _, file = uniform_file(tmp_path)
    out = pyprune.prune(str(file), ratio=0.1, criterion="l2")
    assert out.model.config.num_hidden_layers == 4


def cut_with_biases():
    model = h.tiny("llama", vocab_size=300, attention_bias=True, mlp_bias=True)
    groups = [g for g in discover(model) if g.role in ("kv_heads", "ffn") and g.layer]
    return apply(model, Plan(tuple(h.cut(g, g.units - g.layer) for g in groups)))


CASES = {
    "llama, even": lambda: x.made("llama", h.uniform),
    "llama, tied": lambda: x.made("llama", h.uniform, tie_word_embeddings=True),
    "llama, per layer": lambda: x.made(),
    "llama 3.1 rotary, per layer": lambda: x.made(rope_parameters=x.LLAMA3_ROPE),
    "llama, linear rotary": lambda: x.made(
        "llama", h.uniform, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    ),
    "llama, biases, per layer": cut_with_biases,
    "mistral, even": lambda: x.made("mistral", h.uniform),
    "mistral, per layer": lambda: x.made("mistral"),
}


@pytest.mark.llama_cpp
@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_says_the_same_32_tokens(name, tmp_path) -> None:
    pytest.importorskip("llama_cpp")
    model = CASES[name]()
    file = pyprune.export(model, tmp_path / "m.gguf", "gguf", tokenizer=x.bpe_tokenizer())
    assert x.llama_cpp_greedy(file) == x.greedy(model)


@pytest.mark.llama_cpp
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_llama_cpp_says_the_same_32_tokens_in_half_precision(dtype, tmp_path) -> None:
    pytest.importorskip("llama_cpp")
    model = x.made()
    file = pyprune.export(model, tmp_path / "m.gguf", "gguf", dtype=dtype)
    rounded = model.to(getattr(torch, dtype)).float()
    assert x.llama_cpp_greedy(file)[:8] == x.greedy(rounded)[:8]


@pytest.mark.llama_cpp
@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_llama_cpp_splits_text_into_the_same_tokens(kind, tmp_path) -> None:
    pytest.importorskip("llama_cpp")
    tokenizer = x.bpe_tokenizer() if kind == "bpe" else x.sentencepiece_like_tokenizer()
    file = pyprune.export(x.made(), tmp_path / "m.gguf", "gguf", tokenizer=tokenizer)
    opened = x.llama_cpp_model(file, vocab_only=True)
    for text in ("the quick fox 1234 isn't", "  two spaces\n\nnew line é漢 an inner", "thethe anan", ""):
        assert opened.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text)["input_ids"], text


def refusal(model) -> str:
    with pytest.raises(PyPruneError) as caught:
        gguf_file.check(of_model(model).outline)
    return str(caught.value)


def test_what_llama_cpp_has_no_form_for_is_refused_with_the_reason() -> None:
    assert "cannot hold a Qwen3ForCausalLM" in refusal(h.tiny("qwen3"))
    assert "SiLU in its FFN, and the model gelu" in refusal(h.tiny("llama", hidden_act="gelu"))
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}
    assert "not yarn" in refusal(h.tiny("llama", rope_parameters=yarn))


def test_a_tokenizer_with_rules_of_its_own_is_refused_and_leaves_nothing(tmp_path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    for made, problem in (
        (own, r"split by rules of its own \(Whitespace\)"),
        (Tokenizer(models.WordLevel({"a": 0}, "a")), "llama.cpp has BPE and SentencePiece"),
        (Tokenizer(models.BPE()), "it has no merges"),
    ):
        with pytest.raises(PyPruneError, match=problem):
            pyprune.export(
                x.made(), tmp_path / "m.gguf", "gguf", tokenizer=PreTrainedTokenizerFast(tokenizer_object=made)
            )
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path) -> None:
    with pytest.raises(PyPruneError, match=r"tokenizer: has 2\d\d tokens, and the model embeds 128"):
        pyprune.export(x.made(vocab_size=128), tmp_path / "m.gguf", "gguf", tokenizer=x.bpe_tokenizer())
