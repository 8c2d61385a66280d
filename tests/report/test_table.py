"""Tables and JSON of a report."""

from __future__ import annotations

import io
import json

import pytest
from helpers_run import tiny_llama
from rich.console import Console

from pyprune.discovery import discover
from pyprune.report import Report, evaluation_table, group_tables, report_tables
from pyprune.units import count, seconds, size, spans


def stage(name: str, peak: int, gpu: int | None = None) -> dict:
    return {"name": name, "seconds": 1.5, "peak_memory": peak, "peak_gpu_memory": gpu}


def figure(value: float | None, nll: float) -> dict:
    return {"perplexity": value, "nll": nll, "protocol": "test.txt: 8 windows of 1024 tokens"}


@pytest.fixture
def report() -> Report:
    counts = {"before": 1000, "after": 800, "ratio": 0.2}
    return Report(
        model="some/model[1]",
        model_class="LlamaForCausalLM",
        parameters={"with_embeddings": counts, "without_embeddings": {"before": 600, "after": 400, "ratio": 1 / 3}},
        weights_bytes={"before": 4096, "after": 3072},
        perplexity={"before": figure(23.6087, 3.1616), "after": figure(36.81, 3.6058)},
        continuation={"prompt": "The capital", "before": " is [bold]Paris", "after": " of of"},
        stages=[stage("perplexity before", 3 * 2**30), stage("score", 2**30), stage("perplexity after", 2 * 2**30)],
        warnings=["widths are rounded"],
        output_dir="/out",
    )


def text(parts: list, width: int = 120) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    for part in parts:
        console.print(part)
    return console.export_text()


def row(shown: str, start: str) -> list[str]:
    line = next(line for line in shown.splitlines() if line.strip(" │┃").startswith(start))
    return [cell.strip() for cell in line.replace("┃", "│").strip("│").split("│")]


def test_before_and_after_stand_side_by_side(report: Report) -> None:
    shown = text(report_tables(report))
    assert row(shown, "parameters") == ["parameters", "1,000", "800", "-20.00%"]
    assert row(shown, "parameters without") == ["parameters without embeddings", "600", "400", "-33.33%"]
    assert row(shown, "size on disk") == ["size on disk", "4.0 KiB", "3.0 KiB", "-25.00%"]
    assert row(shown, "peak memory of") == ["peak memory of evaluation", "3.00 GiB", "2.00 GiB", "-33.33%"]
    assert row(shown, "perplexity") == ["perplexity", "23.61", "36.81", "+0.444 nats"]
    assert "test.txt: 8 windows of 1024 tokens" in shown


def test_every_stage_has_its_time_and_peak_and_the_sum_stands_below(report: Report) -> None:
    shown = text(report_tables(report))
    assert row(shown, "score") == ["score", "1.50 s", "1.00 GiB"]
    assert row(shown, "in all") == ["in all", "4.50 s", "3.00 GiB"]


def test_a_gpu_column_appears_with_a_gpu(report: Report) -> None:
    assert "GPU" not in text(report_tables(report))
    report.stages[1] = stage("score", 2**30, gpu=5 * 2**20)
    assert row(text(report_tables(report)), "score")[-1] == "5.0 MiB"


def test_text_from_outside_is_shown_as_it_stands(report: Report) -> None:
    shown = text(report_tables(report))
    for part in ("some/model[1]", " is [bold]Paris", "note: widths are rounded", "saved in /out"):
        assert part in shown


def test_a_report_without_perplexity_has_no_such_row(report: Report) -> None:
    report.perplexity = report.continuation = None
    shown = text(report_tables(report))
    assert "│ perplexity │" not in shown and "nats" not in shown


def test_an_overflowing_perplexity_is_named(report: Report) -> None:
    report.perplexity = {"before": figure(23.6, 3.16), "after": figure(None, 800.0)}
    assert row(text(report_tables(report)), "perplexity")[2] == "overflow"


def test_json_has_the_totals_and_survives_a_round_trip(report: Report) -> None:
    data = json.loads(report.to_json())
    assert (data["format"], data["version"]) == ("pyprune-report", 1)
    assert data["seconds"] == 4.5
    assert data["peak_memory"] == 3 * 2**30
    assert data["perplexity"]["after"]["perplexity"] == 36.81


def test_groups_that_differ_in_their_layer_share_a_row() -> None:
    shown = text(group_tables(discover(tiny_llama()), "tiny (LlamaForCausalLM)"))
    assert row(shown, "kv_heads")[1:5] == ["model.layers.{0-3}.self_attn", "4", "4", "4,608"]
    assert row(shown, "ffn")[1:6] == [
        "model.layers.{0-3}.mlp", "4", "192", "288", "gate_proj[0], up_proj[0], down_proj[1]",
    ]  # fmt: skip
    assert row(shown, "query_heads")[3] == "4 x 2"


def test_frozen_groups_are_listed_with_the_reason() -> None:
    shown = text(group_tables(discover(tiny_llama()), "tiny (LlamaForCausalLM)"))
    whole = shown[shown.index("Left whole") :]
    assert "vocab" in whole and "embedding" in whole


def test_hidden_units_are_marked_as_running_through_a_norm() -> None:
    shown = text(group_tables(discover(tiny_llama()), "tiny (LlamaForCausalLM)"))
    assert row(shown, "hidden *")[3] == "96"
    assert "* a normalisation" in shown


def test_evaluation_shows_figure_and_protocol() -> None:
    result = {
        "model": "m", "model_class": "C", "parameters": 5,
        "weights_bytes": 20, "perplexity": figure(12.345, 2.5), "continuation": {"prompt": "a", "text": "b"},
        "stages": [stage("perplexity", 2**20)],
    }  # fmt: skip
    shown = text([evaluation_table(result)])
    assert "12.35" in shown or "12.34" in shown
    assert "8 windows of 1024" in shown and "1.50 s, peak memory 1.0 MiB" in shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**20, "1.0 MiB"), (5 * 2**40, "5120.00 GiB")],
)
def test_sizes(count: int, shown: str) -> None:
    assert size(count) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(0.254, "0.25 s"), (12.34, "12.3 s"), (59.96, "60.0 s"), (75.2, "1 min 15 s")]
)
def test_durations(value: float, shown: str) -> None:
    assert seconds(value) == shown


def test_spans() -> None:
    assert spans([0]) == "0"
    assert spans([4, 5, 6, 9]) == "4-6,9"


def test_counts() -> None:
    shown = [count(n) for n in (512, 319_680, 134_500_000, 6.7e9)]
    assert shown == ["512", "319.7 k", "134.5 M", "6.70 G"]
