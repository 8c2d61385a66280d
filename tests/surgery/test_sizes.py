"""Sizes that no cut names: buffers that hold one number, and modules that hold no count of heads."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers_discovery import half, liven, logits, masked
from torch import nn

from pyprune import families
from pyprune.checkpoint import load, save
from pyprune.discovery import discover
from pyprune.errors import PyPruneError
from pyprune.surgery import apply, counts
from pyprune.surgery.names import LayerNames, Tensors, uniform_buffers
from pyprune.surgery.rebuild import _kept_units

SIZES = {"vocab_size": 101, "hidden_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}


def test_a_buffer_of_one_number_follows_the_channels_that_go(tmp_path):
    """Falcon Mamba's norms without weights hold ones, as many as there are channels, that its slow path never reads."""
    import transformers as t

    config = t.FalconMambaConfig(**SIZES, state_size=4, expand=2, time_step_rank=4)
    model = liven(t.FalconMambaForCausalLM(config).eval())
    plan = half([g for g in discover(model).prunable() if g.role == "channels" and g.layer is not None])
    expected = logits(masked(model, plan))
    small = apply(model, plan)
    ones = [b.shape for n, b in small.named_buffers() if n.startswith("backbone.layers.1.") and bool((b == 1).all())]
    assert (48,) in ones
    assert (logits(small) - expected).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max()))
    assert torch.equal(logits(load(save(small, None, tmp_path / "small"))), logits(small))


def test_only_buffers_of_one_number_are_uniform():
    module = nn.Module()
    module.register_buffer("ones", torch.ones(3, 2))
    module.register_buffer("table", torch.arange(4.0))
    module.register_buffer("scale", torch.tensor(2.0))
    module.register_buffer("absent", torch.empty(4, device="meta"))
    assert uniform_buffers(module) == {"ones"}


def test_heads_go_from_a_module_that_holds_no_count_of_them(tmp_path):
    """A sliding layer of MiMo V2 Flash has twice the KV heads of the configuration: half of six is no such number."""
    import transformers as t

    config = t.MiMoV2FlashConfig(
        **SIZES, intermediate_size=40, moe_intermediate_size=16, num_attention_heads=6, num_key_value_heads=3,
        head_dim=8, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
        layer_types=["full_attention", "sliding_attention"], sliding_window=4,
    )  # fmt: skip
    model = liven(t.MiMoV2FlashForCausalLM(config).eval())
    plan = half([g for g in discover(model).prunable(["kv_heads"]) if g.layer == 1])
    expected = logits(masked(model, plan))
    small = apply(model, plan)
    attention = small.model.layers[1].self_attn
    assert attention.sinks.shape == (3,) and attention.k_proj.out_features == 24 and attention.head_dim == 8
    assert (logits(small) - expected).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max()))
    assert torch.equal(logits(load(save(small, None, tmp_path / "small"))), logits(small))


def test_a_buffer_that_is_computed_anew_when_the_model_is_opened_must_keep_its_value():
    """Recurrent Gemma multiplies the stream by the root of its width, which no checkpoint holds."""
    import transformers as t

    config = t.RecurrentGemmaConfig(**SIZES, intermediate_size=80, num_attention_heads=6, lru_width=48)
    model = t.RecurrentGemmaForCausalLM(config).eval()
    groups = discover(model)
    with pytest.raises(PyPruneError, match=r"model.normalizer.*would change.*no checkpoint holds"):
        apply(model, half(groups.prunable(["hidden"])))
    assert apply(model, half(groups.prunable(["ffn"])), copy=True).model.normalizer == model.model.normalizer


def test_rows_of_a_table_that_no_cut_chose_are_an_error():
    module = nn.Module()
    module.register_buffer(families.KEPT, torch.arange(2))
    with pytest.raises(PyPruneError, match="the plan cuts none of them"):
        _kept_units(module, LayerNames("", ()), Tensors({}, {}, frozenset()), [])


class Misfit(nn.Module):
    """Its sizes do not fit together."""

    def __init__(self):
        super().__init__()
        self.read, self.write = nn.Embedding(8, 6), nn.Linear(5, 8)

    def forward(self, input_ids):
        return self.write(self.read(input_ids))


def test_a_trial_that_fails_is_not_logged():
    log = logging.getLogger("torch._subclasses.fake_tensor")
    seen: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = seen.append  # type: ignore[method-assign]
    log.addHandler(handler)
    try:
        assert not counts.runs(Misfit())
    finally:
        log.removeHandler(handler)
    assert not seen and not log.disabled
