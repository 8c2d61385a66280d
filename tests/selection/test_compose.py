"""Two steps of pruning as one plan over the dense model."""

from __future__ import annotations

import numpy as np
import pytest
from helpers_selection import llama_groups, random_scores
from hypothesis import given, settings
from hypothesis import strategies as st

from pyprune.discovery.groups import Groups
from pyprune.errors import PyPruneError
from pyprune.selection import Plan, compose, select

SIZES = {"layers": 5, "hidden": 24, "kv": 4, "queries": 3, "head_dim": 4, "ffn": 20, "vocab": 11}
BUILDER = {"kv_heads": "kv", "query_heads": "queries", "hidden": "hidden", "layers": "layers", "ffn": "ffn"}


def pruned(plan: Plan, sizes: dict) -> tuple[Groups, dict]:
    """Groups of the model that a plan with the same widths everywhere leaves, as discovery would find them."""
    new = dict(sizes)
    for cut in plan.cuts:
        new[BUILDER[cut.group.role]] = cut.width
    return llama_groups(**new), new


def positions(plan: Plan, groups: Groups, tensor: str) -> list[np.ndarray]:
    """Kept positions in every dimension of ``tensor``."""
    kept = plan.kept_positions(groups.shapes).get(tensor, {})
    return [kept.get(d, np.arange(n)) for d, n in enumerate(groups.shapes[tensor])]


def dense_name(tensor: str, first: Plan) -> str:
    parts = tensor.split(".")
    layers = [c for c in first.cuts if c.group.role == "layers"]
    if layers and parts[1] == "layers":
        parts[2] = str(layers[0].kept[0][int(parts[2])])
    return ".".join(parts)


def check(dense: Groups, sizes: dict, first: Plan, second: Plan, smaller: Groups) -> None:
    both = compose(dense, first, second)
    after_two = second.new_shapes(smaller.shapes)
    after_one = both.new_shapes(dense.shapes)
    assert sorted(map(str, after_one.values())) == sorted(map(str, after_two.values()))
    for tensor in after_two:
        name = dense_name(tensor, first)
        outer, inner, composed = (
            positions(p, g, t) for p, g, t in ((first, dense, name), (second, smaller, tensor), (both, dense, name))
        )
        for a, b, c in zip(outer, inner, composed, strict=True):
            np.testing.assert_array_equal(a[b], c, err_msg=name)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 99))
def test_positions_are_those_of_one_step_after_the_other(data: st.DataObject, seed: int) -> None:
    dense, sizes = llama_groups(**SIZES), SIZES
    plans, models = [], [dense]
    for step in range(2):
        roles = data.draw(st.sets(st.sampled_from(sorted(BUILDER)), min_size=1))
        widths = {r: data.draw(st.integers(1, sizes[BUILDER[r]])) for r in sorted(roles)}
        plans.append(select(models[-1], random_scores(models[-1], seed + step), widths=widths))
        smaller, sizes = pruned(plans[-1], sizes)
        models.append(smaller)
    check(dense, SIZES, plans[0], plans[1], models[1])


def test_layers_removed_first_renumber_the_groups_of_the_second_step() -> None:
    dense = llama_groups(**SIZES)
    first = select(dense, random_scores(dense, 3), widths={"layers": 3})
    smaller, _ = pruned(first, SIZES)
    second = select(smaller, random_scores(smaller, 4), widths={"ffn": 10, "layers": 2, "query_heads": 2})
    check(dense, SIZES, first, second, smaller)
    both = compose(dense, first, second)
    assert len(both.removed_modules()) == 3
    kept = set(first["model.layers:layers"].kept[0]) - {int(m.rsplit(".", 1)[1]) for m in both.removed_modules()}
    assert {c.group.layer for c in both.cuts if c.group.role == "ffn"} == kept


def test_three_steps_compose_and_keep_their_details() -> None:
    sizes, dense = SIZES, llama_groups(**SIZES)
    total, model = None, dense
    for step in range(3):
        plan = select(model, random_scores(model, step), 0.1, roles="ffn")
        total = plan if total is None else compose(dense, total, plan)
        model, sizes = pruned(plan, sizes)
    assert total.new_shapes(dense.shapes) == model.shapes
    assert total.details["achieved"]["with_embeddings"]["before"] == dense.num_parameters()
    assert total.details["achieved"]["with_embeddings"]["after"] == model.num_parameters()
    assert total.details["widths"] == {"ffn": sizes["ffn"]}
    assert [s["asked"]["ratio"] for s in total.details["steps"]] == [0.1, 0.1, 0.1]
    assert Plan.from_json(total.to_json()) == total


def test_what_the_second_allocation_found_stands_in_the_details() -> None:
    dense = llama_groups(**SIZES)
    first = select(dense, random_scores(dense), widths={"layers": 3})
    smaller, _ = pruned(first, SIZES)
    second = select(smaller, random_scores(smaller), 0.2, roles="ffn")
    second.details["search"] = {"kl": 0.5}
    assert compose(dense, first, second).details["search"] == {"kl": 0.5}


def test_a_step_that_cuts_nothing_changes_nothing() -> None:
    dense = llama_groups(**SIZES)
    plan = select(dense, random_scores(dense), 0.2)
    assert compose(dense, Plan(), plan).cuts == plan.cuts
    assert compose(dense, plan, Plan()).cuts == plan.cuts


def test_plans_in_the_wrong_order_are_refused() -> None:
    dense = llama_groups(**SIZES)
    first = select(dense, random_scores(dense), widths={"ffn": 10})
    smaller, _ = pruned(first, SIZES)
    second = select(smaller, random_scores(smaller), widths={"ffn": 5})
    with pytest.raises(PyPruneError, match=r"units 1 x 10, the first leaves 1 x 5\. Compose plans of one model"):
        compose(dense, second, second)


def test_plans_of_another_model_are_refused() -> None:
    dense, other = llama_groups(**SIZES), llama_groups(**{**SIZES, "layers": 7})
    plan = select(other, random_scores(other), widths={"ffn": 10}, layers=[6])
    with pytest.raises(PyPruneError, match=r"cuts model\.layers\.6\.mlp:ffn, which the dense model does not have"):
        compose(dense, Plan(), plan)
