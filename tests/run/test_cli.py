"""``pyprune run``: what it prints, and what it refuses before anything runs."""

from __future__ import annotations

import json
import shutil

import pytest

from pyprune.runs.recipe import read_recipe
from pyprune.runs.stages import Prune


def test_a_dry_run_says_why_and_writes_nothing(call, place) -> None:
    ended = call("run", "run.yaml", "--dry_run")
    assert ended.status == 0, ended.err
    assert ended.out.count("would run") == 5 and "new" in ended.out
    assert not (place / "work").exists()


def test_a_dry_run_in_a_work_folder_leaves_it_as_it_is(call, finished) -> None:
    before = finished.times()
    finished.recipe["eval"]["eval_windows"] = 1
    finished.write()
    ended = call("run", "run.yaml", "--dry_run", "--json")
    found = {s["name"]: (s["action"], s["why"], s["ran"]) for s in json.loads(ended.out)["stages"]}
    assert found["eval"] == ("run", "option eval_windows: 2 -> 1", False)
    assert found["recover"] == ("up to date", "nothing changed", False)
    assert found["report"] == ("run", "eval runs again", False)
    assert finished.times() == before


def test_the_table_at_the_end_has_a_row_for_each_stage_with_its_result(call, finished) -> None:
    ended = call("run", "run.yaml", "--force", "report")
    assert ended.status == 0 and ended.err == "report: --force report\n"
    for part in (
        "up to date",
        "ran",
        "nothing changed",
        "parameters",
        "perplexity: dense",
        "report.html",
        "work folder: ",
    ):
        assert part in ended.out, part
    results = {s["name"]: s["result"] for s in json.loads(call("run", "run.yaml", "--json").out)["stages"]}
    assert " -> " in results["prune"] and " parameters (-" in results["prune"]
    assert "steps, validation perplexity " in results["recover"]
    assert results["eval"].startswith("perplexity: dense ") and ", recovered " in results["eval"]
    assert results["export"].startswith("uniform, ") and results["report"].endswith(" kB")


def test_quiet_leaves_the_table_alone(call, finished) -> None:
    ended = call("run", "run.yaml", "--force", "report", "-q")
    assert ended.err == "" and "up to date" in ended.out


def test_model_and_work_folder_may_be_given(call, place) -> None:
    shutil.move(place / "model", place / "elsewhere")
    ended = call("run", "run.yaml", "--model", "elsewhere", "--output_dir", "there", "--until", "prune", "--json")
    assert ended.status == 0, ended.err
    assert (place / "there/pruned/model.safetensors").exists() and not (place / "work").exists()


@pytest.mark.parametrize(
    ("section", "options", "said"),
    [
        ("prune", {"criterion": "l3"}, "--criterion 'l3': is not known."),
        ("prune", {"allocation": "uniforn"}, "--allocation 'uniforn': is not known. Did you mean 'uniform'?"),
        ("prune", {"criterion": "param_first"}, "--calibration: is missing, and criterion param_first"),
        (
            "prune",
            {"profile": "gguf"},
            "--profile 'gguf': is a form that the stages recover, eval, export do not go on",
        ),
        ("prune", {"allocation": "global"}, "--allocation 'global': gives layers different widths, which profile uni"),
        ("recover", {"data": "absent.txt"}, "--data 'absent.txt': does not exist."),
        ("recover", {"teacher": "./absent"}, "--teacher './absent': does not exist."),
        ("recover", {"data": None}, "--data: there is nothing to learn from."),
        ("eval", {"eval_text": None}, "--eval_text: there is nothing to measure on."),
        ("eval", {"eval_text": "absent.txt"}, "--eval_text 'absent.txt': does not exist."),
        ("eval", {"tasks": "absent.jsonl"}, "absent.jsonl"),
        ("export", {"profile": "gguf", "output": "x.bin"}, "--output"),
        ("report", {"eval": "absent.json"}, "--eval 'absent.json': does not exist."),
        ("report", {"prompts": "absent.txt"}, "--prompts 'absent.txt': cannot be read"),
        ("recover", {"prompts": "absent.txt"}, "--prompts 'absent.txt': cannot be read"),
        ("recover", {"checkpoint_dir": "test.txt"}, "test.txt': cannot be made: there is a file in its place."),
        ("prune", {"device": "cuda:77"}, "--device 'cuda:77'"),
        ("recover", {"device": "cuda:77"}, "--device 'cuda:77'"),
        ("eval", {"device": "cuda:77"}, "--device 'cuda:77'"),
        ("report", {"device": "cuda:77"}, "--device 'cuda:77'"),
        ("eval", {"eval_length": 256}, "--eval_length 256: is more than the 128 positions that the model knows."),
        ("recover", {"eval_text": "test.txt", "eval_length": 256}, "--eval_length 256: is more than the 128 posit"),
        ("prune", {"stream": True, "prompt": "Once"}, "--prompt 'Once': does not go with stream."),
        ("eval", {"eval_windows": "many"}, "--eval_windows 'many': must be a whole number, at least 1."),
    ],
)
def test_a_mistake_in_any_stage_is_told_before_the_first_one_runs(call, place, section, options, said) -> None:
    place.recipe[section] = {**(place.recipe[section] or {}), **options}
    place.write()
    ended = call("run", "run.yaml")
    assert ended.status == 2 and ended.out == ""
    assert said in ended.err
    assert f"(Stage {section} of run.yaml.)" in ended.err or f"section {section} of run.yaml" in ended.err
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1
    assert not (place / "work").exists()


def test_the_cut_keeps_to_widths_that_the_export_holds(call, place) -> None:
    place.recipe["export"] = {"profile": "hetero-decilm"}
    place.recipe = {k: place.recipe[k] for k in ("model", "output_dir", "prune", "export")}
    place.write()
    ended = call("run", "run.yaml", "--until", "prune")
    assert ended.status == 2 and "256" in ended.err  # 48 channels have no multiple of 256 below them
    place.recipe["export"] = {"profile": "uniform"}
    place.write()
    assert call("run", "run.yaml", "--until", "prune").status == 0


def test_a_profile_that_no_longer_fits_is_told_with_its_stage(call, finished) -> None:
    finished.recipe["prune"]["allocation"] = "global"
    finished.write()
    ended = call("run", "run.yaml", "--dry_run")
    assert ended.status == 2 and "which profile uniform does not hold" in ended.err
    assert ended.err.count("(Stage prune of run.yaml.)") == 1


def test_a_ratio_alone_is_settled_for_a_profile_of_even_layers(place) -> None:
    place.recipe = {**{k: place.recipe[k] for k in ("model", "output_dir")}, "export": {},
                    "prune": {"ratio": 0.2, "calibration": "train.txt"}}  # fmt: skip
    assert place.would() == ["prune", "export"]
    options = Prune(read_recipe("run.yaml")).options()
    assert (options["method"], options["allocation"]) == ("best", "uniform")


def test_a_tokenizer_that_the_export_cannot_hold_is_told_before_the_cut(call, place) -> None:
    pytest.importorskip("gguf")
    place.recipe["export"] = {"profile": "gguf"}
    place.write()
    ended = call("run", "run.yaml")
    assert ended.status == 2 and "has no counterpart in llama.cpp" in ended.err
    assert not (place / "work").exists()


def test_a_gguf_file_lies_in_the_work_folder_or_where_output_says(call, place) -> None:
    pytest.importorskip("gguf")
    for file in [*(place / "model").glob("*token*"), place / "model/chat_template.jinja"]:
        file.unlink()  # llama.cpp has no counterpart of a tokenizer of bytes
    place.recipe = {**{k: place.recipe[k] for k in ("model", "output_dir")}, "export": {"profile": "gguf"}}
    for output in (None, "mine.gguf"):
        place.recipe["export"]["output"] = output
        place.write()
        assert call("run", "run.yaml").status == 0
        file = place / (output or "work/model.gguf")
        assert file.read_bytes()[:4] == b"GGUF"
        assert "up to date" in call("run", "run.yaml").out
        file.unlink()
        assert "output missing: " + file.name in call("run", "run.yaml", "--dry_run", "--json").out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--until", "evaluate"), "--until 'evaluate': is no stage of this recipe. It has: prune, recover"),
        (("--force", "score"), "--force 'score': is no stage of this recipe."),
        (("--model", "./absent"), "--model_name_or_path './absent': does not exist."),
    ],
)
def test_flags_that_cannot_be_met(call, place, flags, said) -> None:
    ended = call("run", "run.yaml", *flags)
    assert ended.status == 2 and said in ended.err
    assert not (place / "work").exists()


def test_what_no_run_made_is_not_replaced(call, place) -> None:
    (place / "work/pruned").mkdir(parents=True)
    for name in ("mine.txt", "config.json"):
        (place / f"work/pruned/{name}").write_text("mine")
    ended = call("run", "run.yaml")
    assert ended.status == 2 and "exists already, and no run in this work folder made it." in ended.err
    assert "--force prune" in ended.err
    assert (place / "work/pruned/mine.txt").read_text() == "mine"
    assert call("run", "run.yaml", "--until", "prune", "--force", "prune").status == 0
    assert not (place / "work/pruned/mine.txt").exists()


def test_a_damaged_record_is_an_error_and_not_a_guess(call, finished) -> None:
    (finished / "work/run.json").write_text("{")
    ended = call("run", "run.yaml")
    assert ended.status == 2 and "is no record of a run that can be read. Remove it" in ended.err


@pytest.mark.parametrize(
    "output", ["work/pruned", "work/recovered/export", "work", "work/eval", "work/report.html", ".", "model", "link"]
)
def test_an_export_into_what_the_run_reads_or_makes_is_refused_with_or_without_force(call, place, output: str) -> None:
    (place / "link").symlink_to("model")
    for file in (place / "model").iterdir():
        shutil.copy(file, place.root)  # a model's folder, which an export may replace
    place.recipe["export"]["output"] = output
    place.write()
    for force in ((), ("--force", "export")):
        ended = call("run", "run.yaml", *force)
        assert ended.status == 2 and "error: --output " in ended.err
        assert not (place / "work").exists()
    assert ", which this run reads or makes. Name another place. (Stage export of run.yaml.)" in ended.err


def test_an_export_may_lie_in_the_work_folder_under_a_name_of_its_own(place) -> None:
    place.recipe["export"]["output"] = "work/mine"
    assert "export" in place.would()


def test_an_export_over_something_else_is_refused_by_its_own_option(call, place) -> None:
    shutil.copytree(place / "model", place / "mine")
    place.recipe["export"]["output"] = "mine"
    place.write()
    ended = call("run", "run.yaml")
    assert ended.status == 2 and "error: --output " in ended.err
    assert "Name another output, or replace it with --force export." in ended.err


def test_several_processes_are_refused(call, place, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "is run by one process. Start `pyprune recover` with several" in call("run", "run.yaml").err


def test_a_report_needs_something_to_show(call, place) -> None:
    place.recipe = {k: place.recipe[k] for k in ("model", "output_dir", "eval", "report")}
    place.write()
    assert "report: shows a pruned or recovered model, and there is none." in call("run", "run.yaml").err


def test_the_page_shows_the_three_models(finished) -> None:
    page = (finished / "work/report.html").read_text()
    figures = json.loads((finished / "work/eval/recovered.json").read_text())
    for one in (figures, figures["compare"]):
        assert f"{one['perplexity']['perplexity']:.2f}" in page
