"""What discovery must not take for granted: tables computed by position, fixed indices, data that were never there."""

from __future__ import annotations

import pytest
import torch
from helpers_discovery import liven, logits, permuted, tensors_of
from torch import nn

from pyprune.discovery import Groups, discover


def of_role(groups, *roles):
    return [g for g in groups if g.role in roles]


def bloom(heads=6):
    from transformers import BloomConfig, BloomForCausalLM

    return liven(BloomForCausalLM(BloomConfig(vocab_size=101, hidden_size=48, n_layer=2, n_head=heads)).eval())


def falcon(**changes):
    from transformers import FalconConfig, FalconForCausalLM

    sizes = {"vocab_size": 101, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
    return liven(FalconForCausalLM(FalconConfig(**sizes, **changes)).eval())


@pytest.mark.parametrize("heads", [4, 6])
def test_alibi_heads_of_each_layer_are_one_group_that_only_their_slopes_freeze(heads):
    groups = discover(bloom(heads))
    found = of_role(groups, "kv_heads", "query_heads")
    assert [(g.role, g.layer, g.units) for g in found] == [("kv_heads", 0, heads), ("kv_heads", 1, heads)]
    assert all(g.table and not g.prunable and "arange" in g.frozen for g in found)
    assert len(groups.prunable(["ffn"])) == 2


def test_thawed_heads_are_right_for_code_that_keeps_every_head_its_slope(monkeypatch):
    from transformers.models.bloom import modeling_bloom

    model = bloom()
    (group, _) = of_role(discover(model).thaw(["kv_heads"]), "kv_heads")
    assert group.prunable
    stock = modeling_bloom._get_alibi_slopes
    before = logits(model)
    assert (logits(permuted(model, [group])) - before).abs().max() > 1e-3, "slopes do not matter here"
    monkeypatch.setattr(modeling_bloom, "_get_alibi_slopes", lambda *args: stock(*args).mean().expand(6))
    assert (logits(permuted(model, [group])) - logits(model)).abs().max() <= 2e-4


def test_thawing_leaves_groups_that_something_else_froze():
    groups = discover(bloom())
    frozen = {g.name for g in groups if not g.prunable and not g.table}
    assert frozen
    assert not frozen & {g.name for g in groups.thaw({g.role for g in groups}).prunable()}


def test_a_group_frozen_by_a_table_survives_serialisation():
    groups = discover(bloom())
    assert Groups.from_dict(groups.to_dict()).groups == groups.groups


def test_fixed_indices_from_the_end_tell_keys_and_values_of_fused_multi_query_weights():
    model = falcon(multi_query=True)
    groups = discover(model)
    heads = of_role(groups, "query_heads", "kv_heads")
    assert [(g.role, g.units, g.outer, g.within) for g in heads] == [("query_heads", 6, 1, None)] * 2
    assert all(g.prunable for g in heads)
    # Keys and values come after the queries: their rows belong to no head.
    weight = tensors_of(model)["transformer.h.0.self_attention.query_key_value.weight"]
    (member,) = [m for m in heads[0].members if m.tensor.endswith("h.0.self_attention.query_key_value.weight")]
    assert member.index.positions().max() == weight.shape[0] - 2 * 8 - 1


def test_grouped_falcon_has_kv_heads_with_their_query_heads_inside():
    groups = discover(falcon(new_decoder_architecture=True, num_kv_heads=2))
    heads = of_role(groups, "query_heads", "kv_heads")
    assert [(g.role, g.outer, g.units) for g in heads[:2]] == [("kv_heads", 1, 2), ("query_heads", 2, 3)]
    assert heads[1].within == heads[0].name


class Indexed(nn.Module):
    def __init__(self, index):
        super().__init__()
        self.up, self.down, self.index = nn.Linear(6, 10), nn.Linear(1, 4), index

    def forward(self, x):
        return self.down(self.up(x)[:, [self.index]])


@pytest.mark.parametrize("index", [3, -4])
def test_an_index_that_removal_would_shift_freezes(index):
    groups = discover(Indexed(index), torch.randn(2, 6))
    frozen = [g.frozen for g in groups if any(m.tensor == "up.bias" for m in g.members)]
    assert frozen and all("looked up by value" in f for f in frozen)


class Windows(nn.Module):
    """Reads the first half of its channels only where there are two windows of four tokens."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(8, 6)

    def forward(self, x):
        y = self.up(x)
        out = y[..., 8:]
        if x.shape[1] >= 8:
            out = out + y[..., :8]
        return self.down(torch.relu(out))


def test_channels_that_nothing_reads_on_the_inputs_are_frozen():
    short = discover(Windows(), torch.randn(2, 5, 6))
    (unread,) = [g for g in short if g.frozen and "nothing reads it" in g.frozen]
    assert unread.units == 8
    long = discover(Windows(), torch.randn(2, 9, 6))
    (whole,) = [g for g in long if any(m.tensor == "up.weight" and m.dim == 0 for m in g.members)]
    assert whole.prunable and whole.members[0].index.width == 2


class Tail(nn.Module):
    """Works on what is left of the text after the first eight tokens."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x):
        y = torch.relu(self.up(x))
        z = y[:, 8:]
        return self.down(y), z.view(z.shape[0], z.shape[1], 5, 2).sum(-1)


def test_axes_of_a_slice_without_data_are_frozen():
    groups = discover(Tail(), torch.randn(2, 5, 6))
    frozen = [g.frozen for g in groups if any(m.tensor == "up.bias" for m in g.members)]
    assert frozen and all("left without data" in f for f in frozen)
