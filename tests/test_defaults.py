"""What prune does when only a size is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_compensation import ids
from helpers_llama import tiny_llama
from helpers_mixtures import mixture

import pyprune
from pyprune import defaults, discover
from pyprune.config import PruneConfig


def settled(model: Any, **options: Any) -> PruneConfig:
    recipe, automatic = defaults.filled(PruneConfig.build({"calibration": "text.txt", **options}))
    return defaults.for_groups(recipe, discover(model)) if automatic else recipe


def said(recipe: PruneConfig) -> tuple[Any, ...]:
    asked = recipe.select
    return recipe.score.criterion, asked.allocation, asked.allocation_criterion, recipe.compensate.compensation


def of(method: defaults.Method) -> tuple[Any, ...]:
    return method.criterion, method.allocation, method.allocation_criterion, method.compensation


def test_a_small_ratio_takes_channels_where_their_loss_is_least() -> None:
    recipe = settled(tiny_llama(), ratio=0.1)
    assert said(recipe) == of(defaults.LIGHT) and recipe.select.roles == ("ffn",)
    assert recipe.score.score_tokens == defaults.FEW_TOKENS


def test_a_large_ratio_takes_heads_too_and_more_in_later_layers() -> None:
    assert said(settled(tiny_llama(), ratio=0.5)) == of(defaults.HEAVY)
    assert settled(tiny_llama(), ratio=0.5).select.roles is None


def test_a_target_size_counts_as_the_ratio_that_it_comes_to() -> None:
    total = discover(tiny_llama()).num_parameters()
    assert said(settled(tiny_llama(), target_params=round(0.9 * total))) == of(defaults.LIGHT)
    assert said(settled(tiny_llama(), target_params=round(0.5 * total))) == of(defaults.HEAVY)


def test_where_channels_cannot_reach_the_ratio_all_roles_are_cut() -> None:
    model = tiny_llama(intermediate_size=4)
    assert settled(model, ratio=0.3).select.roles is None


def test_channels_of_experts_are_channels() -> None:
    assert settled(mixture("mixtral"), ratio=0.1).select.roles == ("expert_ffn",)


@pytest.mark.parametrize(
    "option",
    [{"criterion": "wanda"}, {"allocation": "global"}, {"allocation_criterion": "l1"}, {"compensation": "none"},
     {"widths": {"ffn": 12}}, {"roles": ["hidden"]}, {"scores_file": "scores.safetensors"}],
    ids=lambda o: next(iter(o)),
)  # fmt: skip
def test_who_says_how_gets_that_and_plain_choices_for_the_rest(option: dict[str, Any]) -> None:
    recipe = settled(tiny_llama(), ratio=0.1, **option)
    wanted = {**vars(defaults.PLAIN), **{k: v for k, v in option.items() if k in vars(defaults.PLAIN)}}
    assert said(recipe) == tuple(wanted.values()) and recipe.score.score_tokens is None


def test_a_profile_of_even_widths_gets_even_widths() -> None:
    recipe = settled(tiny_llama(), ratio=0.2, profile="uniform")
    assert said(recipe) == of(defaults.EVEN)


def test_the_whole_line_meets_the_ratio_and_transformers_open_the_result(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = pyprune.prune(tiny_llama(), ratio=0.2, calibration=ids(), output_dir=tmp_path / "out")
    assert out.report.parameters["with_embeddings"]["ratio"] == pytest.approx(0.2, abs=0.005)
    assert (out.plan.details["allocation"], out.plan.details["allocation_criterion"]) == ("knapsack", "group_fisher")
    assert len({c.width for c in out.plan.cuts}) > 1 and out.report.compensation is not None
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    again = pyprune.load(tmp_path / "out")
    with torch.no_grad():
        want = out.model(ids(2)).logits
        assert torch.equal(opened(ids(2)).logits, want) and torch.equal(again(ids(2)).logits, want)
