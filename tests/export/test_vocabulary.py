"""Names that llama.cpp has for ways to split text, found from a tokenizer's own rules."""

from __future__ import annotations

import pytest

from pyprune.checkpoint.profiles.vocabulary import _LLAMA3, _QWEN2, _TEKKEN, _pre, _prefixed, _scores
from pyprune.errors import PyPruneError

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
PLAIN = {**BYTES, "use_regex": False}


def steps(*parts: dict) -> dict:
    return {"normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(parts)}}


def split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("rules", "name"),
    [
        ({"normalizer": None, "pre_tokenizer": BYTES}, "gpt-2"),
        (steps({"type": "Digits", "individual_digits": True}, BYTES), "smollm"),
        (steps(split(_LLAMA3), PLAIN), "llama-bpe"),
        ({**steps(split(_QWEN2), PLAIN), "normalizer": {"type": "NFC"}}, "qwen2"),
        (steps(split(_TEKKEN), PLAIN), "tekken"),
    ],
)
def test_known_rules_have_their_name(rules, name) -> None:
    assert _pre(rules) == name


@pytest.mark.parametrize(
    "rules",
    [
        steps(split(r"\s+"), PLAIN),
        steps({"type": "Digits", "individual_digits": False}, BYTES),
        steps(split(_LLAMA3), BYTES),
        {"normalizer": {"type": "Lowercase"}, "pre_tokenizer": BYTES},
        {"normalizer": None, "pre_tokenizer": None},
    ],
)
def test_other_rules_are_refused_rather_than_guessed(rules) -> None:
    with pytest.raises(PyPruneError, match="split by rules of its own"):
        _pre(rules)


def test_earlier_merges_have_higher_scores() -> None:
    merges = [["t", "h"], ["th", "e"], ["t", "he"], "a n"]
    assert _scores(merges, ["the", "an", "x", "th"]) == [-1.0, -2.0, -3.0, -0.0]


def test_a_leading_space_is_found_in_both_places_where_tokenizers_put_it() -> None:
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]}
    assert _prefixed({"normalizer": None, "pre_tokenizer": metaspace})
    assert _prefixed({"normalizer": prepend, "pre_tokenizer": None})
    assert not _prefixed({"normalizer": None, "pre_tokenizer": {**metaspace, "prepend_scheme": "never"}})
    assert not _prefixed({"normalizer": None, "pre_tokenizer": None})
