"""What prune does with ``method="best"``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_compensation import ids
from helpers_llama import tiny_llama
from helpers_mixtures import BASE, LATENT, mixture, spread

import pyprune
from pyprune import discover, method
from pyprune.config import PruneConfig, ScoringConfig
from pyprune.errors import PyPruneError

LIGHT = ("wanda", "descent", "group_fisher", "obs")
UNMEASURED = ("wanda", "knapsack", "token_fisher", "obs")
HEAVY = ("wanda", "log_depth", None, "obs")
EVEN = ("wanda", "uniform", None, "obs")
ANY = ("wanda", "knapsack", "group_fisher", "none")
PLAIN = ("param_first", "uniform", None, "none")
HASTY = {"compensation_scope": "outputs", "compensation_gains": False}  # a quarter of the time
QUICK = {"count_embeddings": False, **HASTY}


def settled(model: Any, samples: int = 128, **options: Any) -> PruneConfig:
    recipe = PruneConfig.build({"calibration": "text.txt", "method": "best", **options})
    return method.ways(method.for_profile(recipe), discover(model), samples)[0]


def said(recipe: PruneConfig) -> tuple[Any, ...]:
    asked = recipe.select
    return recipe.score.criterion, asked.allocation, asked.allocation_criterion, recipe.compensate.compensation


def test_a_ratio_alone_gets_the_best_method() -> None:
    alone = PruneConfig.build({"ratio": 0.1})
    assert alone.select.method == "best"
    assert said(method.ways(method.for_profile(alone), discover(tiny_llama()), 128)[0]) == LIGHT


@pytest.mark.parametrize(
    "option",
    [{"criterion": "param_first"}, {"allocation": "uniform"}, {"compensation": "none"}, {"widths": {"ffn": 0.5}},
     {"iterative_steps": 2}, {"remove_layers": 1}, {"stream": True}, {"method": "plain"}],
    ids=lambda option: next(iter(option)),
)  # fmt: skip
def test_who_says_how_to_prune_gets_no_more_than_that(option: dict[str, Any]) -> None:
    recipe = PruneConfig.build({"ratio": 0.2, **option})
    assert recipe.select.method == "plain"
    assert said(method.ways(method.for_profile(recipe), discover(tiny_llama()), 128)[0]) == PLAIN


def test_who_says_what_holds_anyway_says_nothing() -> None:
    usual = {"iterative_steps": 1, "aggregation": "sum", "compensation_target": "own", "stream": False}
    assert PruneConfig.build({"ratio": 0.2, **usual}).select.method == "best"


def test_widths_say_what_is_cut_and_how_much_of_it() -> None:
    assert settled(tiny_llama(), widths={"hidden": 0.5}).compensate.compensation == "none"
    for widths, scored in (({"ffn": 0.9}, UNMEASURED), ({"ffn": 0.25, "kv_heads": 1}, HEAVY)):
        assert said(settled(tiny_llama(), 2, widths=widths)) == scored
    both = settled(tiny_llama(), ratio=0.1, widths={"hidden": 0.9}, roles=["ffn"])
    assert both.compensate.compensation == "none"  # for hidden channels no refit makes up
    out = pyprune.prune(tiny_llama(), method="best", widths={"hidden": 0.5}, calibration=ids())
    assert out.model.config.hidden_size == tiny_llama().config.hidden_size // 2


def test_a_scope_that_does_not_go_with_the_target_is_told(caplog: pytest.LogCaptureFixture) -> None:
    asked = PruneConfig.build({"calibration": "t.txt", "method": "best", "ratio": 0.1, "compensation_target": "stream"})
    method.tell(asked, method.ways(asked, discover(tiny_llama()), 128)[0])
    assert "compensation_scope ffn does not go with compensation_target stream: outputs in its place" in caplog.text


def test_what_feeds_projections_is_refitted_where_those_are() -> None:
    assert settled(tiny_llama(), ratio=0.1).compensate.compensation_scope == "ffn"
    for how in ({"compensation": "none"}, {"compensation": "bias"}, {"compensation_target": "stream"}):
        assert settled(tiny_llama(), ratio=0.1, **how).compensate.compensation_scope == "outputs"


def test_gains_follow_a_refit_and_nothing_else() -> None:
    def gains(samples: int = 128, **options: Any) -> bool:
        return settled(tiny_llama(), samples, **{"ratio": 0.1, **options}).compensate.compensation_gains

    assert gains() and gains(ratio=0.5) and gains(profile="uniform") and gains(compensation="least-squares")
    assert not gains(compensation="none") and not gains(roles=["hidden"]) and not gains(compensation_gains=False)
    assert not gains(samples=1, compensation="bias")  # none to decide with
    assert not gains(method="plain", compensation="least-squares")


def test_what_does_not_go_with_the_cut_is_said(caplog) -> None:
    def told(samples: int = 128, **options: Any) -> list[str]:
        caplog.clear()
        recipe = PruneConfig.build({"method": "best", "ratio": 0.1, **options})
        method.tell(recipe, method.ways(recipe, discover(tiny_llama()), samples)[0])
        return [record.getMessage() for record in caplog.records]

    assert told() == told(ratio=0.5) == told(compensation="none") == told(compensation_criterion="none") == []
    assert told(roles=["hidden"]) == ["compensation obs does not go with what is cut: none in its place"]
    assert told(compensation="none", compensation_criterion="token_fisher") == [
        "compensation_criterion token_fisher does not go with what is cut: none in its place"
    ]
    assert told(samples=1) == ["compensation_gains is left out: there are not two samples to decide with"]


def test_a_scope_without_a_refit_is_refused() -> None:
    with pytest.raises(PyPruneError, match="compensation_scope 'ffn': does not go with compensation none"):
        pyprune.prune(tiny_llama(), ratio=0.2, criterion="l2", compensation_scope="ffn")


def test_a_saved_recipe_says_the_method_that_was_taken() -> None:
    recipe = PruneConfig.build({"ratio": 0.2})
    assert PruneConfig.build(recipe.to_dict()) == recipe


@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_a_settled_recipe_settles_to_itself(ratio: float) -> None:
    recipe = settled(tiny_llama(), ratio=ratio)
    again = method.ways(PruneConfig.build(recipe.to_dict()), discover(tiny_llama()), 128)[0]
    assert again == recipe


def test_an_allocation_is_settled_by_the_method_only() -> None:
    for option in ("allocation", "allocation_criterion", "compensation_criterion"):
        with pytest.raises(PyPruneError, match=f"{option} 'auto': is what method best settles"):
            pyprune.prune(tiny_llama(), ratio=0.2, criterion="l2", **{option: "auto"})


def test_it_says_nothing_to_other_verbs(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("method: best\n")
    assert ScoringConfig.build({}, file).score.criterion == "param_first"


def test_a_small_ratio_takes_channels_where_their_loss_is_least() -> None:
    recipe = settled(tiny_llama(), ratio=0.1)
    assert said(recipe) == LIGHT and recipe.select.roles == ("ffn",)
    assert recipe.score.score_tokens is None and recipe.select.allocation_tokens == 8192
    assert settled(tiny_llama(), ratio=0.1, score_tokens=64).score.score_tokens == 64
    assert settled(tiny_llama(), ratio=0.1, allocation="knapsack").score.score_tokens == 8192
    assert settled(tiny_llama(), samples=3, ratio=0.5).score.score_tokens == 8192


def test_widths_are_measured_only_where_there_is_text_and_memory_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    assert said(settled(model, samples=4, ratio=0.1)) == LIGHT
    assert said(settled(model, samples=3, ratio=0.1)) == UNMEASURED
    assert said(settled(model, ratio=0.1, iterative_steps=2)) == UNMEASURED
    assert said(settled(model, ratio=0.1, roles=["kv_heads", "ffn"])) == LIGHT
    sums = sum(2 * g.units**2 for g in discover(model) if g.role == "ffn")
    for ratio, more, unmeasured in ((0.1, 0, UNMEASURED), (0.5, heads(model), HEAVY)):
        monkeypatch.setattr(method, "MEASURED_UP_TO", sums + more)
        assert said(settled(model, ratio=ratio)) == LIGHT
        monkeypatch.setattr(method, "MEASURED_UP_TO", sums + more - 1)
        assert said(settled(model, ratio=ratio)) == unmeasured


def test_heads_are_not_told_by_scores_of_each_alone() -> None:
    recipe = settled(tiny_llama(), ratio=0.1, roles=["kv_heads", "ffn"], allocation="knapsack")
    assert said(recipe) == ("wanda", "knapsack", "group_fisher", "obs")
    assert recipe.compensate.compensation_criterion == "none"


def heads(model: Any) -> int:
    """Bytes of half the products of what output projections read."""
    return sum(2 * p.shape[1] ** 2 for name, p in model.named_parameters() if "o_proj.weight" in name)


def test_a_large_ratio_takes_heads_too_and_unmeasured_more_in_later_layers() -> None:
    recipe = settled(tiny_llama(), ratio=0.5)
    assert said(recipe) == LIGHT and recipe.select.roles is None
    recipe = settled(tiny_llama(), samples=3, ratio=0.5)
    assert said(recipe) == HEAVY and recipe.select.roles is None


def test_a_target_size_counts_as_the_ratio_that_it_comes_to() -> None:
    total = discover(tiny_llama()).num_parameters()
    assert settled(tiny_llama(), target_params=round(0.9 * total)).select.roles == ("ffn",)
    assert settled(tiny_llama(), target_params=round(0.5 * total)).select.roles is None


def test_where_channels_cannot_reach_the_ratio_all_roles_are_cut() -> None:
    out = pyprune.prune(tiny_llama(intermediate_size=4), ratio=0.3, calibration=ids(), **HASTY)
    assert {c.group.role for c in out.plan.cuts} == {"kv_heads", "ffn"}
    assert (out.recipe.select.roles, out.recipe.select.allocation) == (None, "descent")
    out = pyprune.prune(tiny_llama(), ratio=0.2, min_keep={"ffn": 0.9}, calibration=ids(), **QUICK)
    assert out.recipe.select.roles is None and "kv_heads" in {c.group.role for c in out.plan.cuts}
    assert out.report.parameters["without_embeddings"]["ratio"] == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize(("budget", "ratio"), [("macs", 0.2), ("memory", 0.2), ("macs", 0.45)])
def test_a_ratio_of_another_budget_is_met_with_heads_too(budget: str, ratio: float) -> None:
    out = pyprune.prune(tiny_llama(), ratio=ratio, budget=budget, calibration=ids(), **HASTY)
    assert out.plan.details["budget"]["ratio"] == pytest.approx(ratio, abs=0.05)  # a head of so small a model is much
    assert {c.group.role for c in out.plan.cuts} == {"kv_heads", "ffn"}


def test_channels_of_experts_are_channels() -> None:
    assert settled(mixture("mixtral"), ratio=0.1).select.roles == ("expert_ffn",)


def test_query_heads_go_where_all_of_them_share_one_kv_head() -> None:
    model = tiny_llama(num_key_value_heads=1)
    assert settled(model, ratio=0.5).select.roles == ("query_heads", "ffn")
    assert settled(model, ratio=0.5, roles="ffn").select.roles == ("ffn",)
    assert settled(model, ratio=0.1).select.roles == ("ffn",)
    out = pyprune.prune(model, ratio=0.5, calibration=ids(), **QUICK)
    assert {c.group.role for c in out.plan.cuts} == {"query_heads", "ffn"}
    assert out.report.parameters["without_embeddings"]["ratio"] == pytest.approx(0.5, abs=0.02)
    narrow = tiny_llama(num_key_value_heads=1, intermediate_size=8)
    out = pyprune.prune(narrow, ratio=0.3, calibration=ids(), **QUICK)
    assert {c.group.role for c in out.plan.cuts} == {"query_heads", "ffn"}


@pytest.mark.parametrize("ratio", [0.2, 0.3])
def test_a_class_whose_layers_cannot_differ_gets_even_widths(ratio: float) -> None:
    """MiniCPM 3 scales by the number of its layers, which a layer of its own width would take for one."""
    from transformers import AutoModelForCausalLM, MiniCPM3Config

    values = {**BASE, **LATENT, "num_key_value_heads": 6, "intermediate_size": 34, "num_hidden_layers": 3}
    model = spread(AutoModelForCausalLM.from_config(MiniCPM3Config(**values)).eval())
    out = pyprune.prune(model, ratio=ratio, calibration=ids(), **QUICK)
    assert out.report.parameters["without_embeddings"]["ratio"] == pytest.approx(ratio, abs=0.03)
    assert out.recipe.select.allocation == "uniform" and out.report.compensation is not None
    assert len({c.width for c in out.plan.cuts if c.group.role == "ffn"}) == 1


@pytest.mark.filterwarnings("ignore:No .* expresses the cuts")
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "gpt_oss"])
def test_a_ratio_is_met_on_mixtures_at_widths_that_their_kernels_take(family: str) -> None:
    model = mixture(family, **{"moe_intermediate_size" if family == "deepseek_v2" else "intermediate_size": 64})
    out = pyprune.prune(model, ratio=0.2, calibration=ids(), **QUICK)
    assert out.report.parameters["without_embeddings"]["ratio"] == pytest.approx(0.2, abs=0.03)
    assert {c.group.role for c in out.plan.cuts} >= {"expert_ffn"} and out.report.compensation is not None
    assert not any(c.width % 8 for c in out.plan.cuts if c.group.role == "expert_ffn")


@pytest.mark.filterwarnings("ignore:No .* expresses the cuts")
def test_what_no_linear_layer_reads_goes_by_its_expected_loss_without_a_refit(caplog) -> None:
    """Llama 4 multiplies all experts in one batched product."""
    model = mixture("llama4_text", intermediate_size=64)
    out = pyprune.prune(model, ratio=0.2, count_embeddings=False, calibration=ids())
    assert out.report.parameters["without_embeddings"]["ratio"] == pytest.approx(0.2, abs=0.03)
    assert "expert_ffn" in {c.group.role for c in out.plan.cuts}
    assert (out.report.scores["criterion"], out.report.compensation) == ("group_fisher", None)
    assert "no linear layer reads the units of model.layers.0.feed_forward.experts:expert_ffn" in caplog.text


@pytest.mark.parametrize(
    ("option", "wanted"),
    [({"criterion": "flap"}, ("flap", *LIGHT[1:])), ({"allocation": "global"}, (LIGHT[0], "global", *LIGHT[2:])),
     ({"allocation": "knapsack"}, UNMEASURED), ({"allocation": "uniform"}, EVEN),
     ({"compensation": "none"}, (*UNMEASURED[:3], "none")), ({"roles": ["hidden"]}, ANY)],
    ids=["criterion", "allocation", "knapsack", "uniform", "compensation", "roles"],
)  # fmt: skip
def test_what_the_user_says_stays(option: dict[str, Any], wanted: tuple[Any, ...]) -> None:
    assert said(settled(tiny_llama(), ratio=0.1, **option)) == wanted


def test_an_allocation_of_the_users_own_stays_at_a_large_ratio() -> None:
    assert settled(tiny_llama(), ratio=0.5, allocation="global").select.allocation == "global"


def test_a_profile_of_even_widths_gets_even_widths() -> None:
    assert said(settled(tiny_llama(), ratio=0.2, profile="uniform")) == EVEN


def test_the_whole_line_meets_the_ratio_and_transformers_open_the_result(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = pyprune.prune(tiny_llama(), ratio=0.2, method="best", calibration=ids(), output_dir=tmp_path / "out")
    assert out.report.parameters["with_embeddings"]["ratio"] == pytest.approx(0.2, abs=0.005)
    assert (out.plan.details["allocation"], out.plan.details["allocation_criterion"]) == ("descent", "group_fisher")
    assert len({c.width for c in out.plan.cuts}) > 1 and out.report.compensation is not None
    made = out.report.compensation[0]["gains"]
    assert made["after"] < made["before"] or not made["kept"]
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    again = pyprune.load(tmp_path / "out")
    with torch.no_grad():
        want = out.model(ids(2)).logits
        assert torch.equal(opened(ids(2)).logits, want) and torch.equal(again(ids(2)).logits, want)


def test_a_criterion_with_a_say_in_the_choice_goes_with_the_method_and_not_without_a_refit() -> None:
    def judge(**options: Any) -> str:
        return settled(tiny_llama(), **{"ratio": 0.1, **options}).compensate.compensation_criterion

    assert judge(allocation="knapsack") == judge(iterative_steps=2) == "token_fisher"
    assert judge() == judge(ratio=0.5) == judge(profile="uniform") == judge(ratio=0.5, allocation="knapsack") == "none"
    assert judge(compensation_criterion="token_fisher") == "token_fisher"
    assert judge(compensation_criterion="group_fisher") == "group_fisher"
    assert judge(allocation="knapsack", compensation_criterion="none") == "none"
    for option in ({"roles": ["hidden"]}, {"compensation": "least-squares"}, {"compensation": "none"}):
        assert judge(allocation="knapsack", **option) == "none"
    with pytest.raises(PyPruneError, match="compensation_criterion 'token_fisher': has a say in which units go"):
        own = {"method": "best", "compensation": "bias", "compensation_criterion": "token_fisher"}
        pyprune.prune(tiny_llama(), ratio=0.1, calibration=ids(), **own)
