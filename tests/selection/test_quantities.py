"""Budgets in multiply-adds and in memory: what a plan is counted with is what the pruned model is measured to need."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_compensation import ids
from helpers_families import build
from helpers_llama import tiny_llama
from helpers_mixtures import mixture
from torch import nn

import pyprune
from pyprune import apply, discover, measure_budget, select
from pyprune.caching import cache_of
from pyprune.discovery.groups import Groups
from pyprune.errors import PyPruneError
from pyprune.evaluation.footprint import cache_bytes, macs
from pyprune.selection.plan import Plan
from pyprune.selection.quantities import Quantity

LENGTH = 100


def random_scores(groups: Groups) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {g.name: torch.rand(g.outer, g.units, generator=generator) for g in groups.prunable()}


def needed(model: nn.Module, budget: str) -> float:
    if budget == "macs":
        return macs(model)[0]
    growing, constant = cache_bytes(model)
    return sum(p.numel() * p.element_size() for p in model.parameters()) + growing * LENGTH + constant


def quantity(model: nn.Module, groups: Groups, budget: str) -> Quantity:
    found = measure_budget(model, groups, budget, length=LENGTH if budget == "memory" else None)
    assert isinstance(found, Quantity)
    return found


def cut(model: nn.Module, groups: Groups, budget: str, ratio: float = 0.2, **options: Any) -> Plan:
    return select(groups, random_scores(groups), ratio, budget=quantity(model, groups, budget), **options)


@pytest.mark.parametrize(
    ("family", "roles", "budget", "ratio"),
    [
        ("Llama", "kv_heads,ffn", "memory", 0.2), ("Llama", "kv_heads,ffn", "macs", 0.2),
        ("Llama", "qk_dim,vo_dim,ffn", "macs", 0.2), ("GPT-2", "ffn,kv_heads", "memory", 0.2),
        ("GPT-2", "ffn,kv_heads", "macs", 0.2), ("Phi-3", "kv_heads,ffn", "memory", 0.2),
        ("Phi-3", "kv_heads,ffn", "macs", 0.2), ("Qwen3", "query_heads,ffn", "memory", 0.05),
        ("Qwen3", "query_heads,ffn", "macs", 0.2), ("Mixtral", "expert_ffn,kv_heads", "memory", 0.1),
    ],
)  # fmt: skip
def test_what_is_counted_before_and_after_is_what_the_models_need(
    family: str, roles: str, budget: str, ratio: float, tmp_path: Path
) -> None:
    if family == "Llama":
        model = tiny_llama(dtype=torch.bfloat16)
    else:
        model = mixture("mixtral") if family == "Mixtral" else build(family, tmp_path)
    groups = discover(model).thaw(("kv_heads", "query_heads"))
    dense = needed(model, budget)
    rounding = {"expert_ffn": 8} if family == "Mixtral" else None
    plan = cut(model, groups, budget, ratio, roles=roles, allocation="global", round_to=rounding)
    spent = plan.details["budget"]
    assert plan.cuts and spent["name"] == budget
    after = needed(apply(model, plan, copy=True), budget)
    assert (spent["before"], spent["after"]) == (dense, after)
    assert spent["ratio"] == pytest.approx(1 - after / dense)


def test_of_experts_those_count_that_a_token_goes_to() -> None:
    model = mixture("mixtral")
    groups = discover(model)
    weights = quantity(model, groups, "macs").weights
    experts = {n: p for n, p in model.named_parameters() if p.dim() == 3}
    share = Fraction(model.config.num_experts_per_tok, model.config.num_local_experts)
    assert experts and all(weights[n] == share for n in experts)
    assert {w for n, w in weights.items() if n not in experts} == {1}
    assert "model.embed_tokens.weight" not in weights


@pytest.mark.parametrize("allocation", ["uniform", "global", "knapsack", "log_depth"])
@pytest.mark.parametrize("budget", ["macs", "memory"])
def test_every_allocation_meets_a_ratio_of_the_budget_within_a_unit(budget: str, allocation: str) -> None:
    model = tiny_llama(intermediate_size=384)
    groups = discover(model)
    plan = cut(model, groups, budget, 0.3, allocation=allocation, roles="ffn")
    parameters = select(groups, random_scores(groups), 0.3, allocation=allocation, roles="ffn")
    unit = 3 * 3 * 32 * (4 if budget == "memory" else 1)  # one channel in each of three layers
    spent = plan.details["budget"]
    assert abs(spent["after"] - 0.7 * spent["before"]) <= unit
    assert plan.details["widths"] != parameters.details["widths"]
    assert parameters.details["budget"] is None


def test_heads_reach_far_where_the_cache_is_long_and_channels_where_it_is_short() -> None:
    model = tiny_llama(intermediate_size=384)
    groups = discover(model)
    for length, far, near in ((1, "ffn", "kv_heads"), (100_000, "kv_heads", "ffn")):
        memory = measure_budget(model, groups, "memory", length=length)
        plan = select(groups, random_scores(groups), 0.45, budget=memory, roles=far)
        assert plan.details["budget"]["ratio"] == pytest.approx(0.45, abs=0.1)
        with pytest.raises(PyPruneError, match=f"{near} can reach at most"):
            select(groups, random_scores(groups), 0.45, budget=memory, roles=near)


def test_a_window_bounds_what_a_layer_caches(tmp_path: Path) -> None:
    model = build("Gemma 2", tmp_path)
    groups = discover(model)
    windows = [getattr(layer, "sliding_window", None) for layer in _layers(model)]
    assert any(windows) and not all(windows)
    terms = quantity(model, groups, "memory").terms
    for layer, window in enumerate(windows):
        keys = next(t for t in terms if t.module.endswith(f".{layer}"))
        tokens = LENGTH if window is None else window - 1
        cached = _layers(model)[layer].keys
        assert keys.amount == cached.shape[1] * cached.shape[3] * tokens * cached.element_size()


def _layers(model: nn.Module) -> list[Any]:
    with torch.no_grad():
        return list(cache_of(model(torch.zeros(1, 2, dtype=torch.int64), use_cache=True)).layers)


def test_a_ratio_that_no_plan_meets_is_answered_with_the_nearest_that_one_does() -> None:
    model = tiny_llama(intermediate_size=96)
    groups = discover(model)
    with pytest.raises(PyPruneError, match=r"ratio 0\.9: ffn can reach at most (0\.\d+)") as error:
        cut(model, groups, "macs", 0.9, roles="ffn")
    reachable = float(str(error.value).split("at most ")[1].split(". ")[0])
    plan = cut(model, groups, "macs", reachable, roles="ffn")
    assert plan.details["budget"]["ratio"] == pytest.approx(reachable, abs=1e-3)


def test_layers_take_their_cache_and_their_products_with_them() -> None:
    model = tiny_llama()
    groups = discover(model)
    for budget in ("macs", "memory"):
        plan = cut(model, groups, budget, 0.3, roles="layers")
        after = needed(apply(model, plan, copy=True), budget)
        assert plan.details["budget"]["after"] == after


def test_what_cannot_be_counted_is_refused_by_name() -> None:
    model = tiny_llama()
    groups = discover(model)
    for budget, length, option, part in (
        ("flops", None, "budget", "not known"),
        ("macs", 5, "budget_length", "the budget is macs"),
        ("memory", 0, "budget_length", "no number of tokens"),
    ):
        with pytest.raises(PyPruneError, match=part) as error:
            measure_budget(model, groups, budget, length=length)
        assert error.value.option == option
    with pytest.raises(PyPruneError, match="'macs': is measured on the model"):
        select(groups, random_scores(groups), 0.2, budget="macs")
    assert measure_budget(model, groups, "parameters") == "parameters"
    with pytest.raises(PyPruneError, match="none is given"):
        select(groups, random_scores(groups), widths={"ffn": 14}, budget=quantity(model, groups, "macs"))
    experts = mixture("mixtral")
    groups = discover(experts)
    with pytest.raises(PyPruneError, match="when experts are cut: every token goes to as many"):
        cut(experts, groups, "macs", 0.2, roles="experts")
    assert cut(experts, groups, "memory", 0.1, roles="experts").cuts
    for role in ("qk_dim", "vo_dim"):
        with pytest.raises(PyPruneError, match="not every class caches less"):
            cut(model, discover(model), "memory", 0.1, roles=role)


def test_the_whole_line_prunes_to_a_budget_and_says_so() -> None:
    out = pyprune.prune(
        tiny_llama(intermediate_size=384),
        ratio=0.2,
        budget="memory",
        budget_length=64,
        calibration=ids(8),
        criterion="wanda",
    )
    spent = out.report.plan["budget"]
    growing, constant = cache_bytes(out.model)
    weights = sum(p.numel() * p.element_size() for p in out.model.parameters())
    assert spent["after"] == weights + growing * 64 + constant
    assert spent["ratio"] == pytest.approx(0.2, abs=0.01) and spent["length"] == 64
    assert "memory with 64 cached tokens" in _printed(out.report)


def test_the_search_keeps_to_the_budget() -> None:
    out = pyprune.prune(
        tiny_llama(intermediate_size=96), ratio=0.2, budget="macs", calibration=ids(16), criterion="l2", roles="ffn",
        allocation="search", search_steps=1,
    )  # fmt: skip
    assert out.report.plan["budget"]["ratio"] == pytest.approx(0.2, abs=0.01)
    assert out.report.plan["budget"]["after"] == macs(out.model)[0]


def _printed(report: Any) -> str:
    from rich.console import Console

    from pyprune.report import report_tables

    console = Console(width=160, record=True, file=io.StringIO())
    for part in report_tables(report):
        console.print(part)
    return console.export_text()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"budget": "macs", "target_params": 20_000}, "none is given"),
        ({"budget": "macs", "ratio": 0.2, "iterative_steps": 2}, "does not go with iterative_steps"),
        ({"budget": "macs", "ratio": 0.2, "remove_layers": 1}, "does not go with remove_layers"),
        ({"ratio": 0.2, "budget_length": 100}, "the budget is parameters"),
    ],
)
def test_the_whole_line_refuses_before_it_reads(options: dict[str, Any], part: str) -> None:
    with pytest.raises(PyPruneError, match=part):
        pyprune.prune(tiny_llama(), calibration=ids(4), **options)
