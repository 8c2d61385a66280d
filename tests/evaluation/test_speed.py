"""Speed, cache and arithmetic, against what the sizes of a model say."""

from __future__ import annotations

import time

import pytest
import torch
from helpers_run import tiny_llama

from pyprune import apply, discover, select
from pyprune.evaluation.footprint import cache_bytes, footprint, macs
from pyprune.evaluation.speed import generate, speeds


def uneven():
    """A Llama whose layers differ in KV heads and FFN widths."""
    model = tiny_llama()
    groups = discover(model).thaw(("kv_heads", "query_heads"))
    scores = {g.name: torch.rand(g.outer, g.units) for g in groups.prunable()}
    return apply(model, select(groups, scores, ratio=0.3, layers="1-2"))


def sizes(model) -> tuple[int, int, int]:
    """(KV-cache bytes of a token, products with weights, products for a position) from the weights' shapes."""
    cache = weights = attention = 0
    for layer in model.model.layers:
        part = layer.self_attn
        cache += 4 * (part.k_proj.weight.shape[0] + part.v_proj.weight.shape[0])
        attention += 2 * part.q_proj.weight.shape[0]
        weights += sum(m.weight.numel() for m in layer.modules() if isinstance(m, torch.nn.Linear))
    return cache, weights + model.lm_head.weight.numel(), attention


@pytest.mark.parametrize("make", [tiny_llama, uneven])
def test_cache_and_arithmetic_are_what_the_shapes_say(make) -> None:
    model = make()
    cache, weights, attention = sizes(model)
    assert cache_bytes(model) == (cache, 0)
    assert macs(model) == (weights, attention)


def test_a_model_of_few_positions_is_counted_too() -> None:
    model = tiny_llama(max_position_embeddings=40)
    assert macs(model) == sizes(model)[1:]


def test_a_recurrent_state_does_not_grow() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2, conv_kernel=4, expand=2)
    growing, constant = cache_bytes(MambaForCausalLM(config).eval())
    assert growing == 0
    assert constant == 4 * 2 * 64 * (4 + 4)  # float32, layers, channels, kernel and state


def test_the_footprint_counts_tied_weights_once_and_keeps_the_mode() -> None:
    model = tiny_llama().train()
    found = footprint(model, prompt_tokens=8, new_tokens=2)
    assert found.parameters == sum(p.numel() for p in model.parameters()) == 320_544
    assert found.weights_bytes == 4 * 320_544
    assert found.peak_memory > found.weights_bytes
    assert model.training


def test_generation_writes_exactly_the_tokens_asked_for_also_past_the_end_token() -> None:
    model = tiny_llama()
    model.generation_config.eos_token_id = list(range(258))  # any token would end it
    before = model.generation_config
    stamps, out = generate(model, torch.zeros(2, 5, dtype=torch.int64), 7)
    assert out["sequences"].shape == (2, 12)
    assert len(stamps) == 8 and stamps == sorted(stamps)
    assert model.generation_config is before


def test_models_run_in_turn_and_a_slower_one_is_seen_to_be_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyprune.evaluation import speed as module

    fast, slow = tiny_llama(), tiny_llama().train()
    original, order = type(fast).forward, []

    class Slow(type(fast)):
        def forward(self, *args, **kwargs):
            time.sleep(0.05)
            return original(self, *args, **kwargs)

    slow.__class__ = Slow
    ran = module.generate
    monkeypatch.setattr(module, "generate", lambda m, *a: order.append(m is slow) or ran(m, *a))
    found = speeds({"fast": fast, "slow": slow}, prompt_tokens=16, new_tokens=3, batch=2, rounds=2)
    assert order == [False, True] * 3  # a warm-up and two rounds
    assert found["slow"].first_token >= 0.05
    assert found["slow"].prefill <= 2 * 16 / 0.05
    assert found["slow"].decode <= 2 * 3 / 0.15
    assert slow.training and not fast.training
    one = found["fast"]
    assert (one.prompt_tokens, one.new_tokens, one.batch, one.rounds, one.device) == (16, 3, 2, 2, "cpu")
    assert one.threads == torch.get_num_threads()
    assert f"{one.threads} threads" in one.protocol and "median of 2 rounds" in one.protocol


def test_rates_are_tokens_over_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyprune.evaluation import speed as module

    runs = iter([0, 2.0, 1.0, 3.0])  # seconds until the first token: warm-up, then three rounds
    monkeypatch.setattr(module, "generate", lambda *_: ([0.0, t := next(runs), t + 1.0, t + 5.0], None))
    one = speeds({"m": tiny_llama()}, prompt_tokens=12, new_tokens=2, batch=3, rounds=3)["m"]
    assert (one.first_token, one.prefill, one.decode) == (2.0, 18.0, 3 * 2 / 5.0)
    assert (one.first_token_spread, one.decode_spread) == (1.0, 0.0)
