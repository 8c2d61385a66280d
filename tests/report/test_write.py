"""From runs to pages: prune and recover write them, the verb joins what lies beside a checkpoint."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import yaml
from helpers_report import Page, evaluation, read_page
from helpers_run import Ended, byte_tokenizer, tiny_llama, write_model, write_text

import pyprune
from pyprune import report_pipeline
from pyprune.errors import PyPruneError
from pyprune.evaluation.generation import DEFAULT_PROMPTS, sample_prompts

MEASURED = {"eval_length": 64, "eval_windows": 2, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model``, ``train.txt``, and ``smaller``, pruned from it with samples."""
    root = tmp_path_factory.mktemp("place")
    write_model(root / "model")
    write_text(root / "train.txt")
    pyprune.prune(
        root / "model", ratio=0.2, criterion="wanda", calibration=root / "train.txt", samples=2, length=32,
        eval_text=root / "train.txt", generations=2, output_dir=root / "smaller", **MEASURED,
    )  # fmt: skip
    return root


@pytest.fixture
def smaller(place: Path, tmp_path: Path) -> Path:
    shutil.copytree(place / "smaller", tmp_path / "smaller")
    return tmp_path / "smaller"


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    from pyprune.cli.main import main

    def run(*arguments: object) -> Ended:
        capfd.readouterr()
        status = main([str(a) for a in arguments])
        return Ended(status, *capfd.readouterr())

    return run


def columns(page: Page) -> list[str]:
    """Headings of the table of figures about quality."""
    table = page.source[page.source.index('id="quality"') :]
    return re.findall(r'<th class="number">(.*?)</th>', table[: table.index("</tr>")])


def test_prune_writes_a_page_that_shows_the_run(place: Path) -> None:
    page = read_page(place / "smaller" / "report.html")
    assert page.unbalanced == [] and page.outside() == []
    assert "model, pruned by 20" in page.texts[""]
    for section, text in (
        ("done", "wanda"), ("widths", "FFN channels"), ("importance", "Scores by wanda"), ("quality", "perplexity"),
        ("samples", DEFAULT_PROMPTS[0]), ("stages", "samples after"), ("repeat", "--criterion wanda"),
    ):  # fmt: skip
        assert text in page.texts[section], section
    report = json.loads((place / "smaller" / "pyprune_report.json").read_text())
    assert [one["prompt"] for one in report["samples"]] == list(DEFAULT_PROMPTS[:2])
    assert DEFAULT_PROMPTS[2] not in page.texts["samples"]


def test_samples_are_what_the_models_say(place: Path) -> None:
    from pyprune.evaluation.generation import continuation

    report = json.loads((place / "smaller" / "pyprune_report.json").read_text())
    for key, folder in (("before", "model"), ("after", "smaller")):
        model = pyprune.load(place / folder)
        for one in report["samples"]:
            assert one[key] == continuation(model, byte_tokenizer(), one["prompt"], 6)


def test_no_report_writes_neither_page_nor_summary_and_asks_nothing(tmp_path: Path) -> None:
    options = {"ratio": 0.2, "criterion": "l2", "eval_text": torch.arange(128), "tokenizer": byte_tokenizer()}
    out = pyprune.prune(tiny_llama(), **options, **MEASURED, report=False, output_dir=tmp_path / "out")
    assert out.report.samples is None
    assert not {"report.html", "pyprune_importance.json"} & {p.name for p in (tmp_path / "out").iterdir()}


def test_samples_come_by_themselves_only_where_both_models_run_anyway(tmp_path: Path) -> None:
    def samples(**options) -> list | None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        out = pyprune.prune(
            tiny_llama(), ratio=0.2, criterion="l2", max_new_tokens=2, tokenizer=byte_tokenizer(), output_dir=folder,
            **options,
        )  # fmt: skip
        return out.report.samples

    assert samples() is None
    assert len(samples(prompt="Once") or ()) == 3
    assert samples(prompt="Once", generations=0) is None
    assert [s["prompt"] for s in samples(prompts=["One", "Two"]) or ()] == ["One", "Two"]


def test_prompts_that_nobody_asked_for_stop_after_a_while(monkeypatch) -> None:
    monkeypatch.setattr(report_pipeline, "PATIENCE", 0.0)
    options = {"ratio": 0.2, "criterion": "l2", "max_new_tokens": 2, "prompt": "Once", "tokenizer": byte_tokenizer()}
    for asked, samples in ({}, 1), ({"generations": 2}, 2):
        with TemporaryDirectory() as folder:
            out = pyprune.prune(tiny_llama(), **options, **asked, output_dir=Path(folder) / "out")
        assert len(out.report.samples or ()) == samples


def test_prompts_come_from_a_file_one_a_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("One \n\n  Two\nThree\n", encoding="utf-8")
    assert sample_prompts(str(tmp_path / "p.txt"), None) == ["One", "Two", "Three"]
    assert sample_prompts(tmp_path / "p.txt", None) == ["One", "Two", "Three"]
    assert sample_prompts(str(tmp_path / "p.txt"), 2) == ["One", "Two"]
    with pytest.raises(PyPruneError, match="generations 4: there are 3 prompts"):
        sample_prompts(str(tmp_path / "p.txt"), 4)
    (tmp_path / "p.txt").write_text("\n \n")
    with pytest.raises(PyPruneError, match="holds no prompts"):
        sample_prompts(str(tmp_path / "p.txt"), None)
    with pytest.raises(PyPruneError, match=r"prompts .*absent.txt.*cannot be read"):
        sample_prompts(str(tmp_path / "absent.txt"), None)


def test_prompts_without_a_tokenizer_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(PyPruneError, match="generations 2: there is no tokenizer"):
        pyprune.prune(tiny_llama(), ratio=0.2, criterion="l2", generations=2, output_dir=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_fails_is_a_warning_and_the_checkpoint_stays(tmp_path: Path, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report_pipeline, "page", fail)
    with pytest.warns(UserWarning, match=r"report.html could not be written .*pyprune report .*tries again"):
        pyprune.prune(tiny_llama(), ratio=0.2, criterion="l2", output_dir=tmp_path / "out")
    assert pyprune.load(tmp_path / "out") is not None
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and not list((tmp_path / "out").glob("*.html"))
    assert not list((tmp_path / "out").glob(".*"))


def test_an_unfinished_page_never_takes_the_place_of_the_old_one(smaller: Path, monkeypatch) -> None:
    before = (smaller / "report.html").read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(PyPruneError, match=r"output .*report.html': cannot be written: No space left"):
        pyprune.write_report(smaller)
    assert (smaller / "report.html").read_bytes() == before
    assert not list(smaller.glob(".*"))


def test_the_verb_makes_the_same_page_again(smaller: Path, call) -> None:
    before = (smaller / "report.html").read_bytes()
    (smaller / "report.html").unlink()
    ended = call("report", smaller, "--json")
    assert ended.status == 0 and json.loads(ended.out) == {"output": str(smaller / "report.html")}
    assert (smaller / "report.html").read_bytes() == before


def test_without_the_summary_the_plan_gives_the_widths(smaller: Path) -> None:
    (smaller / "pyprune_importance.json").unlink()
    page = read_page(pyprune.write_report(smaller))
    assert "FFN channels" in page.texts["widths"] and "importance" not in page.texts


def test_evaluations_join_in_the_columns_of_their_models(smaller: Path, tmp_path: Path, place: Path) -> None:
    result = evaluation(str(smaller), compare=evaluation(str(place / "model"), model_class="X"))
    (smaller / "pyprune_eval.json").write_text(json.dumps(result))
    (smaller / "other.json").write_text("[1, 2")
    page = read_page(pyprune.write_report(smaller))
    assert columns(page) == ["dense", "pruned"]
    assert page.texts["quality"].count("62.5 ± 3.4 %") == 2
    given = pyprune.write_report(smaller, evaluations=[evaluation("third/model")], output=tmp_path / "more.html")
    assert columns(read_page(given)) == ["dense", "pruned", "model"]


def test_a_folder_that_was_renamed_keeps_the_evaluations_in_it(smaller: Path) -> None:
    (smaller / "pyprune_eval-tasks.json").write_text(json.dumps(evaluation("former-name")))
    page = read_page(pyprune.write_report(smaller))
    assert columns(page) == ["dense", "pruned"] and "62.5 ± 3.4 %" in page.texts["quality"]


def test_generations_open_the_models_for_answers_that_are_missing(smaller: Path, place: Path, call, tmp_path) -> None:
    (tmp_path / "p.txt").write_text("Hello there\n")
    asked = ("--prompts", tmp_path / "p.txt", "--max_new_tokens", "4", "--output", tmp_path / "said.html")
    ended = call("report", smaller, "--dense", place / "model", *asked, "-q")
    assert ended.status == 0, ended.err
    said = read_page(tmp_path / "said.html").texts["samples"]
    assert "Hello there" in said and DEFAULT_PROMPTS[0] in said
    assert said[said.index("Hello there") :].split("dense")[1].split("pruned")[1].strip()


def test_recover_writes_the_page_of_all_three_models(place: Path, tmp_path: Path, call) -> None:
    out = tmp_path / "recovered"
    ended = call(
        "recover", place / "smaller", "--data", place / "train.txt", "--cutoff", 32, "--max_tokens", "2k",
        "--lora_r", 2, "--eval_text", place / "train.txt", "--eval_length", 64, "--eval_windows", 2,
        "--max_new_tokens", 6, "--output_dir", out, "-q",
    )  # fmt: skip
    assert ended.status == 0, ended.err
    page = read_page(out / "report.html")
    assert page.unbalanced == [] and page.outside() == []
    assert columns(page) == ["dense", "pruned", "recovered"]
    assert "pruned by 20" in page.texts[""] and "and recovered" in page.texts[""]
    assert "LoRA of rank 2" in page.texts["recovery"] and "Scores by wanda" in page.texts["importance"]
    assert page.texts["samples"].count("recovered") >= 2 and DEFAULT_PROMPTS[1] in page.texts["samples"]
    assert "recover: train" in page.texts["stages"] and "pyprune recover" in page.texts["repeat"]
    joined = call("report", place / "smaller", "--recovered", out, "--output", tmp_path / "joined.html")
    assert joined.status == 0, joined.err
    assert columns(read_page(tmp_path / "joined.html")) == ["dense", "pruned", "recovered"]
    (out / "pyprune_eval.json").write_text(json.dumps(evaluation(str(out))))
    shown = read_page(pyprune.write_report(place / "smaller", recovered=out, output=tmp_path / "again.html"))
    assert "62.5 ± 3.4 %" in shown.texts["quality"]


def test_a_model_that_was_never_pruned_has_two_columns_after_recovery(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "recovered"
    pyprune.recover(
        place / "model", data=place / "train.txt", cutoff=32, max_tokens="1k", lora_r=2, output_dir=out,
        eval_text=place / "train.txt", **MEASURED,
    )  # fmt: skip
    page = read_page(out / "report.html")
    assert columns(page) == ["dense", "recovered"] and "widths" not in page.texts


def test_streamed_pruning_writes_the_page_too(place: Path, tmp_path: Path) -> None:
    pyprune.prune(place / "model", stream=True, ratio=0.2, criterion="l2", output_dir=tmp_path / "out")
    page = read_page(tmp_path / "out" / "report.html")
    assert "Scores by l2" in page.texts["importance"] and "samples" not in page.texts
    with pytest.raises(PyPruneError, match=r"generations 2: does not go with stream"):
        pyprune.prune(place / "model", stream=True, ratio=0.2, criterion="l2", generations=2, output_dir=tmp_path / "b")


def test_a_calibration_given_as_an_object_is_said_to_be_missing_from_the_command(tmp_path: Path) -> None:
    ids = torch.arange(64).reshape(2, 32)
    pyprune.prune(tiny_llama(), ratio=0.2, criterion="wanda", calibration=ids, output_dir=tmp_path / "out")
    assert "given as an object" in read_page(tmp_path / "out" / "report.html").texts["done"]


def test_markup_in_a_generation_is_shown_as_text(smaller: Path) -> None:
    file = smaller / "pyprune_report.json"
    report = json.loads(file.read_text())
    report["samples"][0]["after"] = "<script>alert(1)</script>"
    file.write_text(json.dumps(report))
    page = read_page(pyprune.write_report(smaller))
    assert not page.named("script") and "<script>alert(1)</script>" in page.texts["samples"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("absent",), "model_name_or_path 'absent': is not a folder"),
        (("empty",), "model_name_or_path 'empty': has no pyprune_report.json"),
        ((), "model_name_or_path: no folder is given"),
        (("smaller", "--eval", "absent.json"), "--eval 'absent.json': does not exist"),
        (("smaller", "--eval", "list.json"), "--eval 'list.json': is not what `pyprune eval --output` writes"),
        (("smaller", "--recovered", "smaller"), "--recovered 'smaller': is no result of `pyprune recover`"),
        (("smaller", "--recovered", "absent"), "--recovered 'absent': is not a folder"),
        (("smaller", "--output", "list.json"), "--output 'list.json': exists already"),
        (("smaller", "--output", "empty"), "--output 'empty': is a folder"),
        (("smaller", "--output", "a/b.html"), "--output 'a/b.html': cannot be made in"),
        (("smaller", "--generations", "9"), "--generations 9: there are 5 prompts"),
        (("smaller", "--generations", "4", "--dense", "a/b/c"), "--dense 'a/b/c': does not exist"),
    ],
)
def test_mistakes_end_in_one_line_that_names_the_option(smaller: Path, call, monkeypatch, arguments, message) -> None:
    monkeypatch.chdir(smaller.parent)
    Path("empty").mkdir()
    Path("list.json").write_text("[]")
    before = (smaller / "report.html").stat().st_mtime_ns
    ended = call("report", *arguments)
    assert ended.status == 2 and ended.out == ""
    assert message in ended.err and ended.err.count("\n") == 1
    assert (smaller / "report.html").stat().st_mtime_ns == before


def test_an_output_is_replaced_when_asked(smaller: Path, tmp_path: Path) -> None:
    (tmp_path / "x.html").write_text("old")
    assert pyprune.write_report(smaller, output=tmp_path / "x.html", overwrite=True) == tmp_path / "x.html"
    assert (tmp_path / "x.html").read_text().startswith("<!doctype html>")


def test_a_recipe_file_with_a_list_of_prompts_serves_the_verb(smaller: Path, call, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({"prompts": ["From the recipe"], "max_new_tokens": 2}))
    assert call("report", smaller, "--config", recipe, "-q").status == 0
    assert "From the recipe" in read_page(smaller / "report.html").texts["samples"]
