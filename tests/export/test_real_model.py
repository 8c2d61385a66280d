"""SmolLM2-135M-Instruct, pruned, in every profile, through every consumer."""

from __future__ import annotations

import helpers_export as x
import pytest
import torch
from helpers_fresh import ask, fresh_answers

import pyprune

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

TEXT = "The capital of France is Paris. The capital of Italy is"


def pruned(path, tmp_path, profile: str, **options):
    """(folder that `prune` wrote, the 32 tokens that the model in memory says after a prompt, the prompt)."""
    out = pyprune.prune(
        str(path), criterion="l2", roles=options.pop("roles", "ffn"), profile=profile, output_dir=tmp_path / profile,
        **options,
    )  # fmt: skip
    prompt = out.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    return tmp_path / profile, x.greedy(out.model.eval(), prompt), prompt


@pytest.mark.parametrize(
    ("profile", "options"),
    [
        ("uniform", {"ratio": 0.1, "roles": "kv_heads,ffn"}),
        ("hetero-hf", {"ratio": 0.1, "roles": "kv_heads,ffn", "allocation": "global"}),
        ("hetero-decilm", {"ratio": 0.1, "allocation": "global"}),
    ],
)
def test_plain_transformers_says_the_same_32_tokens(smollm2_path, tmp_path, profile, options) -> None:
    folder, said, prompt = pruned(smollm2_path, tmp_path, profile, **options)
    ask(folder, prompt)
    [found] = fresh_answers([folder], tmp_path / "code", remote=profile != "uniform")
    assert found["said"][0, prompt.shape[1] :].tolist() == said


@pytest.mark.llama_cpp
@pytest.mark.parametrize("allocation", ["uniform", "global"], ids=["llama", "deci"])
def test_llama_cpp_says_the_same_32_tokens_and_splits_text_alike(smollm2_path, tmp_path, allocation) -> None:
    pytest.importorskip("llama_cpp")
    options = {"ratio": 0.05, "roles": "kv_heads,ffn", "allocation": allocation}
    folder, said, prompt = pruned(smollm2_path, tmp_path, "gguf", **options)
    assert x.llama_cpp_greedy(folder / "model.gguf", prompt) == said
    opened = x.llama_cpp_model(folder / "model.gguf", vocab_only=True)
    assert opened.tokenize(TEXT.encode(), add_bos=True, special=True) == prompt[0].tolist()


def test_transformers_gguf_reader_says_the_same_32_tokens(smollm2_path, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    folder, said, prompt = pruned(smollm2_path, tmp_path, "gguf", ratio=0.1)
    opened = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)
    assert x.greedy(opened, prompt) == said
