"""A cache is found by the name that transformers uses, those that it used before 5.24, and those of remote code."""

from __future__ import annotations

import pytest
import torch
from helpers_llama import tiny_llama

from pyprune.caching import cache_argument, cache_of


def test_what_a_stock_model_returns_goes_back_in() -> None:
    model, ids = tiny_llama().eval(), torch.arange(3, 11)[None]
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits[:, -1]
        cache = cache_of(model(input_ids=ids[:, :-1], use_cache=True))
        behind = model(input_ids=ids[:, -1:], use_cache=True, **{cache_argument(model): cache}).logits[:, -1]
    assert cache.get_seq_length() == 8  # the last call read the seven that were kept, and added its own
    assert (behind - whole).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["cache", "past_key_values", "cache_params"])
def test_each_name_is_known(name: str) -> None:
    class Remote:
        exec(f"def forward(self, input_ids, {name}=None): pass")

    assert cache_argument(Remote()) == name
    assert cache_of({"logits": 0, name: "kept"}) == "kept"


def test_no_cache_is_none() -> None:
    assert cache_of({"logits": 0}) is None and cache_of({"cache": None}) is None
