"""Layers that use a matrix or a bias in ways that a rehearsal on a few tokens does not show, or more than once.

And backward passes that are broken off, of which nothing counts in the next attempt.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from helpers_llama import _axis
from torch import Tensor, nn
from torch.nn.functional import linear

from pyprune.discovery.groups import Group, Groups, Member
from pyprune.errors import PyPruneError
from pyprune.importance import score

HIDDEN, CHANNELS, VOCABULARY = 16, 24, 97
CRITERIA = ("vectorize", "param_first", "param_second", "param_mix", "group_fisher")
Ffn = Callable[["Block", Tensor], Tensor]


def in_pieces(block: Block, x: Tensor) -> Tensor:
    return torch.cat([block.plain(c) for c in x.split(16, dim=1)], dim=1)


def twice(block: Block, x: Tensor) -> Tensor:
    return block.plain(x + block.plain(x))


def with_a_scaled_bias(block: Block, x: Tensor) -> Tensor:
    return block.down(torch.tanh(linear(x, block.up.weight, block.up.bias * 1.5)))


def with_a_joined_bias(block: Block, x: Tensor) -> Tensor:
    return block.down(torch.tanh(linear(x, block.up.weight, torch.cat([block.up.bias[:9], block.up.bias[9:]]))))


def with_a_bias_used_elsewhere(block: Block, x: Tensor) -> Tensor:
    return block.down(torch.tanh(block.up(x) + 0.3 * block.up.bias))


WAYS = (in_pieces, twice, with_a_scaled_bias, with_a_joined_bias, with_a_bias_used_elsewhere)


class Block(nn.Module):
    def __init__(self, ffn: Ffn) -> None:
        super().__init__()
        self.up, self.down, self.ffn = nn.Linear(HIDDEN, CHANNELS), nn.Linear(CHANNELS, HIDDEN), ffn
        nn.init.normal_(self.up.bias)

    def plain(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.ffn(self, x)
        return y + 0.1 * y.cumsum(1)


class Model(nn.Module):
    def __init__(self, ffn: Ffn) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList([Block(ffn) for _ in range(2)])
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(logits=self.head(x))


def groups_of(model: nn.Module) -> Groups:
    found = []
    for i in range(2):
        at = f"layers.{i}"
        members = [
            Member(f"{at}.{n}", d, _axis(CHANNELS)) for n, d in (("up.weight", 0), ("up.bias", 0), ("down.weight", 1))
        ]
        found.append(Group(f"{at}:ffn", "ffn", at, i, CHANNELS, tuple(members)))
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    return Groups(found, shapes, dict(shapes))


def tokens(rows: int, length: int = 40) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_both_routes_agree(criterion: str, way: Ffn) -> None:
    model = Model(way)
    groups, batches = groups_of(model), [tokens(4)[:3], tokens(4)[3:]]
    ours, theirs = (score(model, groups, batches, criterion, route=r) for r in ("activations", "gradients"))
    assert ours.details["route"] == "activations"
    for name in (g.name for g in groups):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4 * float(theirs[name].abs().max()))


@pytest.mark.parametrize("criterion", ["wanda", "flap", "obs"])
def test_padding_that_cannot_be_told_apart_is_refused(criterion: str) -> None:
    model = Model(in_pieces)
    ids, mask = tokens(2), torch.ones(2, 40, dtype=torch.int64)
    score(model, groups_of(model), [{"input_ids": ids, "attention_mask": mask}], criterion)
    mask[0, 30:] = 0
    with pytest.raises(PyPruneError, match="holds padding, and which tokens a layer is given cannot be seen"):
        score(model, groups_of(model), [{"input_ids": ids, "attention_mask": mask}], criterion)


def with_a_gain(block: Block, x: Tensor) -> Tensor:
    h = torch.cat([block.up(c) for c in x.split(16, dim=1)], dim=1)
    return block.down(torch.tanh(h) * block.gain)


def ffn_groups(blocks: list[str], names: dict[str, int]) -> list[Group]:
    found = []
    for i, at in enumerate(blocks):
        members = tuple(Member(f"{at}.{n}", d, _axis(CHANNELS)) for n, d in names.items())
        found.append(Group(f"{at}:ffn", "ffn", at, i, CHANNELS, members))
    return found


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_gain_that_autograd_serves_counts_once(criterion: str) -> None:
    """Its gradient had arrived when the matrix behind it turned out to be used in pieces."""
    model = Model(with_a_gain)
    for block in model.layers:
        block.gain = nn.Parameter(torch.randn(CHANNELS))
    names = {"up.weight": 0, "up.bias": 0, "gain": 0, "down.weight": 1}
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    groups = Groups(ffn_groups(["layers.0", "layers.1"], names), shapes, dict(shapes))
    batches = [tokens(4)[:3], tokens(4)[3:]]
    ours, theirs = (score(model, groups, batches, criterion, route=r) for r in ("activations", "gradients"))
    assert ours.details["route"] == "activations"
    for group in groups:
        expected = theirs[group.name]
        torch.testing.assert_close(ours[group.name], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


class WithoutAList(Model):
    """Two blocks that are in no list, and a gain whose gradient is the larger, the smaller the gain is."""

    def __init__(self) -> None:
        super().__init__(twice)
        self.first, self.second = self.layers
        del self.layers
        self.gain = nn.Parameter(torch.full((HIDDEN,), 1 / 300))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        x = self.embed(input_ids)
        x = x + x * 300 * self.gain
        return SimpleNamespace(logits=self.head(self.second(self.first(x))))


@pytest.mark.parametrize("criterion", ["vectorize", "param_first", "param_second"])
def test_an_overflow_counts_nothing_at_the_next_loss_scale(criterion: str) -> None:
    model = WithoutAList().to(torch.float16)
    found = ffn_groups(["first", "second"], {"up.weight": 0, "up.bias": 0, "down.weight": 1})
    found.append(Group("gain:hidden", "hidden", "", None, HIDDEN, (Member("gain", 0, _axis(HIDDEN)),)))
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    groups = Groups(found, shapes, dict(shapes))
    ours, theirs = (score(model, groups, [tokens(4)], criterion, route=r) for r in ("activations", "gradients"))
    assert ours.details["engine"].startswith("whole backward passes") and ours.details["loss_scale"] < 2**15
    for group in groups:
        expected = theirs[group.name]
        torch.testing.assert_close(ours[group.name], expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))
