"""Recipes of whole runs: what is read, and what is refused with the way out."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from helpers_run import ROOT

from pyprune.config import STAGES, ReportingConfig
from pyprune.errors import PyPruneError
from pyprune.runs.recipe import OURS, SECTIONS, read_recipe

SMALL = {"model": "some/model", "output_dir": "work", "prune": {"ratio": 0.2}}


def written(tmp_path: Path, data) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(data if isinstance(data, str) else yaml.safe_dump(data, sort_keys=False))
    return file


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda f: f.name)
def test_the_recipes_that_come_along_are_valid(file: Path) -> None:
    recipe = read_recipe(file)
    assert list(recipe.sections) == list(SECTIONS)
    assert recipe.sections["prune"].select.ratio == 0.2
    again = yaml.safe_dump(recipe.to_dict())
    assert yaml.safe_load(again)["recover"]["data"]


def test_there_is_a_recipe_for_a_large_llama_and_one_for_the_demo() -> None:
    assert {f.name for f in (ROOT / "recipes").glob("*.yaml")} >= {"llama-20.yaml", "smollm2-20.yaml"}


def test_a_work_folder_within_the_model_is_refused(tmp_path) -> None:
    inside = {**SMALL, "model": str(tmp_path), "output_dir": str(tmp_path / "work")}
    with pytest.raises(PyPruneError, match="within the model, which would then be another one with every run"):
        read_recipe(written(tmp_path, inside))


def test_the_resolved_recipe_reads_back_equal(tmp_path) -> None:
    recipe = read_recipe(ROOT / "recipes" / "llama-20.yaml")
    again = read_recipe(written(tmp_path, recipe.to_dict()))
    assert again.sections == recipe.sections and again.to_dict() == recipe.to_dict()


def test_sections_hold_the_options_of_their_verbs(tmp_path) -> None:
    from pyprune.config import EvaluationConfig, ExportingConfig, PruneConfig, RecoverConfig

    assert SECTIONS == {
        "prune": PruneConfig, "recover": RecoverConfig, "eval": EvaluationConfig, "export": ExportingConfig,
        "report": ReportingConfig,
    }  # fmt: skip
    for name, recipe in SECTIONS.items():
        assert set(OURS[name]) <= {f.name for _, f in recipe.options()}
    recipe = read_recipe(
        written(tmp_path, {**SMALL, "prune": {"ratio": "0.25", "layers": "4-27", "round_to": "ffn=64"}})
    )
    alone = PruneConfig.build({"ratio": "0.25", "layers": "4-27", "round_to": "ffn=64"})
    assert recipe.sections["prune"] == alone


def test_options_of_the_model_section_reach_every_stage_and_yield_to_its_own(tmp_path) -> None:
    model = {"model_name_or_path": "some/model", "dtype": "bfloat16", "trust_remote_code": True}
    file = written(tmp_path, {**SMALL, "model": model, "eval": {"dtype": "float32", "prompt": "x"}, "export": None})
    found = read_recipe(file).sections
    assert [found[s].model.dtype for s in ("prune", "eval")] == ["bfloat16", "float32"]
    assert found["export"].export.dtype == "auto"  # of the file that is written, not of what is read
    assert all(found[s].model.trust_remote_code for s in found)


def test_model_and_work_folder_of_the_command_line_win(tmp_path) -> None:
    recipe = read_recipe(written(tmp_path, SMALL), model="other", output_dir=tmp_path / "there")
    assert (recipe.model, recipe.output_dir) == ("other", tmp_path / "there")


def test_stages_run_in_their_own_order_whatever_the_file_says(tmp_path) -> None:
    file = written(tmp_path, {"export": None, "prune": {"ratio": 0.1}, "output_dir": "o", "model": "m"})
    assert list(read_recipe(file).sections) == ["prune", "export"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prunee": {}}, "has the unknown section 'prunee'. Did you mean 'prune'?"),
        ({"prune": {"rato": 0.2}}, "has the unknown key 'rato' in section prune. Did you mean 'ratio'?"),
        ({"eval": {"ratio": 0.2}}, "has the unknown key 'ratio' in section eval."),
        ({"model": {"name": "x"}}, "has the unknown key 'name' in section model."),
        ({"model": {"model_name_or_path": "x", "dtype": "int8"}}, "dtype 'int8': is not known."),
        ({"model": None}, "names no model. Write 'model: FOLDER', or give --model."),
        ({"model": ["x"]}, "names no model in section model."),
        ({"output_dir": None}, "says not where to work."),
        ({"prune": {"ratio": 1.5}}, "ratio 1.5: must be"),
        ({"prune": {"ratio": 1.5}}, "(It stands in section prune of "),
        ({"prune": {"ratio": 0.2, "target_params": "5B"}}, "target_params 5000000000: contradicts ratio 0.2."),
        ({"prune": [1]}, "has no options in section prune."),
        ({"prune": {"output_dir": "x"}}, "sets output_dir in section prune, which the run sets itself. Leave it out"),
        ({"recover": {"resume": True}}, "sets resume in section recover, which the run sets itself."),
        ({"eval": {"compare": "x"}}, "sets compare in section eval, which the run sets itself."),
    ],
)
def test_mistakes_name_the_section_the_key_and_the_way_out(tmp_path, change: dict, said: str) -> None:
    with pytest.raises(PyPruneError) as caught:
        read_recipe(written(tmp_path, {**SMALL, **change}))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_recipe_of_one_verb_is_recognised(tmp_path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("model_name_or_path: m\nratio: 0.2\nreport: true\noutput_dir: o\n")
    said = rf"is a recipe of one verb: 'model_name_or_path' is no section\. .* pyprune VERB --config {file}\."
    with pytest.raises(PyPruneError, match=said):
        read_recipe(file)


def test_an_option_beside_sections_is_an_unknown_section(tmp_path) -> None:
    with pytest.raises(PyPruneError, match="has the unknown section 'ratio'"):
        read_recipe(written(tmp_path, {**SMALL, "ratio": 0.2}))


def test_the_sections_are_those_that_verbs_tell_such_a_file_by() -> None:
    assert tuple(SECTIONS) == STAGES


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- prune\n", "holds no sections"),
        ("", "holds no sections"),
        ("model: m\noutput_dir: o\nprune: {ratio: 0.1}\nprune: {ratio: 0.2}\n", "'prune' stands twice"),
        ("model: m\noutput_dir: o\nprune: {ratio: 0.1, ratio: 0.2}\n", "'ratio' stands twice"),
        ("prune: [0.2\n", "is not YAML"),
        ("model: m\noutput_dir: o\n", "has no stage. Sections: prune, recover, eval, export, report."),
    ],
)
def test_files_that_are_no_recipe(tmp_path, text: str, said: str) -> None:
    with pytest.raises(PyPruneError, match=r"^RECIPE ") as caught:
        read_recipe(written(tmp_path, text))
    assert said in str(caught.value)


def test_a_recipe_that_is_not_there(tmp_path) -> None:
    with pytest.raises(PyPruneError, match="cannot be read: No such file or directory"):
        read_recipe(tmp_path / "absent.yaml")
