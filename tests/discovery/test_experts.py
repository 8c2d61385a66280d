"""Mixtures of experts: every expert is reached, and its channels, and the experts themselves, are cut correctly."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from helpers_discovery import half, logits, masked, permuted, sliced, tensors_of
from helpers_mixtures import Router, mixture, without_member
from torch import nn

from pyprune.discovery import discover
from pyprune.discovery.groups import Groups
from pyprune.selection.plan import Cut, Plan
from pyprune.surgery import apply

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "olmoe", "granitemoe",
            "jamba", "nemotron_h"]  # fmt: skip
EXPERTS = dict.fromkeys(FAMILIES, 5) | {"deepseek_v3": 12}
ROLES = ("experts", "expert_ffn")


@pytest.fixture(scope="module")
def known():
    """Models and their groups, found once."""
    store: dict[str, tuple[nn.Module, Groups]] = {}

    def get(family: str) -> tuple[nn.Module, Groups]:
        if family not in store:
            model = mixture(family)
            store[family] = model, discover(model)
        return store[family]

    return get


def all_but_one(group):
    rng = np.random.default_rng(2)
    return Cut(group, tuple(tuple(sorted(rng.permutation(group.units)[1:].tolist())) for _ in range(group.outer)))


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_the_test_models_go_to_different_experts(family, known):
    model, _ = known(family)
    with Router(EXPERTS[family]) as router:
        logits(model)
    assert router.choices
    for chosen in router.choices:
        assert len({tuple(sorted(row)) for row in chosen.tolist()}) >= 4
        assert len(chosen.unique()) >= 4


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_and_their_channels_are_found_with_every_stacked_tensor(family, known):
    model, groups = known(family)
    stacks = [n for n, p in model.named_parameters() if ".experts." in n]
    assert stacks
    for role in ROLES:
        found = groups.prunable([role])
        wide = {n for n in stacks if role == "experts" or not n.endswith("down_proj_bias")}
        assert {m.tensor for g in found for m in g.members if ".experts." in m.tensor} == wide
        assert all(g.exact == (role == "expert_ffn") for g in found)
    assert all(g.units == 24 for g in groups.prunable(["expert_ffn"]))
    assert not [g for g in groups if g.frozen and "no rule" in g.frozen]


@pytest.mark.parametrize("backend", ["batched_mm", "eager"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "granitemoe"])
def test_groups_do_not_depend_on_how_experts_are_computed(family, backend, known):
    other = discover(mixture(family, experts=backend))
    expected = known(family)[1]
    assert other.prunable() == expected.prunable()


def test_the_grouped_product_without_a_kernel_gives_the_same_groups(known, monkeypatch):
    from transformers.integrations import moe

    monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *_: False)
    model, expected = known("mixtral")
    assert discover(model).prunable() == expected.prunable()


def test_an_expert_number_that_python_reads_freezes_the_experts_but_not_their_channels(known):
    other, expected = discover(mixture("nemotron_h", experts="eager")), known("nemotron_h")[1]
    assert other.prunable(["expert_ffn"]) == expected.prunable(["expert_ffn"])
    assert not other.prunable(["experts"])


@pytest.mark.parametrize("family", FAMILIES)
def test_shuffling_units_changes_nothing_unless_a_member_is_left_out(family, known):
    model, groups = known(family)
    before = logits(model)
    for group in groups.prunable([*ROLES, "kv_heads", "query_heads", "ffn"]):
        assert (logits(permuted(model, [group])) - before).abs().max() <= 1e-4, group.name
        if group.role in ROLES:
            for member in group.members:
                change = (logits(permuted(model, [without_member(group, member)])) - before).abs().max()
                assert change > 1e-2, f"{group.name} without {member.tensor}"


@pytest.mark.parametrize("family", FAMILIES)
def test_slicing_expert_channels_equals_masking_them(family, known):
    model, groups = known(family)
    for roles in (["expert_ffn"], ["expert_ffn", "ffn", "kv_heads"]):
        plan = half(groups.prunable(roles, exact=True))
        expected = logits(masked(model, plan))
        assert (expected - logits(model)).abs().max() > 0.1
        assert (logits(sliced(model, plan, groups)) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("family", [f for f in FAMILIES if not f.startswith("deepseek") and f != "jamba"])
def test_surgery_narrows_every_expert(family, known):
    model, groups = known(family)
    plan = half(groups.prunable(["expert_ffn"]))
    small = apply(model, plan, copy=True)
    stacked = [p.shape for n, p in small.named_parameters() if n.endswith("experts.down_proj")]
    assert all(12 in shape and 24 not in shape for shape in stacked)
    assert (logits(small) - logits(masked(model, plan))).abs().max() <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_removing_experts_equals_routers_that_cannot_choose_them(family, known):
    model, groups = known(family)
    chosen = groups.prunable(["experts"])
    assert all(not g.exact for g in chosen), "zeroing an expert leaves it choosable"
    plan = Plan(tuple(all_but_one(g) for g in chosen))
    small = apply(model, plan, copy=True)
    positions = {n: gone for cut in plan.cuts for n, _, gone in cut.removed_positions()}
    (gone,) = {tuple(p.tolist()) for p in positions.values()}
    biases = {m.tensor for g in chosen for m in g.members if not m.parameter}
    expected = with_bias_of_minus_infinity(model, biases, positions)
    with Router(EXPERTS[family], list(gone)):
        target = logits(expected)
    assert (target - logits(model)).abs().max() > 0.05
    assert (logits(small) - target).abs().max() <= 1e-4


def with_bias_of_minus_infinity(model, biases, positions):
    """A copy whose routers' correction biases rule out the removed experts as well."""
    out = copy.deepcopy(model)
    for name in biases:
        tensors_of(out)[name][torch.from_numpy(positions[name])] = -torch.inf
    return out


def test_as_many_experts_stay_as_the_router_chooses(known):
    for family, least in (("mixtral", 2), ("deepseek_v2", 2)):
        groups = known(family)[1]
        assert {g.min_units for g in groups.prunable(["experts"])} == {least}
        assert {g.min_units for g in groups if g.role != "experts"} == {1}
        again = Groups.from_dict(groups.to_dict())
        assert list(again) == list(groups)
    # Twelve experts in four groups of three: a router that adds up the best two of each group needs two.
    (group,) = known("deepseek_v3")[1].prunable(["experts"])
    assert (group.outer, group.units, group.min_units) == (4, 3, 2)


def test_experts_that_are_all_chosen_stay():
    model = mixture("mixtral", num_experts_per_tok=5)
    frozen = [g for g in discover(model) if g.role == "experts"]
    assert len(frozen) == 2 and all("no more experts than its router chooses" in g.frozen for g in frozen)


class Expert(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x):
        return self.down(nn.functional.silu(self.up(x)))


class ListedBlock(nn.Module):
    """Experts as a list of modules, each called on the tokens that chose it."""

    def __init__(self, width, inner, experts):
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(Expert(width, inner) for _ in range(experts))

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(flat).softmax(-1).topk(2, dim=-1)
        mask = nn.functional.one_hot(chosen, num_classes=len(self.experts)).permute(2, 1, 0)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            slot, token = torch.where(mask[i])
            out.index_add_(0, token, expert(flat[token]) * weights[token, slot, None])
        return out.view_as(x)


class ListedModel(nn.Module):
    def __init__(self, block, width=12):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, width), nn.Linear(width, 50, bias=False)
        self.layers = nn.ModuleList(block() for _ in range(2))

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def test_each_listed_expert_has_its_own_channels_though_few_tokens_choose_it():
    torch.manual_seed(0)
    model = ListedModel(lambda: ListedBlock(12, 10, 30)).eval()
    with torch.no_grad():
        for layer in model.layers:
            layer.gate.weight[3:].mul_(0.01)  # nearly all tokens want the first three
    groups = discover(model)
    found = groups.prunable(["expert_ffn"])
    assert [g.module for g in found] == [f"layers.{i}.experts.{e}" for i in range(2) for e in range(30)]
    assert all(g.exact and len(g.members) == 3 for g in found)
    ids = torch.arange(48).view(2, 24)
    plan = half(found, seed=4)
    assert (masked(model, plan)(ids) - model(ids)).abs().max() > 1e-2
    assert (masked(model, plan)(ids) - sliced(model, plan, groups)(ids)).abs().max() <= 1e-5
    routers = [g for g in groups if any(m.tensor.endswith("gate.weight") and m.dim == 0 for m in g.members)]
    assert len(routers) == 2 and not any(g.prunable for g in routers)


class ClampedBlock(nn.Module):
    """Stacked experts taken by numbers that are kept within bounds first."""

    def __init__(self, width, inner, experts, bound):
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, inner, width))
        self.down = nn.Parameter(torch.randn(experts, width, inner))
        self.bound = bound

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(flat).softmax(-1).topk(1, dim=-1)
        numbers = self.bound(chosen[:, 0], self.up.shape[0])
        inner = nn.functional.silu(torch.einsum("tiw,tw->ti", self.up[numbers], flat))
        return (torch.einsum("twi,ti->tw", self.down[numbers], inner) * weights).view_as(x)


@pytest.mark.parametrize(
    "bound",
    [
        lambda numbers, n: numbers.clamp(0, n - 1),
        lambda numbers, n: numbers.clone().clamp_(max=n - 1),
        lambda numbers, n: numbers.clamp_min(0),
    ],
)
def test_bounds_that_no_number_of_an_expert_reaches_past_change_nothing(bound):
    torch.manual_seed(0)
    model = ListedModel(lambda: ClampedBlock(12, 10, 6, bound)).eval()
    groups = discover(model)
    found = groups.prunable(["experts"])
    assert [g.units for g in found] == [6, 6] and all(len(g.members) == 3 for g in found)
    ids = torch.arange(48).view(2, 24)
    plan = half(found, seed=4)
    cut_out = sliced(model, plan, groups)
    for layer, cut in zip(model.layers, plan.cuts, strict=True):
        gone = torch.tensor([i for i in range(6) if i not in cut.kept[0]])
        layer.gate.register_forward_hook(lambda _, __, out, gone=gone: out.index_fill(-1, gone, -math.inf))
    assert (model(ids) - cut_out(ids)).abs().max() <= 1e-5


@pytest.mark.parametrize("bound", [lambda numbers, n: numbers.clamp(max=n - 2), lambda numbers, n: numbers.clamp(1)])
def test_bounds_that_turn_one_expert_into_another_freeze_them(bound):
    groups = discover(ListedModel(lambda: ClampedBlock(12, 10, 6, bound)).eval())
    frozen = [g for g in groups if g.role == "experts" or (len(g.members) == 3 and g.units == 6)]
    assert not groups.prunable(["experts"]) and frozen and all("computed with" in g.frozen for g in frozen)


class CountedBlock(nn.Module):
    """Stacked experts addressed by a Python loop over counts of tokens: nothing ties the stack to the router."""

    def __init__(self, width, inner, experts, read):
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, inner, width))
        self.down = nn.Parameter(torch.randn(experts, width, inner))
        self.read = read

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(flat).softmax(-1).topk(1, dim=-1)
        scattered = torch.zeros(flat.shape[0], self.up.shape[0]).scatter(1, chosen, 1)
        order = chosen[:, 0].argsort()
        parts = flat[order].split(self.read(scattered.sum(0).long(), chosen), dim=0)
        out = torch.zeros_like(flat)
        results = [nn.functional.relu(part @ self.up[i].T) @ self.down[i].T for i, part in enumerate(parts)]
        out = out.index_add(0, order, torch.cat(results))
        return (out * weights).view_as(x)


@pytest.mark.parametrize(
    "read",
    [
        lambda counts, chosen: counts.tolist(),
        lambda counts, chosen: [int(c) for c in counts],
        lambda counts, chosen: [int((chosen == i).sum()) for i in range(4)],
        lambda counts, chosen: torch.bincount(chosen[:, 0], minlength=4).tolist(),
    ],
)
def test_experts_addressed_by_python_numbers_are_not_prunable(read):
    groups = discover(ListedModel(lambda: CountedBlock(12, 10, 4, read)).eval())
    for tensor, dim in (("layers.0.gate.weight", 0), ("layers.0.up", 0), ("layers.0.down", 0)):
        holding = [g for g in groups if any((m.tensor, m.dim) == (tensor, dim) for m in g.members)]
        assert holding and not any(g.prunable for g in holding), tensor


def test_a_router_that_treats_one_expert_differently_freezes_all():
    class Special(ListedBlock):
        def forward(self, x):
            flat = x.reshape(-1, x.shape[-1])
            weights, chosen = self.gate(flat).softmax(-1).topk(2, dim=-1)
            up = torch.stack([e.up.weight for e in self.experts])[chosen]
            hidden = torch.einsum("th,tkfh->tkf", flat, up).relu()
            down = torch.stack([e.down.weight for e in self.experts])[chosen]
            gain = weights * (1 + (chosen == 0))
            return torch.einsum("tkf,tkhf,tk->th", hidden, down, gain).view_as(x)

    groups = discover(ListedModel(lambda: Special(12, 10, 4)).eval())
    routers = [g for g in groups if any(m.tensor.endswith("gate.weight") and m.dim == 0 for m in g.members)]
    assert routers and not any(g.prunable for g in routers)
