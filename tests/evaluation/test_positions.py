"""Models that know so many positions and no more are not asked for more."""

from __future__ import annotations

import pytest
import torch
from helpers_run import byte_tokenizer

import pyprune
from pyprune.errors import PyPruneError
from pyprune.evaluation.generation import continuation
from pyprune.evaluation.loglikelihood import known_positions


def learned() -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 24}
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(byte_tokenizer()), **sizes)).eval()


@pytest.mark.parametrize(("prompt", "tokens"), [("hello", 200), ("a prompt that is longer than all of them", 8)])
def test_a_continuation_keeps_to_them(prompt: str, tokens: int) -> None:
    model, tokenizer = learned(), byte_tokenizer()
    said = continuation(model, tokenizer, prompt, tokens)
    if len(prompt) > 16:  # the end of it counts
        assert said == continuation(model, tokenizer, prompt[-16:], tokens)


def test_the_length_of_mpt_is_one() -> None:
    from transformers import MptConfig, MptForCausalLM

    model = MptForCausalLM(MptConfig(vocab_size=97, d_model=32, n_heads=4, n_layers=1, max_seq_len=64)).eval()
    assert known_positions(model) == 64
    ids = torch.zeros(4, 80, dtype=torch.int64)
    with pytest.raises(PyPruneError, match="length 80: is more than the 64 positions"):
        pyprune.prune(model, ratio=0.1, criterion="wanda", calibration=ids)
