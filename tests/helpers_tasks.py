"""Questions with pitfalls for tokenisation, and a small trained tokenizer."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any


def trained_tokenizer(bos: bool = False):
    """Byte-level BPE of 400 tokens trained on the standard library's help topics; with ``bos`` it puts ``<s>`` before
    every text."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_str(_trained())
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@cache
def _trained() -> str:
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator((topics[name] for name in sorted(topics)), trainer)
    return tokenizer.to_str()


def records(count: int = 40) -> list[dict[str, Any]]:
    """Questions made of the help topics' words: contexts with trailing spaces, an empty one, one that begins with the
    BOS text, one too long for 256 positions; choices of one and of many tokens, equal ones, characters of several
    bytes."""
    from pydoc_data.topics import topics

    words = " ".join(topics[name] for name in sorted(topics)).split()
    out = []
    for i in range(count):
        at = 37 * i
        context = "Question: " + " ".join(words[at : at + 5 + i % 23]) + "?\nAnswer:"
        choices = [" ".join(words[at + 900 + 50 * c : at + 901 + 50 * c + (i + 2 * c) % 7]) for c in range(2 + i % 4)]
        out.append({"context": context, "choices": choices, "label": (i * 7) % len(choices)})
    out[1]["context"] += "  "
    out[2]["context"] = ""
    out[3]["context"] = "<s>" + out[3]["context"]
    out[4]["context"] = " ".join(words[:700])
    out[5] = {"context": out[5]["context"], "choices": ["no", "yes"], "label": 1}
    out[6] = {"context": out[6]["context"], "choices": ["für", "naïve ☃ 雪", "plain"], "label": 1}
    out[7] = {"context": out[7]["context"], "choices": ["the same", "the same", "the same"], "label": 0}
    return out


def write_task(file: Path, questions: list[dict[str, Any]]) -> Path:
    """A task file, gzipped by its name."""
    text = "".join(json.dumps(q) + "\n" for q in questions)
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "wt", encoding="utf-8") as stream:
        stream.write(text)
    return file
