"""Recipes: one declaration of every option, read from Python, YAML and flags."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import yaml
from helpers_run import ROOT

from pyprune.config import RECIPES, EvaluationConfig, PruneConfig, RecoverConfig, ScoringConfig
from pyprune.errors import PyPruneError


def recipe_file(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    file = recipe_file(tmp_path, "ratio: 0.3\nsamples: 7\nseed: 5\n")
    recipe = PruneConfig.build({"ratio": "0.1", "samples": None}, file)
    assert (recipe.select.ratio, recipe.calibration.samples, recipe.calibration.seed) == (0.1, 7, 5)
    assert recipe.calibration.length == PruneConfig().calibration.length


def test_a_flag_that_is_false_wins_over_yaml_that_is_true(tmp_path: Path) -> None:
    file = recipe_file(tmp_path, "ratio: 0.3\noverwrite: true\n")
    assert PruneConfig.build({"overwrite": False}, file).save.overwrite is False


def test_a_flag_for_the_size_replaces_the_files_other_way_of_saying_it(tmp_path: Path) -> None:
    file = recipe_file(tmp_path, "ratio: 0.3\n")
    select = PruneConfig.build({"target_params": "5.4B"}, file).select
    assert (select.ratio, select.target_params) == (None, 5_400_000_000)


def test_ratio_and_target_params_together_are_refused() -> None:
    with pytest.raises(PyPruneError, match=r"target_params 1000: contradicts ratio 0.2"):
        PruneConfig.build({"ratio": 0.2, "target_params": 1000})


def test_null_in_yaml_is_the_default(tmp_path: Path) -> None:
    recipe = PruneConfig.build({}, recipe_file(tmp_path, "dtype: null\nratio: null\n"))
    assert recipe == PruneConfig()


@pytest.mark.parametrize("file", ["", "# only a comment\n"])
def test_an_empty_recipe_is_all_defaults(tmp_path: Path, file: str) -> None:
    assert PruneConfig.build({}, recipe_file(tmp_path, file)) == PruneConfig()


def test_the_resolved_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = PruneConfig.build({
        "model_name_or_path": "some/model", "ratio": 0.25, "layers": "4-27", "roles": "ffn,kv_heads",
        "widths": "kv_heads=0.5,ffn=128", "round_to": "ffn=64", "min_keep": 0.1, "count_embeddings": False,
        "calibration": "text: with #odd 'characters'.txt", "prompt": "Once\nupon", "eval_windows": 3,
    })  # fmt: skip
    written = yaml.safe_dump(recipe.to_dict())
    again = PruneConfig.build({}, recipe_file(tmp_path, written))
    assert again == recipe
    assert again.to_dict() == recipe.to_dict()


def test_python_yaml_and_flags_give_the_same_recipe(tmp_path: Path) -> None:
    python = PruneConfig.build({"ratio": 0.2, "layers": [0, 1, 2], "widths": {"ffn": 0.5}, "overwrite": True})
    flags = PruneConfig.build({"ratio": "0.2", "layers": "0-2", "widths": "ffn=0.5", "overwrite": True})
    text = "ratio: 0.2\nlayers: [0, 1, 2]\nwidths: {ffn: 0.5}\noverwrite: true\n"
    assert PruneConfig.build({}, recipe_file(tmp_path, text)) == python
    assert (flags.select.ratio, flags.select.widths) == (python.select.ratio, python.select.widths)


@pytest.mark.parametrize("file", sorted((ROOT / "examples").rglob("*.yaml")), ids=lambda f: f.name)
def test_the_recipes_that_come_along_are_valid(file: Path) -> None:
    if file.name.startswith("recover"):
        assert RecoverConfig.build({}, file).data.data
    else:
        assert PruneConfig.build({}, file).select.ratio is not None


def test_one_recipe_file_serves_every_verb(tmp_path: Path) -> None:
    file = recipe_file(tmp_path, "ratio: 0.2\ncriterion: l2\neval_length: 64\noutput_file: s.safetensors\n")
    assert PruneConfig.build({}, file).score.criterion == "l2"
    assert ScoringConfig.build({}, file).save.output_file == "s.safetensors"
    assert EvaluationConfig.build({}, file).evaluation.eval_length == 64


def test_an_unknown_key_is_an_error_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(PyPruneError, match=r"config .*recipe.yaml.*unknown key 'rato'\. Did you mean 'ratio'\?"):
        PruneConfig.build({}, recipe_file(tmp_path, "rato: 0.2\n"))


@pytest.mark.parametrize("section", ["prune: {ratio: 0.2}", "report: {}"])
def test_the_recipe_of_a_whole_run_is_recognised(tmp_path: Path, section: str) -> None:
    file = recipe_file(tmp_path, f"model: m\noutput_dir: o\n{section}\n")
    with pytest.raises(
        PyPruneError, match=rf"as a recipe of `pyprune run` has\. Give it to that: pyprune run {file}\."
    ):
        PruneConfig.build({}, file)


def test_an_unknown_option_from_python_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(PyPruneError, match=r"alocation: is not an option\. Did you mean 'allocation'\?"):
        PruneConfig.build({"alocation": "global"})


def test_a_bad_value_from_the_file_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(PyPruneError, match=r"ratio 1\.2: must be .* \(It stands in .*recipe\.yaml\.\)"):
        PruneConfig.build({}, recipe_file(tmp_path, "ratio: 1.2\n"))


@pytest.mark.parametrize("text", ["- ratio\n- 0.2\n", "ratio: [0.2\n", "just words\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(PyPruneError, match="config"):
        PruneConfig.build({}, recipe_file(tmp_path, text))


def test_a_missing_recipe_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PyPruneError, match=r"config .*absent\.yaml.*cannot be read: No such file"):
        PruneConfig.build({}, tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("ratio", "abc"),
        ("ratio", 1),
        ("ratio", -0.1),
        ("ratio", float("nan")),
        ("ratio", True),
        ("target_params", "many"),
        ("target_params", 0),
        ("samples", 0),
        ("samples", 2.5),
        ("samples", True),
        ("length", 1),
        ("batch_size", "x"),
        ("seed", -1),
        ("seed", 2**63),
        ("dtype", "int8"),
        ("dtype", 32),
        ("device", "gpu"),
        ("widths", "ffn"),
        ("widths", "ffn=0"),
        ("widths", "ffn=1.5"),
        ("widths", "nothing=3"),
        ("widths", {}),
        ("roles", "fnn"),
        ("roles", ""),
        ("layers", "9-3"),
        ("layers", "first"),
        ("layers", []),
        ("round_to", 0),
        ("min_keep", 0.0),
        ("iterative_steps", 0),
        ("count_embeddings", "perhaps"),
        ("max_shard_size", "huge"),
        ("model_name_or_path", ""),
        ("prompt", 3),
    ],
)
def test_a_bad_value_names_its_option(option: str, value: object) -> None:
    with pytest.raises(PyPruneError) as caught:
        PruneConfig.build({option: value})
    assert caught.value.option == option
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("option", ["widths", "round_to", "min_keep"])
def test_a_role_that_is_given_twice_is_refused(option: str) -> None:
    with pytest.raises(PyPruneError, match=rf"{option} 'ffn=64, ffn =32': names ffn twice"):
        PruneConfig.build({option: "ffn=64, ffn =32"})


def test_every_option_has_help_and_a_default_that_its_own_parser_accepts() -> None:
    for recipe in RECIPES:
        for _, f in recipe.options():
            assert f.metadata["help"].endswith("."), f.name
            assert f.default is not MISSING
            if f.default is not None:
                assert f.metadata["parse"](f.name, f.default) == f.default


def test_an_option_name_means_one_thing() -> None:
    meanings: dict[str, set[str]] = {}
    for recipe in RECIPES:
        names = [f.name for _, f in recipe.options()]
        assert len(names) == len(set(names)), f"{recipe.__name__} has one name twice"
        for _, f in recipe.options():
            meanings.setdefault(f.name, set()).add(f.metadata["help"])
    assert {name for name, helps in meanings.items() if len(helps) > 1} == set()


def test_defaults_of_select_are_those_of_the_function() -> None:
    from pyprune.selection import select

    parameters = inspect.signature(select).parameters
    for f in fields(PruneConfig().select):
        if f.name in parameters:
            assert f.default == parameters[f.name].default, f.name


def test_options_offer_the_names_that_the_stages_know() -> None:
    """They are written twice, so that help does not import what needs PyTorch."""
    from pyprune.compensation import checks
    from pyprune.importance import depth, walk
    from pyprune.selection import layers, quantities

    offered = {f.name: f.metadata["parse"].choices for stage in PruneConfig.stages().values() for f in fields(stage)}
    known = {
        "token_weights": walk.TOKEN_WEIGHTS, "compensation": checks.MODES, "compensation_target": checks.TARGETS,
        "compensation_scope": checks.SCOPES, "layer_criterion": depth.LAYER_CRITERIA, "layer_part": layers.PARTS,
        "budget": quantities.BUDGETS,
    }  # fmt: skip
    for name, names in known.items():
        assert set(offered[name]) == set(names), name
