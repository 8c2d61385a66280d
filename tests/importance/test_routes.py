"""Scores from activations and from gradients are the same, and only one of them makes gradients of weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers_discovery import liven, tiny
from helpers_llama import llama_groups, tiny_llama
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pyprune import discover
from pyprune.discovery.groups import Groups
from pyprune.errors import PyPruneError
from pyprune.importance import Scores, score
from pyprune.importance import scoring as stage
from pyprune.importance.blocks import NotSweepable

CRITERIA = ("vectorize", "param_first", "param_second", "param_mix", "group_fisher")
ROLES = (["kv_heads", "ffn"], ["hidden", "ffn"])


@pytest.fixture(autouse=True)
def _batches_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "STEP_TOKENS", 0)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 97, (5, 9), generator=torch.Generator().manual_seed(3))


def both(model: nn.Module, groups: Groups, batches: Any, criterion: str, roles: list[str]) -> tuple[Scores, Scores]:
    routes = ("activations", "gradients")
    a, g = (score(model, groups, batches, criterion, roles=roles, route=route) for route in routes)
    assert (a.details["route"], g.details["route"]) == routes
    return a, g


def assert_close(a: Scores, b: Scores, tolerance: float = 1e-4) -> None:
    assert list(a) == list(b) and len(a) > 0
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=tolerance, atol=tolerance * float(b[name].max())), name


def per_sample_gradients(model: nn.Module, ids: Tensor) -> tuple[nn.Module, dict[str, Tensor]]:
    """A float64 copy, and each parameter's gradients of every sample's loss, [samples, ...]."""
    double = copy.deepcopy(model).double()
    out: dict[str, list[Tensor]] = {name: [] for name, _ in double.named_parameters()}
    for row in ids:
        double.zero_grad()
        cross_entropy(double(input_ids=row[None]).logits[0, :-1], row[1:]).backward()
        for name, p in double.named_parameters():
            out[name].append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
    return double, {name: torch.stack(grads) for name, grads in out.items()}


ELEMENT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "param_first": lambda w, g: (w * g.mean(0)).abs(),
    "param_second": lambda w, g: w**2 * (g**2).mean(0),
    "param_mix": lambda w, g: (w * g.mean(0) - 0.5 * w**2 * (g**2).mean(0)).abs(),
}


def ffn_reference(double: nn.Module, grads: dict[str, Tensor], layer: int, criterion: str) -> Tensor:
    """Scores of one layer's FFN channels, float64 [channels]."""
    total = torch.zeros(())
    for name, dim in (("gate_proj", 1), ("up_proj", 1), ("down_proj", 0)):
        key = f"model.layers.{layer}.mlp.{name}.weight"
        w, g = double.get_parameter(key).detach(), grads[key]
        if criterion == "vectorize":
            total = total + (w * g.mean(0)).sum(dim).abs()
        elif criterion == "group_fisher":
            total = total + (w * g).sum(dim + 1).square().mean(0)
        else:
            total = total + ELEMENT[criterion](w, g).sum(dim)
    return total


@pytest.mark.parametrize("size", [5, 2, 1])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_both_routes_give_the_definition_computed_in_float64(ids: Tensor, criterion: str, size: int) -> None:
    model = tiny_llama()
    groups = llama_groups(model.config, model)
    double, grads = per_sample_gradients(model, ids)
    for scores in both(model, groups, ids.split(size), criterion, ["ffn"]):
        for layer in range(2):
            want = ffn_reference(double, grads, layer, criterion)
            got = scores[f"model.layers.{layer}.mlp:ffn"][0].double()
            assert float(((got - want).abs() / want.max()).max()) <= 1e-4


@pytest.mark.parametrize("roles", ROLES)
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("tied", [False, True])
def test_norms_embedding_and_head_are_scored_alike(ids: Tensor, criterion: str, roles: list[str], tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    assert_close(*both(model, llama_groups(model.config, model), ids.split(2), criterion, roles))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_whole_backward_passes_take_either_route(ids: Tensor, criterion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    groups = llama_groups(model.config, model)
    swept = score(model, groups, ids.split(2), criterion)

    def refuse(*args: Any) -> None:
        raise NotSweepable("the test says so")

    monkeypatch.setattr(stage, "plan_sweep", refuse)
    for scores in both(model, groups, ids.split(2), criterion, ["kv_heads", "ffn", "hidden"]):
        assert "the test says so" in scores.details["engine"]
        assert_close(Scores({n: scores[n] for n in swept if n in scores}, "", {}), swept)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("family", ["llama_bias", "gpt2", "neox"])
def test_biases_transposed_weights_and_fused_projections_are_scored_alike(
    ids: Tensor, criterion: str, family: str
) -> None:
    model = tiny(family)
    groups = discover(model)
    roles = [r for r in ("kv_heads", "ffn") if r in groups.roles()]
    assert_close(*both(model, groups, ids.split(2), criterion, roles))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_stacked_experts_are_scored_alike_whatever_computes_them(ids: Tensor, criterion: str) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=101, hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = liven(MixtralForCausalLM(config).eval())
    before = model.config._experts_implementation
    groups = discover(model)
    a, g = both(model, groups, ids.split(2), criterion, ["expert_ffn", "experts"])
    assert_close(a, g)
    assert model.config._experts_implementation == before


@pytest.mark.parametrize("criterion", CRITERIA)
def test_no_gradient_of_a_weight_is_made_from_activations(
    ids: Tensor, criterion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    arrived: list[str] = []
    monkeypatch.setattr(stage, "_without_hooks", nullcontext)
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    groups = llama_groups(model.config, model)
    score(model, groups, ids, criterion, roles=["kv_heads", "ffn"], route="activations")
    assert arrived == []
    score(model, groups, ids, criterion, roles=["kv_heads", "ffn"], route="gradients")
    assert arrived


def test_vector_wise_scores_need_no_product_of_activations(ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyprune.importance import taps

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a matrix product")

    monkeypatch.setattr(taps, "activation_salience", refuse)
    model = tiny_llama()
    groups = llama_groups(model.config, model)
    for criterion in ("vectorize", "group_fisher"):
        score(model, groups, ids, criterion, roles=["kv_heads", "ffn"], route="activations")
    with pytest.raises(AssertionError, match="a matrix product"):
        score(model, groups, ids, "param_second", roles=["kv_heads", "ffn"], route="activations")


@pytest.mark.parametrize("criterion", CRITERIA)
def test_bfloat16_activations_are_as_close_to_float64_as_bfloat16_gradients(ids: Tensor, criterion: str) -> None:
    model = tiny_llama().to(torch.bfloat16)
    groups = llama_groups(model.config, model)
    double, grads = per_sample_gradients(model, ids)
    want = ffn_reference(double, grads, 1, criterion)
    found = both(model, groups, ids.split(2), criterion, ["ffn"])
    off = [float((x["model.layers.1.mlp:ffn"][0] - want).norm() / want.norm()) for x in found]
    assert off[0] <= 1.1 * off[1]  # both carry the rounding of the model's own forward and backward pass
    assert float((found[0]["model.layers.1.mlp:ffn"] - found[1]["model.layers.1.mlp:ffn"]).norm() / want.norm()) <= 5e-3


def gradients_from_own_passes(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Gradients of linear layers' weights, [samples, ...] float64: exact products of what a 16-bit model's own forward
    and backward passes hand to each layer. What differs from them is rounded by the scoring, not by the model."""
    inputs: dict[str, Tensor] = {}
    out: dict[str, list[Tensor]] = {}

    def watch(name: str, module: nn.Module) -> list[Any]:
        def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[name] = args[0].detach()[0].double()

        def after(_: nn.Module, __: Any, grads: tuple[Tensor, ...]) -> None:
            out.setdefault(f"{name}.weight", []).append(grads[0].detach()[0].double().T @ inputs[name])

        return [module.register_forward_pre_hook(before), module.register_full_backward_hook(after)]

    handles = [h for name, m in model.named_modules() if isinstance(m, nn.Linear) for h in watch(name, m)]
    for row in ids:
        cross_entropy(model(input_ids=row[None]).logits[0, :-1].float(), row[1:]).backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return {name: torch.stack(grads) for name, grads in out.items()}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_bfloat16_scores_are_within_two_percent_of_float64_from_the_same_activations(criterion: str, seed: int) -> None:
    ids = torch.randint(3, 97, (5, 9), generator=torch.Generator().manual_seed(3 + seed))
    model = tiny_llama(seed).to(torch.bfloat16)
    groups = llama_groups(model.config, model)
    grads = gradients_from_own_passes(model, ids)
    double = copy.deepcopy(model).double()
    for scores in both(model, groups, ids.split(2), criterion, ["ffn"]):
        for layer in range(3):
            want = ffn_reference(double, grads, layer, criterion)
            got = scores[f"model.layers.{layer}.mlp:ffn"][0]
            assert float((got - want).norm() / want.norm()) <= 2e-2


def test_sums_over_an_embeddings_rows_are_not_rounded_to_bfloat16() -> None:
    """601 has more digits than bfloat16."""
    from pyprune.importance.collector import Collector
    from pyprune.importance.registry import get_criterion
    from pyprune.importance.taps import Key, Taps

    weight = nn.Parameter(torch.ones(3, 1, dtype=torch.bfloat16))
    criterion = get_criterion("vectorize")
    taps = Taps({"table": weight}, criterion)
    taps.collector = Collector(criterion, {"table": weight}, samples=1)
    y = taps.table(Key("table"), torch.full((1, 601), 2), weight, None)
    y.backward(torch.ones_like(y))
    rows, _ = taps.collector.sums["table"]
    assert rows.tolist() == [0.0, 0.0, 601.0]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_activations_are_what_one_gets_without_asking(ids: Tensor, criterion: str) -> None:
    model = tiny_llama()
    groups = llama_groups(model.config, model)
    assert score(model, groups, ids, criterion).details["route"] == "activations"


def test_a_weight_that_is_also_used_in_another_way_gets_its_gradient_from_autograd(ids: Tensor) -> None:
    model = tiny_llama()
    block = model.model.layers[0].mlp

    def forward(x: Tensor) -> Tensor:
        out = block.down_proj(block.act_fn(block.gate_proj(x)) * block.up_proj(x))
        return out + (x @ block.gate_proj.weight.t()).sum(-1, keepdim=True)

    block.forward = forward
    assert_close(*both(model, llama_groups(model.config, model), ids.split(2), "param_second", ["ffn"]))


def test_an_unknown_route_is_refused(ids: Tensor) -> None:
    model = tiny_llama()
    with pytest.raises(PyPruneError, match=r"route.*activation"):
        score(model, llama_groups(model.config, model), ids, route="activation")
