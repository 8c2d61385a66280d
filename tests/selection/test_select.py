"""What can be asked for, what is answered, and what is refused."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_selection import llama_7b_groups, llama_groups, random_scores, smollm2_groups

from pyprune.discovery.groups import Group, Groups
from pyprune.errors import PyPruneError
from pyprune.importance.scores import Scores
from pyprune.selection import Plan, select
from pyprune.selection.allocation import ALLOCATIONS, Limits, register
from pyprune.selection.searched import ON_MODEL

GROUPS = llama_groups(layers=6, kv=4, queries=2, ffn=64, head_dim=8, hidden=32)
SCORES = random_scores(GROUPS)
ALL_ROLES = ["kv_heads", "query_heads", "qk_dim", "vo_dim", "ffn", "hidden", "layers"]


def mixture(width: int = 32) -> Groups:
    return llama_groups(layers=3, kv=2, queries=2, ffn=width, head_dim=8, hidden=32, experts=8)


BY_SCORES = sorted(set(ALLOCATIONS) - set(ON_MODEL))  # without a model


@pytest.mark.parametrize("allocation", BY_SCORES)
def test_ratio_zero_cuts_nothing(allocation: str) -> None:
    plan = select(GROUPS, SCORES, 0.0, allocation=allocation)
    assert plan.cuts == ()
    assert plan.details["achieved"]["with_embeddings"]["ratio"] == 0


def test_target_params_is_what_is_left() -> None:
    groups = smollm2_groups()
    plan = select(groups, random_scores(groups), target_params="108M")
    assert plan.details["achieved"]["with_embeddings"]["after"] == pytest.approx(108e6, abs=30 * 1728 / 2 + 1)
    plan = select(groups, random_scores(groups), target_params=90_000_000, count_embeddings=False)
    assert plan.details["achieved"]["without_embeddings"]["after"] == pytest.approx(90e6, abs=30 * 1728 / 2 + 1)


def test_widths_are_counts_or_fractions_kept_in_every_layer() -> None:
    plan = select(GROUPS, SCORES, widths={"kv_heads": 0.5, "ffn": 40})
    assert plan.details["widths"] == {"kv_heads": 2, "ffn": 40}
    assert {c.group.role: c.width for c in plan.cuts} == {"kv_heads": 2, "ffn": 40}
    assert len(plan.cuts) == 12


def test_a_role_with_a_width_of_one_whole_is_left_alone() -> None:
    assert select(GROUPS, SCORES, widths={"ffn": 1.0}).cuts == ()
    assert select(GROUPS, SCORES, widths={"ffn": 1}).details["widths"] == {"ffn": 1}


@pytest.mark.parametrize("allocation", BY_SCORES)
def test_the_other_roles_make_up_the_ratio_beside_fixed_widths(allocation: str) -> None:
    plan = select(GROUPS, SCORES, 0.4, widths={"kv_heads": 3}, allocation=allocation)
    heads = plan.details["widths"]["kv_heads"]
    assert heads == 3 if isinstance(heads, int) else sum(heads.values()) == 18
    assert plan.details["achieved"]["with_embeddings"]["ratio"] == pytest.approx(0.4, abs=0.012)


@pytest.mark.parametrize("allocation", BY_SCORES)
@pytest.mark.parametrize("ratio", [0.1, 0.35, 0.6])
def test_all_roles_together_meet_the_ratio_exactly_counted(allocation: str, ratio: float) -> None:
    plan = select(GROUPS, SCORES, ratio, allocation=allocation, roles=ALL_ROLES, min_keep=1)
    shapes = plan.new_shapes(GROUPS.shapes)
    after = sum(int(np.prod(shapes[p])) for p in GROUPS.parameters if p in shapes)
    achieved = plan.details["achieved"]["with_embeddings"]
    assert achieved["after"] == after
    assert achieved["ratio"] == pytest.approx(1 - after / GROUPS.num_parameters())
    assert achieved["ratio"] == pytest.approx(ratio, abs=0.08 if allocation in ("global", "knapsack") else 0.006)


@pytest.mark.parametrize("allocation", BY_SCORES)
def test_only_the_layers_asked_for_are_cut(allocation: str) -> None:
    plan = select(GROUPS, SCORES, 0.2, layers="2-4", allocation=allocation)
    assert {c.group.layer for c in plan.cuts} == {2, 3, 4}
    assert plan.details["layers"] == [2, 3, 4]


def test_only_layers_in_the_range_are_removed() -> None:
    scores = Scores(dict(SCORES), "random")
    scores.by_group["model.layers:layers"] = torch.tensor([[0.0, 1, 3, 2, 9, 0]])
    plan = select(GROUPS, scores, widths={"layers": 4}, layers="1:4")
    assert plan.removed_modules() == ["model.layers.1", "model.layers.3"]
    assert plan.details["widths"] == {"layers": 4}


def test_experts_and_their_channels_are_cut_by_default_where_there_is_no_plain_ffn() -> None:
    groups = mixture()
    plan = select(groups, random_scores(groups), 0.3, round_to={"expert_ffn": 1})
    assert plan.details["roles"] == ["kv_heads", "expert_ffn"]
    assert plan.details["achieved"]["with_embeddings"]["ratio"] == pytest.approx(0.3, abs=0.02)
    plan = select(groups, random_scores(groups), 0.3, roles="experts,expert_ffn", round_to={"expert_ffn": 1})
    assert plan.details["widths"]["experts"] == 7
    assert plan.details["achieved"]["with_embeddings"]["ratio"] == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("allocation", BY_SCORES)
def test_channels_of_stacked_experts_keep_to_the_rows_of_grouped_products_unless_told_otherwise(allocation) -> None:
    groups = mixture(width=64)
    scores = random_scores(groups)
    widths = [c.width for c in select(groups, scores, 0.3, roles="expert_ffn", allocation=allocation).cuts]
    assert widths and not any(w % 8 for w in widths)
    free = select(groups, scores, 0.3, roles="expert_ffn", allocation=allocation, round_to={"expert_ffn": 1})
    assert any(c.width % 8 for c in free.cuts)
    asked = select(groups, scores, widths={"expert_ffn": 44}, allocation="uniform")
    assert {c.width for c in asked.cuts} == {44}
    share = select(groups, scores, widths={"expert_ffn": 0.7}, allocation="uniform")
    assert {c.width for c in share.cuts} == {48}


def test_channels_that_no_grouped_product_reads_are_not_rounded() -> None:
    assert any(c.width % 8 for c in select(GROUPS, SCORES, 0.3, roles="ffn").cuts)
    narrow = mixture(width=12)
    plan = select(narrow, random_scores(narrow), 0.3, roles="expert_ffn")
    assert plan.details["round_to"] == {"expert_ffn": 4}


@pytest.mark.parametrize("allocation", BY_SCORES)
def test_every_kv_head_keeps_the_same_number_of_query_heads_each_its_best(allocation: str) -> None:
    groups = llama_groups(layers=2, kv=3, queries=4)
    scores = random_scores(groups)
    plan = select(groups, scores, widths={"query_heads": 2}, allocation=allocation)
    for cut in plan.cuts:
        best = scores[cut.group.name].topk(cut.width, dim=1).indices.sort(dim=1).values
        assert cut.kept == tuple(map(tuple, best.tolist()))


def test_equal_scores_keep_the_lower_index() -> None:
    flat = Scores({g.name: torch.ones(g.outer, g.units) for g in GROUPS}, "random")
    plan = select(GROUPS, flat, widths={"ffn": 5, "query_heads": 1})
    assert all(row == tuple(range(c.width)) for c in plan.cuts for row in c.kept)


def test_round_to_leaves_a_group_whole_or_at_a_multiple() -> None:
    groups = llama_groups(layers=3, kv=2, ffn=[30, 50, 64], hidden=16)
    plan = select(groups, random_scores(groups), 0.35, roles="ffn", round_to=16)
    assert all(
        w % 16 == 0 or (w, layer) in ((30, "0"), (50, "1")) for layer, w in plan.details["widths"]["ffn"].items()
    )
    plan = select(groups, random_scores(groups), 0.02, roles="ffn", round_to=16)
    assert all(c.width % 16 == 0 for c in plan.cuts)


def test_round_to_by_role_rounds_heads() -> None:
    plan = select(GROUPS, SCORES, 0.4, round_to={"kv_heads": 2, "ffn": 8})
    assert plan.details["widths"]["kv_heads"] in (2, 4)
    assert plan.details["widths"]["ffn"] % 8 == 0
    assert plan.details["round_to"] == {"kv_heads": 2, "ffn": 8}


def test_a_plan_survives_json() -> None:
    plan = select(GROUPS, SCORES, 0.3, roles=ALL_ROLES, layers=None, allocation="global", round_to=8)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert json.loads(plan.to_json())["details"]["allocation"] == "global"


def test_details_say_what_was_asked_and_reached() -> None:
    details = select(GROUPS, SCORES, 0.25, layers="0-4", round_to=4, min_keep={"ffn": 0.25}).details
    assert details["asked"] == {"ratio": 0.25, "target_params": None, "widths": None}
    assert details["criterion"] == "random"
    assert details["allocation"] == "uniform"
    assert details["roles"] == ["kv_heads", "ffn"]
    assert details["layers"] == [0, 1, 2, 3, 4]
    assert details["round_to"] == {"ffn": 4}
    assert details["min_keep"] == {"kv_heads": 1, "ffn": 0.25}
    assert details["count_embeddings"] is True
    assert set(details["achieved"]) == {"with_embeddings", "without_embeddings"}


def test_a_frozen_group_stays_whole_and_is_reported() -> None:
    frozen = [
        Group(**{**g.__dict__, "frozen": "op aten.weird"}) if g.name == "model.layers.0.mlp:ffn" else g for g in GROUPS
    ]
    groups = Groups(frozen, GROUPS.shapes, GROUPS.parameters, GROUPS.embeddings)
    plan = select(groups, SCORES, 0.2, roles="ffn")
    assert {c.group.layer for c in plan.cuts} == {1, 2, 3, 4, 5}
    assert (
        "1 ffn groups cannot be pruned and stay whole (model.layers.0.mlp:ffn: op aten.weird)." in plan.details["notes"]
    )


def test_scores_may_be_arrays_and_half_precision() -> None:
    arrays = {k: v.numpy() for k, v in SCORES.items()}
    halves = {k: v.bfloat16() for k, v in SCORES.items()}
    assert select(GROUPS, arrays, 0.3).cuts == select(GROUPS, SCORES, 0.3).cuts
    assert select(GROUPS, arrays, 0.3).details["criterion"] is None
    assert len(select(GROUPS, halves, 0.3).cuts) == len(select(GROUPS, SCORES, 0.3).cuts)


def test_the_same_input_gives_the_same_plan() -> None:
    for allocation in BY_SCORES:
        first, second = (select(GROUPS, SCORES, 0.3, allocation=allocation).to_json() for _ in range(2))
        assert first == second


REFUSED = [
    ({}, "nothing says how much to remove"),
    ({"ratio": 0.2, "target_params": 100}, "contradicts ratio 0.2"),
    ({"ratio": 1.0}, "must be at least 0 and below 1"),
    ({"ratio": 0.2, "allocation": "unifrom"}, "Did you mean 'uniform'"),
    ({"ratio": 0.2, "roles": "heads"}, "is not known"),
    (
        {"ratio": 0.2, "roles": "experts"},
        "experts': the model has no such groups. The model can be pruned in: kv_heads",
    ),
    ({"ratio": 0.2, "roles": "vocab"}, "cannot be pruned here (indexed by token ids)"),
    ({"ratio": 0.2, "roles": []}, "names no role"),
    ({"ratio": 0.99}, "kv_heads, ffn can reach at most 0."),
    ({"ratio": 0.6, "layers": "0-2"}, "more layers"),
    ({"ratio": 0.5, "min_keep": 0.9}, "a smaller min_keep"),
    ({"ratio": 0.7, "roles": "ffn"}, "allow more roles (kv_heads, query_heads"),
    ({"target_params": 1000}, "can reach at least"),
    ({"target_params": "5B"}, "the model has only"),
    ({"ratio": 0.2, "layers": "3-9"}, "there is no layer 6"),
    ({"ratio": 0.2, "layers": "0", "roles": "hidden"}, "hidden runs through the whole model"),
    ({"ratio": 0.2, "widths": {"kv_heads": 0.5, "ffn": 0.5}}, "no role is left to reach the size"),
    ({"ratio": 0.1, "widths": {"ffn": 1}}, "widths alone come to 0."),
    ({"target_params": "60k", "widths": {"ffn": 1}}, "widths alone come to 39,456"),
    ({"widths": {"ffn": 65}}, "model.layers.0.mlp:ffn has only 64 units"),
    ({"widths": {"ffn": 60}, "round_to": 16}, "is no multiple of round_to 16. 64 is the nearest"),
    ({"widths": {"ffn": 10}, "min_keep": {"ffn": 20}}, "contradicts min_keep 20"),
    ({"widths": {"layers": 2}, "layers": "0-2"}, "3 layers lie outside layers= and stay"),
    ({"widths": {"experts": 2}}, "the model has no such groups"),
    ({"ratio": 0.2, "round_to": 0}, "is no positive integer"),
    ({"ratio": 0.2, "round_to": 8.0}, "is no positive integer"),
    ({"ratio": 0.2, "round_to": True}, "is no positive integer"),
    ({"ratio": 0.2, "round_to": 128}, "has only 64 units"),
    ({"ratio": 0.1, "round_to": 8, "roles": "kv_heads"}, "a single number rounds channels"),
    ({"ratio": 0.2, "round_to": {"hidden": 8}}, "hidden is not among the roles to cut"),
    ({"ratio": 0.2, "min_keep": {"hidden": 8}}, "hidden is not among the roles to cut"),
    ({"ratio": 0.2, "min_keep": 40}, "has only 4 units"),
]


@pytest.mark.parametrize(("request_", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_impossible_requests_say_what_is_wrong_and_what_to_do(request_: dict, message: str) -> None:
    with pytest.raises(PyPruneError) as caught:
        select(GROUPS, SCORES, **request_)
    assert message in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("allocation", BY_SCORES)
def test_the_largest_ratio_named_in_the_error_can_be_asked_for(allocation: str) -> None:
    with pytest.raises(PyPruneError) as caught:
        select(GROUPS, SCORES, 0.99, allocation=allocation)
    most = float(caught.value.problem.rsplit(" ", 1)[1])
    plan = select(GROUPS, SCORES, most, allocation=allocation)
    assert plan.details["achieved"]["with_embeddings"]["ratio"] == pytest.approx(most, abs=0.003)


def test_a_model_without_the_usual_roles_asks_for_one() -> None:
    groups = Groups([g for g in GROUPS if g.role == "hidden"], GROUPS.shapes, GROUPS.parameters, GROUPS.embeddings)
    with pytest.raises(PyPruneError, match=r"Name the roles to cut\. The model can be pruned in: hidden"):
        select(groups, SCORES, 0.2)
    with pytest.raises(PyPruneError, match="no decoder layers"):
        select(groups, SCORES, 0.2, roles="hidden", layers="0")


def test_a_role_that_holds_only_embeddings_cannot_meet_a_ratio_without_them() -> None:
    groups = [Group(**{**g.__dict__, "frozen": None}) if g.role == "vocab" else g for g in GROUPS]
    groups = Groups(groups, GROUPS.shapes, GROUPS.parameters, GROUPS.embeddings)
    assert select(groups, SCORES, 0.01, roles="vocab").cuts
    with pytest.raises(PyPruneError, match="holds no parameter that is counted"):
        select(groups, SCORES, 0.01, roles="vocab", count_embeddings=False)


def broken(value: object) -> dict:
    return {**SCORES, "model.layers.3.mlp:ffn": value}


def test_missing_scores_are_named() -> None:
    scores = {k: v for k, v in SCORES.items() if not k.endswith("4.mlp:ffn")}
    with pytest.raises(
        PyPruneError, match=r"scores: no scores for 1 of the 12 groups to cut .*model\.layers\.4\.mlp:ffn"
    ):
        select(GROUPS, scores, 0.2)
    assert select(GROUPS, scores, 0.1, layers="0-2").cuts


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(PyPruneError, match=r"1 of the 64 scores of model\.layers\.3\.mlp:ffn are NaN or infinite"):
        select(GROUPS, broken(torch.tensor([[bad] + [1.0] * 63])), 0.2)


@pytest.mark.parametrize("shape", [(64,), (1, 63), (2, 64)])
def test_scores_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(PyPruneError, match="the group has"):
        select(GROUPS, broken(torch.ones(shape)), 0.2)


def test_a_new_allocation_is_one_registered_function() -> None:
    @register("first-layer-only")
    def first_layer_only(groups, scores, budget):
        widths = {g.name: budget.limits[g.name].units for g in groups}
        name = groups[0].name
        while budget.count(widths) > budget.target:
            widths[name] -= 1
        return widths

    try:
        plan = select(GROUPS, SCORES, 0.02, allocation="first-layer-only", roles="ffn")
        assert [c.group.layer for c in plan.cuts] == [0]
        with pytest.raises(ValueError, match="registered already"):
            register("first-layer-only")(first_layer_only)
    finally:
        del ALLOCATIONS["first-layer-only"]


@pytest.mark.parametrize("limits", [Limits(10), Limits(10, 3), Limits(10, 3, 4), Limits(8, 1, 8), Limits(5, 2, 8)])
def test_limits_name_the_nearest_allowed_width(limits: Limits) -> None:
    allowed = [w for w in range(limits.floor, limits.units + 1) if w == limits.units or w % limits.step == 0]
    assert limits.least == allowed[0]
    for width in range(limits.units + 1):
        assert limits.keeping(width) == min(a for a in allowed if a >= width)
        assert limits.nearest(width) == min(allowed, key=lambda a: (abs(a - width), -a))


@pytest.mark.parametrize(("allocation", "seconds"), [("uniform", 1.0), ("global", 3.0)])
def test_a_7b_model_is_selected_in_seconds(allocation: str, seconds: float) -> None:
    groups = llama_7b_groups()
    scores = random_scores(groups, heavy=True)
    start = time.process_time()
    plan = select(groups, scores, 0.25, allocation=allocation)
    assert time.process_time() - start < seconds
    assert plan.details["achieved"]["with_embeddings"]["ratio"] == pytest.approx(0.25, abs=1e-4)


@pytest.mark.parametrize("allocation", BY_SCORES)
def test_as_many_experts_stay_as_the_router_chooses(allocation: str) -> None:
    groups = mixture()
    groups.groups = [replace(g, min_units=5) if g.role == "experts" else g for g in groups.groups]
    plan = select(groups, random_scores(groups), 0.6, roles="experts,expert_ffn", allocation=allocation)
    assert all(c.width >= 5 for c in plan.cuts if c.group.role == "experts")
    with pytest.raises(PyPruneError, match="fewer than 5"):
        select(groups, random_scores(groups), widths={"experts": 4}, allocation=allocation)
