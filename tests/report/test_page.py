"""The page: self-contained, escaped, complete as far as there is something to show."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
from helpers_report import Page, evaluation, figure, sources
from helpers_run import ROOT

from pyprune.report.html import Sources, page, pictures
from pyprune.report.html.figures import of_evaluation, of_pair, rows

EVIL = "</style></title><script>alert(1)</script><img src=x onerror=alert(1)>\" ' & {{ 7 * 7 }} {% raw %}"
SECTIONS = ("done", "widths", "importance", "quality", "cost", "samples", "recovery", "stages", "repeat")


@pytest.fixture
def shown() -> Page:
    return Page(page(sources()))


def test_everything_has_its_section(shown: Page) -> None:
    assert [a["id"] for a in shown.named("section")] == list(SECTIONS)
    for section, texts in {
        "done": (
            "20 % of the parameters removed", "50 % of the FFN channels left", "in 3 steps", "20.00 % removed",
            "wanda (aggregation sum, route activations)", "train.txt: 32 sequences of 128 tokens, seed 7",
            "global, shares by group_fisher", "KV heads, FFN channels", "FFN channels: multiples of 64",
            "FFN channels: at least 10 %", "least-squares, target own, 2 matrices", "auto, cpu", "1 min 15 s",
            "mind the gap",
        ),
        "widths": ("3 of 4 KV heads in each of 2 layers.", "100 of 192 FFN channels in each of 2 layers."),
        "importance": ("FFN channels: 184 of 384 units removed in 2 layers.", "score, logarithmic scale"),
        "quality": ("20.00", "30.00", "+50.0 %", "22.50", "8 windows of 1024 tokens", "piqa, acc", "62.5 ± 3.4 %"),
        "cost": ("1,000,000", "800,000", "tokens written a second", "20.0 ± 0.5", "500.0 ± 10.0 ms"),
        "samples": ("The capital", "is Paris.", "(says nothing)"),
        "recovery": ("LoRA of rank 8 on data.jsonl.", "10 of 20", "31.00 before, 24.00 after"),
        "stages": ("prune: score", "recover: train", "peak GPU memory", "1.0 MiB"),
        "repeat": ("pyprune prune some/model --ratio 0.2", "ratio: 0.2", "pyprune 1.2.3, torch 2.13, peft 0.17"),
    }.items():  # fmt: skip
        for text in texts:
            assert text in shown.texts[section], (section, text)


def test_the_page_is_sound_and_asks_nothing_from_outside(shown: Page) -> None:
    assert shown.unbalanced == []
    assert shown.outside() == []
    assert shown.source.startswith("<!doctype html>")
    ids = [a["id"] for _, a in shown.elements if "id" in a]
    assert len(ids) == len(set(ids))
    links = [str(a["href"]) for a in shown.named("a")]
    assert links == [f"#{section}" for section in SECTIONS]
    (policy,) = (a["content"] for a in shown.named("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in str(policy)


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://x.org/a.js"></script>', '<img src="http://x.org/a.png">', '<p onclick="f()">',
        "<style>@import 'a.css';</style>", "<style>p { background: url(http://x.org/a) }</style>", '<a href="http://x">',
        '<p style="background: url(a.png)">', '<meta http-equiv="refresh" content="0;url=http://x">', "<iframe>",
    ],
)  # fmt: skip
def test_the_search_for_outside_references_finds_them(text: str) -> None:
    assert Page(text).outside()


def poisoned(value: Any) -> Any:
    """Every text in plain data with markup in it."""
    if isinstance(value, str):
        return value + EVIL
    if isinstance(value, dict):
        return {k: poisoned(v) if k not in ("role", "mode", "scale") else v for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [poisoned(v) for v in value]
    return value


def test_text_from_models_prompts_and_files_is_never_markup() -> None:
    clean = sources()
    evil = Sources(
        columns={key: name + EVIL for key, name in clean.columns.items()}, report=poisoned(clean.report),
        recovery=poisoned(clean.recovery), importance=poisoned(clean.importance), widths=clean.widths,
        evaluations=[("pruned", poisoned(evaluation("smaller")))], samples=poisoned(clean.samples),
        recipes=poisoned(clean.recipes), commands=poisoned(clean.commands), notes=[EVIL],
    )  # fmt: skip
    found = Page(page(evil))
    assert found.unbalanced == [] and found.outside() == []
    plain = Page(page(clean))
    for tag in ("style", "title", "section", "svg", "table"):
        assert len(found.named(tag)) == len(plain.named(tag)), tag
    assert not found.named("script") and not found.named("img")
    assert EVIL in found.texts["samples"] and EVIL in found.texts["done"] and EVIL in found.texts["quality"]


def test_pictures_have_words_and_their_numbers_stand_in_tables(shown: Page) -> None:
    drawn = [a for a in shown.named("svg") if a.get("role") == "img"]
    assert len(drawn) == 5  # two widths, two importance pictures, one curve
    assert all(a["aria-label"] for a in drawn)
    assert all(a.get("aria-hidden") == "true" for a in shown.named("svg") if a.get("role") != "img")
    assert "layer 1: 3 of 4" in shown.texts["widths"]
    assert "layer 0: 100 kept, 92 removed" in shown.texts["importance"]


def test_a_page_of_next_to_nothing_is_still_a_page() -> None:
    bare = Page(page(Sources(columns={"dense": "dense"}, report={"model": "m"})))
    assert [a["id"] for a in bare.named("section")] == ["done", "repeat"]
    assert [str(a["href"]) for a in bare.named("a")] == ["#done", "#repeat"]
    assert bare.unbalanced == [] and bare.outside() == []


def test_gains_are_told_and_so_is_that_they_were_left_out() -> None:
    given = sources()
    for kept, words in ((True, "0.3000 to 0.2500 nats"), (False, "left out (0.3000 to 0.2500 nats")):
        gains = {"before": 0.3, "after": 0.25, "kept": kept, "values": {}, "note": None}
        given.report = {
            **given.report,
            "compensation": [{"mode": "obs", "target": "own", "matrices": [], "gains": gains}],
        }
        assert words in Page(page(given)).texts["done"]
        assert ("left out" in Page(page(given)).texts["done"]) is not kept


@pytest.mark.parametrize("part", ["plan", "scores", "perplexity", "stages", "recipe", "parameters", "weights_bytes"])
def test_a_report_may_lack_any_part(part: str) -> None:
    given = sources()
    for empty in (None, {}):
        report = deepcopy(dict(given.report))
        report[part] = empty
        given.report = report
        assert Page(page(given)).unbalanced == []


def test_importance_pictures_show_kept_and_removed_in_their_places() -> None:
    few, many = pictures.importance(sources().importance["roles"])
    assert [c["kind"] for c in few["rows"][0]["cells"]] == ["kept", "removed", "kept", "kept"]
    strengths = [c["strength"] for c in few["rows"][0]["cells"]]
    assert strengths[3] == 1.0 > strengths[2] > strengths[0] > strengths[1]
    assert few["crosses"] and not many["crosses"]
    cells = many["rows"][0]["cells"]
    assert [(c["kind"], c["x"], c["width"]) for c in cells] == [
        ("removed", 0, 1.0), ("removed", 1, 0.6), ("kept", 1.6, 0.4), ("kept", 2.0, 1.0),
    ]  # fmt: skip
    assert cells[3]["strength"] == 1.0 > cells[0]["strength"] > cells[1]["strength"]


def test_whole_layers_and_a_single_group_are_drawn() -> None:
    layers = [{"role": "layers", "layer": i, "before": 1, "after": int(i not in (1, 2))} for i in range(4)]
    hidden = [{"role": "hidden", "layer": None, "before": 96, "after": 64}]
    untouched = [{"role": "state", "layer": 0, "before": 8, "after": 8}]
    first, second = pictures.widths([*layers, *hidden, *untouched])
    assert first["words"] == "2 of 4 layers stay; removed: 1-2."
    assert [b["height"] for b in first["bars"]] == [1, 0, 0, 1]
    assert second["single"] and second["words"] == "64 of 96 hidden channels."


def test_a_curve_needs_two_points_and_runs_from_the_first_to_the_last() -> None:
    assert pictures.curve([(0, 5.0)]) is None and pictures.curve([(0, 5.0), (1, None)]) is None
    drawn = pictures.curve([(0, 30.0), (5, 20.0), (10, 25.0)])
    assert drawn is not None and drawn["line"] == "0.0000,0.0000 0.5000,1.0000 1.0000,0.5000"
    assert (drawn["low"], drawn["high"]) == (20.0, 30.0)


def test_figures_of_one_protocol_share_a_row_and_the_later_one_counts() -> None:
    pair = {"before": figure(20.0), "after": figure(30.0)}
    found = [*of_pair(pair, ("dense", "pruned")), *of_evaluation(evaluation("m", perplexity=figure(31.0)), "pruned")]
    first = rows(found, "quality", ["dense", "pruned", "recovered"])[0]
    assert [c and c["shown"] for c in first["cells"]] == ["20.00", "31.00", None]
    assert first["cells"][1]["verdict"] == "worse" and first["cells"][1]["share"] == 1.0
    other = [*found, *of_evaluation(evaluation("m"), "pruned")]
    notes = [r["note"] for r in rows(other, "quality", ["dense", "pruned"]) if r["label"] == "perplexity"]
    assert notes == ["test.txt: 8 windows of 1024 tokens", "other.txt: 2 windows of 64 tokens"]


def test_changes_say_better_or_worse_in_the_direction_that_counts() -> None:
    worse = evaluation("m", tasks=[{**evaluation("m")["tasks"][0], "acc": 0.6, "acc_norm": None}])
    worse["speed"] = {**worse["speed"], "decode": 30.0}
    found = [*of_evaluation(evaluation("d"), "dense"), *of_evaluation(worse, "pruned")]
    cells = {r["label"]: r["cells"][1] for r in rows(found, "quality", ["dense", "pruned"])}
    assert cells["piqa, acc"]["change"].endswith("2.5 points") and cells["piqa, acc"]["verdict"] == "worse"
    assert cells["piqa, acc_norm"] is None
    cost = {r["label"]: r["cells"][1] for r in rows(found, "cost", ["dense", "pruned"])}
    faster = cost["tokens written a second"]
    assert (faster["change"], faster["verdict"]) == ("+50.0 %", "better")
    assert cost["parameters"]["verdict"] == ""


def test_a_perplexity_that_overflows_is_named() -> None:
    found = list(of_pair({"before": figure(20.0), "after": figure(None)}, ("dense", "pruned")))
    cells = rows(found, "quality", ["dense", "pruned"])[0]["cells"]
    assert cells[1]["shown"] == "overflow" and cells[1]["change"] == ""


def test_the_templates_are_installed_with_the_package() -> None:
    tomllib = pytest.importorskip("tomllib")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["pyprune"]
    installed = {file for pattern in declared for file in (ROOT / "pyprune").glob(pattern)}
    templates = set((ROOT / "pyprune/report/html/templates").iterdir())
    assert {f.name for f in templates} == {"report.html", "pictures.html", "style.css"}
    assert templates <= installed
