"""A stage runs when something that decides its result has changed, and otherwise not."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from safetensors.torch import load_file, save_file

ALL = ["prune", "recover", "eval", "export", "report"]


def ran(outcome: dict[str, str]) -> list[str]:
    return [name for name, action in outcome.items() if action in ("run", "go on")]


def test_the_first_run_does_all_and_the_second_none(place) -> None:
    assert ran(place.go()) == ALL
    before = place.times()
    for name in ("pruned/model.safetensors", "recovered/model.safetensors", "eval/pruned.json", "eval/recovered.json",
                 "exported/model.safetensors", "report.html", "run.json"):  # fmt: skip
        assert f"work/{name}" in before
    assert ran(place.go()) == []
    assert place.times() == before


def test_eval_measures_the_dense_the_pruned_and_the_recovered_model(finished) -> None:
    found = {n: json.loads((finished / f"work/eval/{n}.json").read_text()) for n in ("pruned", "recovered")}
    dense = [f["compare"]["perplexity"]["perplexity"] for f in found.values()]
    assert dense[0] == dense[1]
    import pyprune

    for name, figures in found.items():
        folder = str(finished / "work" / name)
        alone = pyprune.evaluate(folder, compare="model", eval_text="test.txt", eval_length=64, eval_windows=2)
        assert figures["perplexity"] == alone["perplexity"] and figures["ratios"] == alone["ratios"]
        assert figures["recipe"]["model_name_or_path"].endswith(f"work/{name}")
        assert {**figures["recipe"], "model_name_or_path": folder} == alone["recipe"]


def test_the_export_is_of_the_recovered_model(finished) -> None:
    one, other = (load_file(finished / f"work/{n}/model.safetensors") for n in ("recovered", "exported"))
    assert all((one[k].half() == other[k]).all() for k in one)


@pytest.mark.parametrize(
    ("section", "option", "value", "expected"),
    [
        ("recover", "lora_r", 3, ALL[1:]),
        ("eval", "eval_windows", 1, ["eval", "report"]),
        ("export", "dtype", "float32", ["export"]),
    ],
)
def test_a_changed_option_runs_its_stage_and_those_that_read_from_it(
    finished, section: str, option: str, value, expected: list[str]
) -> None:
    finished.recipe[section][option] = value
    assert f"option {option}: " in finished.why()[section]
    before = finished.times()
    assert ran(finished.go()) == expected
    changed = {n.split("/")[1] for n, t in finished.times().items() if before.get(n) != t} - {"run.json"}
    folders = {"prune": "pruned", "recover": "recovered", "eval": "eval", "export": "exported", "report": "report.html"}
    assert changed == {folders[s] for s in expected}
    assert finished.would() == []


def test_an_export_profile_of_other_widths_cuts_anew(finished) -> None:
    finished.recipe["export"]["profile"] = "hetero-decilm"
    assert finished.why()["prune"] == 'option roles: null -> ["ffn"]'
    assert finished.would() == ALL


def test_an_export_profile_that_holds_the_widths_that_are_there_only_exports(finished) -> None:
    finished.recipe["export"]["profile"] = "hetero-hf"
    assert finished.would() == ["export"]


def test_another_ratio_runs_everything(finished) -> None:
    finished.recipe["prune"]["ratio"] = 0.3
    assert finished.would() == ALL
    assert finished.why()["prune"] == "option ratio: 0.2 -> 0.3"


def test_saying_a_default_aloud_changes_nothing(finished) -> None:
    finished.recipe["prune"]["seed"] = 0
    assert finished.would() == []


def test_one_changed_weight_runs_everything_again(finished) -> None:
    file = finished / "model/model.safetensors"
    weights, stat = load_file(file), file.stat()
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, file, metadata={"format": "pt"})
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as some copying tools do
    assert file.stat().st_size == stat.st_size
    assert finished.why()["prune"] == "input model: model.safetensors changed"
    assert finished.would() == ALL


def test_touching_a_file_without_changing_it_runs_nothing(finished) -> None:
    os.utime(finished / "model/model.safetensors")
    os.utime(finished / "train.txt")
    assert finished.would() == []


def test_a_changed_text_runs_the_stages_that_read_it(finished) -> None:
    with (finished / "test.txt").open("a") as file:
        file.write("More of it.")
    assert finished.why()["eval"] == "input eval_text test.txt: changed"
    assert finished.would() == ["eval", "report"]


@pytest.mark.parametrize(
    ("gone", "expected"), [("exported", ["export"]), ("eval/pruned.json", ["eval", "report"]), ("pruned", ALL)]
)
def test_a_deleted_output_is_made_again(finished, gone: str, expected: list[str]) -> None:
    path = finished / "work" / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    stage = expected[0]
    assert finished.why()[stage] == f"output missing: {path.name}"
    assert finished.would() == expected
    finished.go(until=stage)
    assert path.exists()


def test_a_damaged_output_is_made_again(finished) -> None:
    file = finished / "work/recovered/model.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert finished.why()["recover"] == "output recovered: model.safetensors changed"
    assert ran(finished.go()) == ALL[1:]
    assert file.read_bytes() == good


def test_notes_beside_an_output_change_nothing(finished) -> None:
    (finished / "work/pruned/README.md").write_text("Mine.")
    (finished / "work/pruned/pyprune_eval.json").write_text("{}")
    assert finished.would() == []


def test_another_chat_template_counts_as_another_model(finished) -> None:
    (finished / "model/chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert finished.why()["prune"] == "input model: chat_template.jinja changed"


def test_another_version_of_pyprune_runs_everything(finished, monkeypatch) -> None:
    import pyprune

    monkeypatch.setitem(vars(pyprune), "__version__", "99.0")
    why = finished.why()
    assert why["prune"].endswith("-> 99.0") and why["report"] == "prune, recover, eval run again"


def test_a_stage_that_leaves_the_recipe_is_left_and_what_read_from_it_runs(finished) -> None:
    del finished.recipe["recover"]
    before = (finished / "work/recovered/model.safetensors").stat().st_mtime_ns
    assert finished.go() == {"prune": "up to date", "eval": "run", "export": "run", "report": "run"}
    assert (finished / "work/recovered/model.safetensors").stat().st_mtime_ns == before


def test_the_work_folder_may_move(finished) -> None:
    os.rename(finished / "work", finished / "elsewhere")
    finished.recipe["output_dir"] = "elsewhere"
    assert finished.would() == []


def test_a_stage_may_stand_alone(place) -> None:
    place.recipe = {k: place.recipe[k] for k in ("model", "output_dir", "eval")}
    assert place.go() == {"eval": "run"}
    assert [p.name for p in (place / "work/eval").glob("*.json")] == ["dense.json"]
    assert place.go() == {"eval": "up to date"}


def test_force_runs_a_stage_and_those_behind_it(finished) -> None:
    assert finished.why(force=["recover"])["recover"] == "--force recover"
    assert finished.would(force=["recover"]) == ALL[1:]
    before = finished.times()
    assert ran(finished.go(force=["export"])) == ["export"]
    assert before["work/exported/model.safetensors"] != finished.times()["work/exported/model.safetensors"]


def test_until_leaves_the_later_ones(place) -> None:
    assert place.go(until="prune") == {"prune": "run", **dict.fromkeys(ALL[1:], "left out")}
    assert not (place / "work/recovered").exists()
    assert place.would() == ALL[1:]


def test_a_file_is_read_once_while_it_stays_as_it_is(finished, monkeypatch) -> None:
    from pyprune.runs import identity

    monkeypatch.setattr(identity, "_SETTLED", 0)  # all of it was written just now
    assert ran(finished.go()) == []
    hashes = identity.Hashes(finished / "work/.hashes.json")
    first = hashes.of(finished / "model")
    assert hashes.read == 0
    assert first == identity.Hashes().of(finished / "model")


def test_a_file_of_the_last_moment_is_not_remembered(tmp_path) -> None:
    from pyprune.runs.identity import Hashes

    file = tmp_path / "x.txt"
    file.write_text("one")
    hashes = Hashes()
    one = hashes.file(file)
    stat = file.stat()
    file.write_text("two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert hashes.file(file) != one and hashes.read == 2


def test_a_perplexity_that_overflows_is_told_as_such() -> None:
    from pyprune.runs.stages import _perplexities, evaluation_line

    none = {"tasks": None, "speed": None}
    figures = [
        ("dense", {"perplexity": {"perplexity": 7.5}, **none}),
        ("pruned", {"perplexity": {"perplexity": None}, **none}),
    ]
    assert evaluation_line(figures) == "perplexity: dense 7.50, pruned overflow"
    assert (
        _perplexities({"before": {"perplexity": 7.5}, "after": {"perplexity": None}}) == "; perplexity 7.50 -> overflow"
    )
