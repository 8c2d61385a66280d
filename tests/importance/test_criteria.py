"""Every criterion against its published formula, written here once more with plain autograd in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers_llama import llama_groups, tiny_llama
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pyprune.discovery.groups import Group, Groups
from pyprune.errors import PyPruneError
from pyprune.importance import score

GRADIENT = ("vectorize", "param_first", "param_second", "param_mix")
CRITERIA = ("l1", "l2", *GRADIENT)
AGGREGATIONS = ("sum", "mean", "max", "prod", "first", "last")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_llama(attention_bias=True)


@pytest.fixture(scope="module")
def groups(model: nn.Module) -> Groups:
    return llama_groups(model.config, model)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 97, (5, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def published(model: nn.Module, ids: Tensor) -> dict[str, dict[str, Tensor]]:
    """Criterion -> parameter -> salience of every element in float64 (w*G with its sign for ``vectorize``)."""
    double = copy.deepcopy(model).double()
    per_sample: list[dict[str, Tensor]] = []
    for sample in ids:
        double.zero_grad(set_to_none=True)
        logits = double(input_ids=sample[None], use_cache=False).logits[0]
        cross_entropy(logits[:-1], sample[1:]).backward()
        per_sample.append({n: p.grad.clone() for n, p in double.named_parameters()})
    out: dict[str, dict[str, Tensor]] = {name: {} for name in CRITERIA}
    for n, p in double.named_parameters():
        w = p.detach()
        g = torch.stack([s[n] for s in per_sample])
        mean, fisher = g.mean(0), (g**2).mean(0)
        out["l1"][n] = w.abs()
        out["l2"][n] = w**2
        out["vectorize"][n] = w * mean
        out["param_first"][n] = (w * mean).abs()
        out["param_second"][n] = w**2 * fisher
        out["param_mix"][n] = (w * mean - 0.5 * w**2 * fisher).abs()
    return out


def member_reference(element: dict[str, Tensor], group: Group) -> Tensor:
    """[members, outer, units] float64."""
    members = []
    for member in group.members:
        x = element[member.tensor].movedim(member.dim, 0).flatten(1) if element[member.tensor].dim() > 1 else None
        slices = (x.sum(1) if x is not None else element[member.tensor]).abs()
        positions = member.index.positions()
        members.append(torch.stack([torch.stack([slices[list(u)].sum() for u in row]) for row in positions]))
    return torch.stack(members)


def relative(got: Tensor, want: Tensor, whole: bool = False) -> float:
    """Largest relative error of any unit; ``whole``: of all units together, in the Euclidean norm."""
    if whole:
        return float((got.double() - want).norm() / want.norm())
    return float(((got.double() - want).abs() / want.abs()).max())


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_member_of_every_group_matches_the_published_formula(
    model: nn.Module, groups: Groups, ids: Tensor, published: Any, criterion: str
) -> None:
    single = [
        Group(f"{g.name}#{i}", g.role, g.module, g.layer, g.units, (m,), exact=g.exact)
        for g in groups
        for i, m in enumerate(g.members)
    ]
    split = Groups(single, groups.shapes, groups.parameters)
    scores = score(model, split, ids.split(2), criterion)
    assert len(scores) == len(single)
    for g in single:
        got, want = scores[g.name], member_reference(published[criterion], g)[0]
        # A signed sum may cancel in a unit, and the gradient of a single element over its tokens.
        cancels = criterion == "vectorize" or len(groups.shapes[g.members[0].tensor]) == 1
        assert relative(got, want, whole=cancels) <= 1e-4, g.name


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_aggregation_matches_the_published_formula(
    model: nn.Module, groups: Groups, ids: Tensor, published: Any, criterion: str, aggregation: str
) -> None:
    scores = score(model, groups, ids.split(5), criterion, aggregation, roles=["kv_heads", "ffn"])
    assert "prod_shift" not in scores.details
    for group in groups.prunable(["kv_heads", "ffn"]):
        members = member_reference(published[criterion], group)
        want = {
            "sum": members.sum(0), "mean": members.mean(0), "max": members.max(0).values,
            "prod": members.prod(0), "first": members[0], "last": members[-1],
        }[aggregation]  # fmt: skip
        got = scores[group.name]
        assert got.dtype == torch.float32 and got.shape == (1, group.units)
        assert relative(got, want, whole=criterion == "vectorize") <= 1e-4


def test_a_product_that_float32_cannot_hold_keeps_its_ratios(
    model: nn.Module, groups: Groups, ids: Tensor, published: Any
) -> None:
    scores = score(model, groups, ids.split(5), "param_second", "prod", roles=["hidden"])
    shift = scores.details["prod_shift"]["hidden"]
    logs = member_reference(published["param_second"], groups["model:hidden"]).log2().sum(0)
    got = scores["model:hidden"].double().log2() + shift
    assert (logs - got)[scores["model:hidden"] > 1e-30].abs().max() < 1e-3
    assert scores["model:hidden"].isfinite().all() and scores["model:hidden"].max() > 0


def test_random_scores_follow_the_seed_and_not_the_company(model: nn.Module, groups: Groups) -> None:
    whole = score(model, groups, criterion="random", seed=4)
    part = score(model, groups, criterion="random", seed=4, roles=["ffn"], layers=[1])
    other = score(model, groups, criterion="random", seed=5)
    assert list(part) == ["model.layers.1.mlp:ffn"]
    assert torch.equal(part["model.layers.1.mlp:ffn"], whole["model.layers.1.mlp:ffn"])
    assert not torch.equal(other["model.layers.1.mlp:ffn"], whole["model.layers.1.mlp:ffn"])
    assert not torch.equal(whole["model.layers.0.mlp:ffn"], whole["model.layers.1.mlp:ffn"])


@pytest.mark.parametrize(("alias", "name"), [("taylor", "param_first"), ("fisher", "param_second")])
def test_aliases_are_the_criteria_they_stand_for(
    model: nn.Module, groups: Groups, ids: Tensor, alias: str, name: str
) -> None:
    a, b = score(model, groups, ids, alias, roles=["ffn"]), score(model, groups, ids, name, roles=["ffn"])
    assert a.criterion == name and all(torch.equal(a[g], b[g]) for g in b)


def test_a_registered_criterion_of_ones_own_is_used(model: nn.Module, groups: Groups, ids: Tensor) -> None:
    from pyprune import ops
    from pyprune.importance.registry import CRITERIA as registry
    from pyprune.importance.registry import Criterion, register

    register(Criterion("gradient_l1", "sum of |G|", measure=lambda w, g, h: ops.salience("abs", g), gradient=True))
    try:
        scores = score(model, groups, ids, "gradient_l1", roles=["ffn"])
        assert scores.details["route"] == "gradients"
        with pytest.raises(PyPruneError, match=r"route.*activations.*gradient_l1"):
            score(model, groups, ids, "gradient_l1", roles=["ffn"], route="activations")
    finally:
        del registry["gradient_l1"]
    double = copy.deepcopy(model).double()
    logits = double(input_ids=ids).logits
    cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    mlp = double.model.layers[1].mlp
    want = sum(
        p.grad.abs().sum(d) for p, d in ((mlp.gate_proj.weight, 1), (mlp.up_proj.weight, 1), (mlp.down_proj.weight, 0))
    )
    assert relative(scores["model.layers.1.mlp:ffn"][0], want) <= 1e-4


@pytest.mark.parametrize("criterion", CRITERIA)
def test_stacked_experts_are_scored_like_the_matrices_in_them(criterion: str) -> None:
    """A 3-D tensor [experts, rows, columns]: units along each of its dimensions."""
    from pyprune.discovery.groups import IndexMap, Lattice, Member

    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 6)
            self.w = nn.Parameter(torch.randn(3, 6, 4))
            self.head = nn.Linear(4, 11, bias=False)

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embedding(input_ids)
            return self.head(torch.einsum("bti,eio->bto", x, self.w).tanh())

    net = Stacked().eval()
    tokens = torch.randint(0, 11, (4, 7))
    shapes = {n: tuple(p.shape) for n, p in net.named_parameters()}
    axes = [
        Group(f"w{d}", "channels", "", None, n, (Member("w", d, IndexMap(1, n, (Lattice(0, 0, 1),))),))
        for d, n in enumerate((3, 6, 4))
    ]
    scores = score(net, Groups(axes, shapes, frozenset(shapes)), tokens.split(1), criterion)
    double = copy.deepcopy(net).double()
    grads = []
    for t in tokens:
        double.zero_grad(set_to_none=True)
        cross_entropy(double(t[None])[0, :-1], t[1:]).backward()
        grads.append(double.w.grad.clone())
    w, g = double.w.detach(), torch.stack(grads)
    h = (g**2).mean(0)
    element = {
        "l1": w.abs(), "l2": w**2, "vectorize": w * g.mean(0), "param_first": (w * g.mean(0)).abs(),
        "param_second": w**2 * h, "param_mix": (w * g.mean(0) - 0.5 * w**2 * h).abs(),
    }[criterion]  # fmt: skip
    for d in range(3):
        want = element.sum([i for i in range(3) if i != d]).abs()
        assert relative(scores[f"w{d}"][0], want, whole=criterion == "vectorize") <= 1e-4
