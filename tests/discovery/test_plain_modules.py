"""Networks that are no language models: an encoder, vision transformers, convolutions with concatenations."""

from __future__ import annotations

import pytest
import torch
from helpers_discovery import half, liven, masked, permuted, sliced
from torch import nn
from torch.nn import functional as F

from pyprune import PyPruneError, discover


class Patches(nn.Module):
    """A vision transformer's parts by hand: patches, a class token in front, positions, one block, a head."""

    def __init__(self, width: int = 24, heads: int = 3):
        super().__init__()
        self.heads = heads
        self.patch = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.place = nn.Parameter(torch.zeros(1, 5, width))
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 40), nn.Linear(40, width)
        self.head = nn.Linear(width, 7)

    def forward(self, image):
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.place
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # The width of a head is read where it was set, so cutting heads changes no scale.
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, scale=8**-0.5).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x[:, 0])


class Dense(nn.Module):
    """Every layer reads the concatenation of all before it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1))
        self.two = nn.Sequential(nn.BatchNorm2d(14), nn.ReLU(), nn.Conv2d(14, 4, 3, padding=1))
        self.head = nn.Linear(18, 5)

    def forward(self, image):
        x = self.stem(image)
        x = torch.cat([x, self.one(x)], dim=1)
        x = torch.cat([x, self.two(x)], dim=1)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def encoder():
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=24, num_attention_heads=3, intermediate_size=40, num_hidden_layers=2, vocab_size=50)
    return BertModel(config, add_pooling_layer=False), {"input_ids": torch.arange(22).view(2, 11)}


def vision():
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=24, num_attention_heads=3, intermediate_size=40, num_hidden_layers=2, image_size=8, patch_size=4
    )
    return ViTModel(config, add_pooling_layer=False), {"pixel_values": torch.randn(2, 3, 8, 8)}


NETS = {
    "encoder": encoder,
    "vision": vision,
    "patches": lambda: (Patches(), {"image": torch.randn(2, 3, 8, 8)}),
    "dense": lambda: (Dense(), {"image": torch.randn(2, 3, 8, 8)}),
}
EXPECTED = {
    "encoder": {"kv_heads": [3, 3], "ffn": [40, 40]},
    "vision": {"kv_heads": [3, 3], "ffn": [40, 40]},
    "patches": {"kv_heads": [3], "ffn": [40]},
}


@pytest.fixture(params=NETS)
def net(request):
    torch.manual_seed(0)
    model, inputs = NETS[request.param]()
    model = liven(model.eval())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
    return request.param, model, inputs


@torch.no_grad()
def output(model, inputs):
    out = model(**inputs)
    return out if isinstance(out, torch.Tensor) else out.last_hidden_state


def test_heads_and_ffn_channels_are_found_without_any_hint(net):
    name, model, inputs = net
    groups = discover(model, inputs)
    for role, units in EXPECTED.get(name, {}).items():
        assert [g.units for g in groups if g.role == role and g.prunable] == units


def test_shuffling_the_units_of_any_group_changes_nothing(net):
    _, model, inputs = net
    groups = [g for g in discover(model, inputs) if g.prunable and g.members]
    assert groups
    for group in groups:
        torch.testing.assert_close(
            output(permuted(model, [group]), inputs), output(model, inputs), atol=2e-5, rtol=2e-5
        )


def test_slicing_exact_groups_equals_masking_them(net):
    name, model, inputs = net
    found = discover(model, inputs)
    # Stock attention is written for one width of head, so there whole heads go.
    roles = {g.role for g in found} if name in ("patches", "dense") else {"kv_heads", "ffn"}
    groups = [g for g in found if g.prunable and g.exact and g.members and g.role in roles]
    plan = half(groups)
    small = sliced(model, plan, found)
    if name == "patches":
        small.heads = 1
    expected = output(masked(model, plan), inputs)
    torch.testing.assert_close(output(small, inputs), expected, atol=2e-5, rtol=2e-5)
    assert not torch.allclose(expected, output(model, inputs), atol=1e-3)


def test_concatenated_layers_are_one_group_each_with_an_exact_place_in_every_reader():
    groups = [g for g in discover(Dense().eval(), torch.zeros(2, 3, 8, 8)) if g.prunable]
    assert [g.units for g in groups] == [8, 6, 4]
    (reader,) = [m for m in groups[1].members if m.tensor == "two.2.weight"]
    assert reader.index.positions()[0].reshape(-1).tolist() == [8, 9, 10, 11, 12, 13]
    (last,) = [m for m in groups[2].members if m.tensor == "head.weight"]
    assert last.index.positions()[0].reshape(-1).tolist() == [14, 15, 16, 17]


def test_inputs_of_the_wrong_rank_are_refused_with_their_shape():
    with pytest.raises(PyPruneError, match=r"Dense cannot run on inputs of shape \(2, 3, 8\)"):
        discover(Dense().eval(), torch.zeros(2, 3, 8))
