"""A tokenizer as GGUF metadata.

llama.cpp splits text itself, by rules that it knows by name (``tokenizer.ggml.pre``); a name is given only where the
tokenizer's own rules are those, since any other would tokenize quietly wrong.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pyprune.errors import PyPruneError

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BY_PATTERN = {_LLAMA3: "llama-bpe", _QWEN2: "qwen2", _TEKKEN: "tekken"}
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""Stands for a space in SentencePiece vocabularies."""


def add_vocabulary(writer: Any, folder: Path, size: int) -> None:
    """Adds the tokenizer in ``folder`` to a GGUF writer: tokens, merges or scores, special tokens, chat template.

    Args:
        writer: ``gguf.GGUFWriter``.
        size: rows of the model's embedding; ids without a token become unused ones.

    Raises:
        PyPruneError: there is no tokenizer, or llama.cpp has no rules for it.
    """
    import gguf
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not getattr(tokenizer, "is_fast", False):
        raise _unknown(type(tokenizer).__name__, "it is not made of a tokenizer.json")
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    if rules["model"]["type"] != "BPE":
        raise _unknown(rules["model"]["type"], "llama.cpp has BPE and SentencePiece for Llama models")
    if not rules["model"]["merges"]:
        raise _unknown("BPE", "it has no merges, and llama.cpp opens no vocabulary without")
    by_scores = bool(rules["model"].get("byte_fallback"))
    tokens, types = _tokens(tokenizer, size, by_scores)
    if by_scores:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(_scores(rules["model"]["merges"], tokens))
        writer.add_add_space_prefix(_prefixed(rules))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre(rules))
        writer.add_token_list(tokens)
        if _adds_space(rules["pre_tokenizer"]):
            writer.add_add_space_prefix(True)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(folder, load_merges=not by_scores, n_vocab=size)
    ids = tokenizer("a")["input_ids"]
    special.add_special_token = {
        "bos": tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id,
    }
    for kind in ("bos", "eos", "unk", "pad"):
        token = getattr(tokenizer, f"{kind}_token_id")
        if token is not None:
            special.special_token_ids[kind] = token
    special.add_to_gguf(writer, quiet=True)


def _tokens(tokenizer: Any, size: int, by_scores: bool) -> tuple[list[str], list[int]]:
    from gguf import TokenType

    names = {i: token for token, i in tokenizer.get_vocab().items()}
    if names and max(names) >= size:
        problem = f"has {max(names) + 1} tokens, and the model embeds {size}"
        raise PyPruneError("tokenizer", None, problem, "Export with the model's own tokenizer.")
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for i in range(size):
        name, kind = names.get(i, f"[PAD{i}]"), TokenType.NORMAL
        if i not in names:
            kind = TokenType.UNUSED
        elif i == tokenizer.unk_token_id and by_scores:
            kind = TokenType.UNKNOWN
        elif i in added:
            kind = TokenType.CONTROL if added[i].special else TokenType.USER_DEFINED
            name = name.replace(_SPACE, " ") if kind == TokenType.USER_DEFINED else name
        elif by_scores and len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            kind = TokenType.BYTE
        tokens.append(name)
        types.append(int(kind))
    return tokens, types


def _scores(merges: list[Any], tokens: list[str]) -> list[float]:
    """SentencePiece merges the pair with the highest score: minus the rank of the first merge that gives the token.

    Tokens that no merge gives are never asked for.
    """
    rank: dict[str, int] = {}
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        rank.setdefault("".join(pair), len(rank))
    return [-float(rank.get(token, len(rank))) for token in tokens]


def _pre(rules: dict[str, Any]) -> str:
    """llama.cpp's name for the rules that split text before merging."""
    steps = rules["pre_tokenizer"] or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    kinds = [step.get("type") for step in steps]
    if rules["normalizer"] is None or rules["normalizer"].get("type") == "NFC":
        if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1]["use_regex"]:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not steps[1]["use_regex"]:
            name = _BY_PATTERN.get(steps[0]["pattern"].get("Regex", ""))
            if name is not None:
                return name
    raise _unknown("BPE", f"its text is split by rules of its own ({', '.join(map(str, kinds))})")


def _adds_space(step: dict[str, Any]) -> bool:
    steps = step["pretokenizers"] if step.get("type") == "Sequence" else [step]
    return any(s.get("type") == "ByteLevel" and s.get("add_prefix_space") for s in steps)


def _prefixed(rules: dict[str, Any]) -> bool:
    """Whether a space is put before the text."""
    normalizer, splitter = rules["normalizer"] or {}, rules["pre_tokenizer"] or {}
    steps = normalizer.get("normalizers", [normalizer]) + splitter.get("pretokenizers", [splitter])
    for step in steps:
        if step.get("type") == "Prepend" and step.get("prepend") == _SPACE:
            return True
        if step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never":
            return True
    return False


def _unknown(value: str, problem: str) -> PyPruneError:
    known = ", ".join(["gpt-2", "smollm", *_BY_PATTERN.values()])
    hint = f"GGUF holds SentencePiece-like BPE with byte fallback, and byte-level BPE split as {known}."
    return PyPruneError("tokenizer", value, f"has no counterpart in llama.cpp: {problem}", hint)
