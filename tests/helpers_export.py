"""Tiny models and tokenizers to export, and the programs that open what was exported."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import helpers_surgery as h
import torch

from pyprune.surgery import apply

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
NEW = 32
PROMPT = h.tokens(6, 1)


def made(family: str = "llama", plan: Any = h.ragged, **changes: Any) -> Any:
    """A tiny pruned model with 300 tokens, whose embeddings are tied when ``tie_word_embeddings`` says so."""
    model = h.tiny(family, **{"vocab_size": 300, "tie_word_embeddings": False, **changes})
    model.tie_weights()
    return apply(model, plan(model))


def greedy(model: Any, prompt: torch.Tensor = PROMPT) -> list[int]:
    """The 32 tokens that follow the prompt, end-of-text tokens left out of the choice."""
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(prompt, **options)[0, prompt.shape[1] :].tolist()


def llama_cpp_greedy(file: Path, prompt: torch.Tensor = PROMPT) -> list[int]:
    """The 32 tokens that llama.cpp puts after the prompt, its cache in float32."""
    opened = llama_cpp_model(file)
    stream = opened.generate(prompt[0].tolist(), top_k=1, temp=0.0, repeat_penalty=1.0)
    return [next(stream) for _ in range(NEW)]


def llama_cpp_model(file: Path, **options: Any) -> Any:
    from llama_cpp import Llama

    return Llama(str(file), n_ctx=256, n_threads=1, verbose=False, type_k=0, type_v=0, **options)


TEXT = ["the quick brown fox jumps over the lazy dog 1234", "pruning removes whole heads and channels, it's done"] * 4


@cache
def bpe_tokenizer(template: str | None = None) -> Any:
    """Byte-level BPE as GPT-2 has it, with a few merges, 300 tokens at most."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|end|>", "<|start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|start|>", eos_token="<|end|>", chat_template=template
    )


@cache
def sentencepiece_like_tokenizer() -> Any:
    """BPE over characters with byte fallback and a space put before the text, as Llama 2 has it; adds a first token."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdeghinrstu"]
    merges = [
        ("t", "h"),
        ("th", "e"),
        ("▁", "the"),
        ("i", "n"),
        ("e", "r"),
        ("a", "n"),
        ("▁", "a"),
        ("▁a", "n"),
        ("▁", "an"),
    ]
    pieces += ["".join(m) for m in merges]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
