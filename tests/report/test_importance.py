"""The summary of scores and widths that lies beside a checkpoint."""

from __future__ import annotations

import json

import numpy as np
import torch
from helpers_run import tiny_llama

from pyprune.discovery import discover
from pyprune.discovery.groups import Groups
from pyprune.importance.scores import Scores
from pyprune.report.importance import BINS, importance_summary, widths_of_plan
from pyprune.selection import select
from pyprune.selection.plan import Plan


def made(seed: int = 0, **request) -> tuple[Groups, Scores, Plan]:
    """Groups of a tiny Llama (4 layers, FFN 192, 4 KV heads of 2 query heads), random scores, and a plan."""
    groups = discover(tiny_llama()).thaw(("kv_heads", "query_heads"))
    draw = torch.Generator().manual_seed(seed)
    by_group = {g.name: torch.rand(g.outer, g.units, generator=draw) for g in groups.prunable()}
    scores = Scores(by_group, "random")
    return groups, scores, select(groups, scores, **request)


def role(summary: dict, name: str) -> dict:
    return next(r for r in summary["roles"] if r["role"] == name)


def widths(entries: list[dict], name: str) -> dict:
    return {e["layer"]: (e["before"], e["after"]) for e in entries if e["role"] == name}


def test_bins_count_every_unit_once_and_agree_with_the_plan() -> None:
    groups, scores, plan = made(widths={"ffn": 100})
    summary = importance_summary(groups, scores, plan)
    found = role(summary, "ffn")
    assert found["mode"] == "bins" and len(found["edges"]) == BINS + 1
    edges = np.array(found["edges"])
    assert (np.diff(edges) > 0).all()
    for row in found["rows"]:
        assert (sum(row["kept"]), sum(row["removed"])) == (100, 92)
        name = next(g.name for g in groups if g.role == "ffn" and g.layer == row["layer"])
        values = scores[name].reshape(-1).double().numpy()
        kept = values[list(plan[name].kept[0])]
        inner = edges[1:-1]  # rounded to five digits, so a unit at an edge may fall on either side
        wanted = np.histogram(kept, [-np.inf, *inner, np.inf])[0]
        assert np.abs(np.cumsum(wanted) - np.cumsum(row["kept"])).max() <= 1
        assert row["least"] <= row["median"] <= row["greatest"]


def test_few_units_stand_one_by_one_in_their_order() -> None:
    groups, scores, plan = made(widths={"kv_heads": 3})
    found = role(importance_summary(groups, scores, plan), "kv_heads")
    assert found["mode"] == "units"
    for row in found["rows"]:
        name = next(g.name for g in groups if g.role == "kv_heads" and g.layer == row["layer"])
        np.testing.assert_allclose(row["scores"], scores[name].reshape(-1).numpy(), rtol=1e-4)
        assert [i for i, kept in enumerate(row["kept"]) if kept] == list(plan[name].kept[0])


def test_query_heads_go_with_their_kv_head() -> None:
    groups, scores, plan = made(widths={"kv_heads": 3, "query_heads": 1})
    entries = importance_summary(groups, scores, plan)["widths"]
    assert set(widths(entries, "kv_heads").values()) == {(4, 3)}
    assert set(widths(entries, "query_heads").values()) == {(8, 3)}
    assert set(widths(widths_of_plan(plan), "query_heads").values()) == {(8, 3)}


def test_dimensions_of_a_head_are_counted_within_one_head() -> None:
    groups, scores, plan = made(widths={"kv_heads": 2})
    assert set(widths(importance_summary(groups, scores, plan)["widths"], "vo_dim").values()) == {(8, 8)}


def test_a_removed_layer_keeps_its_number_and_has_nothing_left() -> None:
    groups, scores, plan = made(widths={"layers": 3})
    entries = importance_summary(groups, scores, plan)["widths"]
    layers = widths(entries, "layers")
    (gone,) = [i for i, (_, after) in layers.items() if not after]
    assert sorted(layers) == [0, 1, 2, 3]
    assert widths(entries, "ffn") == {i: (192, 0 if i == gone else 192) for i in range(4)}
    assert widths(entries, "query_heads")[gone] == (8, 0)


def test_a_plan_alone_knows_the_widths_of_what_it_cuts() -> None:
    groups, scores, plan = made(ratio=0.3, allocation="global")
    whole = importance_summary(groups, scores, plan)["widths"]
    for entry in widths_of_plan(plan):
        assert entry in whole


def test_negative_scores_get_a_linear_scale_and_zeros_the_first_bin() -> None:
    groups, scores, plan = made(widths={"ffn": 100})
    negative = Scores({k: v - 0.5 for k, v in scores.items()}, "signed")
    found = role(importance_summary(groups, negative, plan), "ffn")
    assert found["scale"] == "linear" and found["edges"][0] < 0
    np.testing.assert_allclose(np.diff(found["edges"]), np.diff(found["edges"]).mean(), rtol=1e-2)
    zeros = {k: torch.where(v < 0.25, 0.0, v) for k, v in scores.items()}
    found = role(importance_summary(groups, Scores(zeros, "some"), plan), "ffn")
    assert found["scale"] == "log" and found["edges"][0] > 0
    for row in found["rows"]:
        name = next(g.name for g in groups if g.role == "ffn" and g.layer == row["layer"])
        assert row["kept"][0] + row["removed"][0] >= int((zeros[name] == 0).sum())


def test_equal_scores_are_summarised_too() -> None:
    groups, scores, plan = made(widths={"ffn": 100})
    for value in (0.0, 1.0, -1.0):
        same = Scores({k: torch.full_like(v, value) for k, v in scores.items()}, "same")
        for found in importance_summary(groups, same, plan)["roles"]:
            if found["mode"] == "bins":
                assert all(sum(r["kept"]) + sum(r["removed"]) == 192 for r in found["rows"] if found["role"] == "ffn")


def test_the_summary_is_small_plain_json() -> None:
    text = json.dumps(importance_summary(*made(ratio=0.3)), allow_nan=False)
    assert len(text) < 20_000
    assert json.loads(text)["format"] == "pyprune-importance"
