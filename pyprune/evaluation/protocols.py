"""Perplexity protocols that published figures follow, by name."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_LENGTH = 1024


@dataclass(frozen=True)
class Protocol:
    """How a text becomes windows.

    Attributes:
        length: tokens in a window.
        special_tokens: whether the text is tokenised with the tokenizer's own special tokens; a Llama tokenizer then
            puts one BOS before the whole text (and none before later windows).
    """

    length: int
    special_tokens: bool = False


PROTOCOLS = {
    "llm-pruner": Protocol(128, special_tokens=True),
    "1024": Protocol(1024),
    "2048": Protocol(2048),
    "4096": Protocol(4096),
}
"""``llm-pruner`` is that of LLM-Pruner's ``PPLMetric`` (Ma et al., NeurIPS 2023): 128-token windows without overlap,
the tokenizer's special tokens, tokens 2..128 scored. The others are the usual longer windows of pruning papers."""
