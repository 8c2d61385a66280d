"""``pyprune bench``: what is compared computes the same, the figures are what was measured, and mistakes are named."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_fresh import pyprune_fresh

from pyprune import ops
from pyprune.bench import cases, measure, output, run, whole
from pyprune.bench.shapes import SHAPES
from pyprune.cli import bench
from pyprune.errors import PyPruneError

CPU = torch.device("cpu")
plots = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")


def flat(result: Any) -> list[torch.Tensor]:
    """The tensors in what a kernel or an eager formula returns, in order."""
    return [result] if isinstance(result, torch.Tensor) else [t for part in result for t in flat(part)]


def test_the_choices_of_the_command_line_are_those_of_the_package() -> None:
    assert bench.SHAPES == tuple(SHAPES)
    assert bench.WHAT == run.WHAT


def test_shapes_have_the_sizes_of_their_models() -> None:
    assert [round(SHAPES[n].elements() / 1e6) for n in ("llama-7b", "llama-3-8b", "smollm2")] == [6738, 8030, 134]
    model, _ = whole.make_model("tiny", torch.float32, CPU)
    assert SHAPES["tiny"].elements() == sum(p.numel() for p in model.parameters() if p.dim() == 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", sorted(cases.CASES))
def test_kernel_and_eager_formula_compute_the_same(
    part: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a ratio of their times says nothing."""
    monkeypatch.setattr(ops, "channel_moments", cases.moment_sums, raising=False)
    monkeypatch.setattr(ops, "channel_dots", cases.dot_sums, raising=False)
    for case in cases.CASES[part]("tiny", dtype, CPU):
        assert case.ours is not None
        ours, eager = flat(case.ours()), flat(case.stock(case.eager)())
        if part in ("salience", "many"):  # all rows, then all columns
            eager = eager[0::2] + eager[1::2]
        for a, b in zip(ours, eager, strict=True):
            close = {"rtol": 2e-2, "atol": 2e-2 * float(b.float().abs().max())} if dtype == torch.bfloat16 else {}
            torch.testing.assert_close(a.float(), b.float(), **(close or {"rtol": 1e-3, "atol": 1e-3}))


def test_work_counts_every_byte_and_operation_once() -> None:
    by_name = {
        c.op: c.work
        for part in ("salience", "slice", "activations")
        for c in cases.CASES[part]("tiny", torch.bfloat16, CPU)
    }
    shapes = SHAPES["tiny"]
    assert by_name["salience abs(w*g)"] == 4 * shapes.elements()
    assert by_name["salience w^2*h"] == 6 * shapes.elements()
    assert by_name["activations fisher"] == 2 * 1280 * sum(r * c for r, c in shapes.layer().values())
    # Of 2 KV heads of 16 one stays, with 2 of 4 query heads; of 176 channels 132.
    rows = shapes.layers * (32 * 64 + 2 * 16 * 64 + 2 * 132 * 64)
    columns = shapes.layers * (64 * 32 + 64 * 132)
    assert by_name["slice rows"] == 2 * 2 * rows
    assert by_name["slice columns"] == 2 * 2 * columns
    assert by_name["slice rows and columns"] == 2 * 2 * (rows + columns)


def test_rounds_are_interleaved_after_one_round_of_warming_up() -> None:
    order: list[str] = []
    works = {name: lambda name=name: order.append(name) for name in ("a", "b", "c")}
    timings = measure.interleaved(works, 2, CPU)
    assert order == ["a", "b", "c"] * 3
    assert set(timings) == set(works)


def test_a_timing_is_median_and_distance_of_quartiles() -> None:
    timing = measure.Timing.of([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (timing.median, timing.spread) == (3.0, 2.0)
    assert measure.Timing.of([2.0]) == measure.Timing(2.0, 0.0)


def test_a_line_holds_rates_and_ratios_of_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {"ours": 2.0, "eager": 6.0, "compiled": 4.0, "ceiling": 1.0}
    monkeypatch.setattr(
        run, "interleaved", lambda works, rounds, device, ahead: {n: measure.Timing(taken[n], 0.1) for n in works}
    )
    monkeypatch.setattr(run, "copy_work", lambda device: (lambda: None, 10**10))
    monkeypatch.setattr(run, "compiled_work", lambda case: (lambda: None, ""))
    case = cases.Case("x", 4 * 10**9, "GB/s", lambda: None, lambda: None, [()])
    line = run.measured(case, "tiny", torch.float32, CPU, 3)
    assert (line.rate, line.ceiling, line.percent, line.eager, line.compiled) == (2.0, 10.0, 20.0, 3.0, 2.0)


def test_a_compiler_that_fails_is_a_note_and_not_an_end() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise OSError("no compiler here")

    case = cases.Case("x", 1, "GB/s", lambda: None, broken, [(torch.ones(2),)])
    work, note = run.compiled_work(case)
    assert work is None
    assert note.startswith("torch.compile: ")
    assert "no compiler here" in note


def test_shapes_that_do_not_fit_are_refused_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "available_bytes", lambda device: 1 << 20)
    for part in set(bench.WHAT) - {"many"}:  # of one small size, whatever the model's
        with pytest.raises(PyPruneError, match=r"shapes 'llama-7b': needs .* GiB for") as caught:
            run.run([part], "llama-7b", torch.float32, CPU, 1, compiler=False)
        assert part in str(caught.value)


def test_llm_pruner_s_procedure_gives_the_sums_of_its_formulas() -> None:
    """Against float64 gradients of each sample, written separately."""
    model, ids = whole.make_model("tiny", torch.float64, CPU)
    wanted = {n: p for n, p in model.named_parameters() if p.dim() == 2}
    first = whole.llm_pruner(model, ids, "param_first")
    second = whole.llm_pruner(model, ids, "param_second")
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    each = []
    for sample in ids:
        for p in wanted.values():
            p.requires_grad_(True)
        logits = model(input_ids=sample[None]).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], sample[1:])
        each.append(torch.autograd.grad(loss, list(wanted.values())))
    for i, (name, w) in enumerate(wanted.items()):
        g = torch.stack([gradients[i] for gradients in each])
        torch.testing.assert_close(first[name][0], (w * g.mean(0)).abs().sum(1).detach(), rtol=1e-4, atol=1e-12)
        torch.testing.assert_close(second[name][1], (w * w * g.square().mean(0)).sum(0).detach(), rtol=1e-4, atol=1e-12)


@pytest.mark.slow
def test_scoring_measures_both_sides_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "CRITERIA", ("param_second",))
    (line,) = run.run(["scoring"], "tiny", torch.float32, CPU, 1)
    assert line.op == "scoring param_second"
    assert line.median is not None and line.median > 0
    assert line.eager is not None and line.eager > 0
    assert line.rate == pytest.approx(1280 / line.median)
    assert line.peak_gib is not None and line.eager_peak_gib is not None
    assert 0.05 < line.peak_gib < 4 and 0.05 < line.eager_peak_gib < 4


@plots
def test_results_are_written_as_csv_page_and_plot(tmp_path: Path) -> None:
    ended = pyprune_fresh(
        "bench", "--shapes", "tiny", "--what", "slice", "--what", "salience", "--rounds", "3", "--no_compile",
        "--output", "results", "--json", cwd=tmp_path,
    )  # fmt: skip
    assert ended.status == 0, ended.err
    shown = json.loads(ended.out)
    with open(tmp_path / "results" / "results.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [r["op"] for r in rows] == [line["op"] for line in shown["lines"]]
    assert [r["op"].split()[0] for r in rows] == ["salience"] * 2 + ["slice"] * 3
    for row, line in zip(rows, shown["lines"], strict=True):
        assert float(row["median"]) == pytest.approx(line["median"])
        assert float(row["percent"]) == pytest.approx(100 * float(row["rate"]) / float(row["ceiling"]))
    page = (tmp_path / "results" / "results.md").read_text(encoding="utf-8")
    for fact in ("date", "command", "processor", "gpu", "driver", "torch", "kernels"):
        assert f"- {fact}: {shown['facts'][fact]}" in page
    assert "--shapes tiny" in shown["facts"]["command"]
    assert "torch.compile was not asked for" in page
    assert (tmp_path / "results" / "results.png").read_bytes().startswith(b"\x89PNG")


def test_a_gpu_is_kept_busy_until_the_host_has_queued_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host takes 60 ms, the GPU one: which alone is what a run takes, however long the host must be waited for."""
    now = busy = 0.0

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = max(now, busy)

        def query(self) -> bool:
            return self.at <= now

        def synchronize(self) -> None:
            nonlocal now
            now = max(now, self.at)

        def elapsed_time(self, other: Event) -> float:
            return other.at - self.at

    def sleep(cycles: int) -> None:
        nonlocal busy
        busy = max(now, busy) + cycles / 2e6

    def work() -> None:
        nonlocal now, busy
        now += 60
        busy = max(now, busy) + 1

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    assert measure.seconds(work, torch.device("cuda")) == (pytest.approx(0.061), 0)
    assert measure.seconds(work, torch.device("cuda"), measure.AHEAD) == (pytest.approx(0.001), 4 * measure.AHEAD)
    timings = measure.interleaved({"a": work}, 3, torch.device("cuda"), ahead=True)
    assert timings["a"] == measure.Timing(pytest.approx(0.001), pytest.approx(0.0))


def test_a_missing_plot_library_is_named_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PyPruneError, match=r"output 'x': .*matplotlib.*pip install"):
        output.check_plot("x")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_a_mistake_of_one_line(tmp_path: Path) -> None:
    ended = pyprune_fresh("bench", "--device", "cuda", cwd=tmp_path)
    assert ended.status == 2
    assert ended.err.splitlines() == [
        "error: --device 'cuda': there is no usable CUDA device. Use cpu, or see what `pyprune env` finds."
    ]


def test_notes_are_told_once_for_all_lines_that_share_them() -> None:
    lines = [run.Line("a", "tiny", "float32", note="why"), run.Line("b", "tiny", "float32", note="why")]
    assert output.notes(lines) == ["a, b: why"]


def test_a_run_that_is_cut_short_leaves_the_lines_that_it_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyprune.cli.main import main

    def interrupted(shapes: str, dtype: torch.dtype, device: torch.device) -> Any:
        yield next(cases.salience_cases(shapes, dtype, device))
        raise KeyboardInterrupt

    monkeypatch.setattr(output, "check_plot", lambda folder: None)
    monkeypatch.setitem(cases.CASES, "salience", interrupted)
    arguments = ["--shapes", "tiny", "--what", "salience", "--rounds", "1", "--no_compile", "--output", str(tmp_path)]
    assert main(["bench", *arguments]) == 130
    with open(tmp_path / "results.csv", encoding="utf-8") as file:
        assert [row["op"] for row in csv.DictReader(file)] == ["salience abs(w*g)"]
    assert "salience abs(w*g)" in (tmp_path / "results.md").read_text(encoding="utf-8")
