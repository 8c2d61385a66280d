"""A tiny model with a tokenizer in a folder, text to feed it, and the command line in another process."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Ended:
    """How a process ended."""

    status: int
    out: str
    err: str


def python(*arguments: str, cwd: Path | None = None) -> Ended:
    """Run this interpreter with the repository importable."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    ended = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=cwd, timeout=300
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def pyprune(*arguments: str, cwd: Path | None = None) -> Ended:
    """``pyprune ...`` as a user runs it."""
    return python("-m", "pyprune", *arguments, cwd=cwd)


def refused(call, place, *arguments: str) -> str:
    """The one line of a run that is refused and leaves everything as it was."""
    before = place.files()
    ended = call(*arguments)
    assert ended.status == 2, ended
    assert ended.out == ""
    assert ended.err.startswith("error: ") and ended.err.endswith("\n") and ended.err.count("\n") == 1, ended.err
    assert place.files() == before
    return ended.err


def byte_tokenizer():
    """A tokenizer whose tokens are the bytes of the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate([*alphabet, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def tiny_llama(seed: int = 0, **changes):
    """A random Llama: 4 layers, 8 query heads on 4 KV heads, FFN 192, some 320 thousand parameters.

    96 is a multiple of 8, 6, 4 and 2 heads, which LlamaConfig insists on when a pruned model is saved."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 258, "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "tie_word_embeddings": True,
        "max_position_embeddings": 256, "initializer_range": 0.08,
        "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257,
    }  # fmt: skip
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def write_model(folder: Path, **changes) -> Path:
    """Save :func:`tiny_llama` with :func:`byte_tokenizer`."""
    tiny_llama(**changes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_text(file: Path, characters: int = 20_000, skip: int = 0) -> Path:
    """English prose from the standard library's help topics."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name].strip() for name in sorted(topics))
    file.write_text(text[skip : skip + characters], encoding="utf-8")
    return file
