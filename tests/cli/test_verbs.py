"""The verbs end to end on a tiny model."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from helpers_fresh import run_fresh
from helpers_run import refused, tiny_llama
from helpers_tasks import trained_tokenizer
from transformers import AutoModelForCausalLM

import pyprune

WHOLE = ("prune", "model", "--calibration", "train.txt", "--samples", "4", "--length", "64")
QUICK = {"compensation_scope": "outputs", "compensation_gains": False}  # a quarter of the time
PRUNE = (*WHOLE, "--compensation_scope", "outputs", "--no_compensation_gains")


@pytest.mark.parametrize("ratio", ["0.1", "0.2", "0.3", "0.5"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_the_achieved_ratio_is_the_one_asked_for(call, place, ratio: str, allocation: str) -> None:
    ended = call(*PRUNE, "--ratio", ratio, "--allocation", allocation, "--json")
    assert ended.status == 0, ended.err
    counts = json.loads(ended.out)["parameters"]["with_embeddings"]
    assert counts["ratio"] == pytest.approx(float(ratio), abs=0.005)
    assert counts["ratio"] == pytest.approx(1 - counts["after"] / counts["before"])


@pytest.mark.parametrize("where", [(), ("--stream", "--output_dir", "out")], ids=["memory", "stream"])
def test_samples_begin_with_a_bos_token_where_that_is_asked(call, place, where: tuple[str, ...]) -> None:
    pyprune.save(tiny_llama(vocab_size=400), trained_tokenizer(bos=True), place / "begun")
    line = ("prune", "begun", *PRUNE[2:], "--ratio", "0.2", "--criterion", "param_first", "--json", *where)
    for more, prefix in (((), 0), (("--bos", "--overwrite"), 1)):
        ended = call(*line, *more)
        assert ended.status == 0, ended.err
        told = json.loads(ended.out)["scores"]["calibration"]
        assert (told["prefix"], told["length"]) == (prefix, 64)


def test_the_pruned_folder_opens_in_stock_transformers_with_the_same_logits(call, place) -> None:
    ended = call(*PRUNE, "--ratio", "0.3", "--profile", "uniform", "--output_dir", "out")
    assert ended.status == 0, ended.err
    assert "saved in" in ended.out
    script = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "m = AutoModelForCausalLM.from_pretrained('out'); t = AutoTokenizer.from_pretrained('out')\n"
        "ids = t('for statement in text', return_tensors='pt').input_ids\n"
        "torch.save((ids, m(ids).logits.detach(), m.num_parameters()), 'logits.pt')\n"
        "assert not any(name.startswith('pyprune') for name in sys.modules)"
    )
    opened = run_fresh(script, cwd=place.root)
    assert opened.status == 0, opened.err
    ids, logits, parameters = torch.load(place / "logits.pt")

    from pyprune import prune

    text = str(place / "train.txt")
    kept = prune(place / "model", ratio=0.3, profile="uniform", calibration=text, samples=4, length=64, **QUICK)
    with torch.no_grad():
        assert torch.equal(kept.model(ids).logits, logits)
    report = json.loads((place / "out" / "pyprune_report.json").read_text())
    assert report["parameters"]["with_embeddings"]["after"] == parameters


def test_the_saved_recipe_repeats_the_run(call, place) -> None:
    assert call(*PRUNE, "--ratio", "0.3", "--seed", "7", "--layers", "1-3", "--output_dir", "one").status == 0
    recipe = place / "one" / "pyprune_recipe.yaml"
    assert yaml.safe_load(recipe.read_text())["layers"] == "1-3"
    assert call("prune", "--config", str(recipe), "--output_dir", "two").status == 0
    for name in ("model.safetensors", "config.json"):
        assert (place / "one" / name).read_bytes() == (place / "two" / name).read_bytes()
    plans = [json.loads((place / n / "pyprune_plan.json").read_text())["cuts"] for n in ("one", "two")]
    assert plans[0] == plans[1]


def test_flags_win_over_the_recipe(call, place) -> None:
    (place / "r.yaml").write_text("ratio: 0.1\ncriterion: l2\nmodel_name_or_path: elsewhere\n")
    ended = call("prune", "model", "--config", "r.yaml", "--ratio", "0.3", "--json")
    report = json.loads(ended.out)
    assert (report["recipe"]["ratio"], report["recipe"]["criterion"], report["model"]) == (0.3, "l2", "model")


def test_dashes_and_the_named_model_are_accepted(call, place) -> None:
    ended = call("prune", "--model-name-or-path", "model", "--ratio", "0.2", "--criterion", "l1", "--output-dir", "out")
    assert ended.status == 0, ended.err
    assert (place / "out" / "model.safetensors").exists()


def test_the_table_shows_before_and_after(call, place) -> None:
    ended = call(
        *PRUNE, "--ratio", "0.2", "--eval_text", "test.txt", "--eval_length", "64", "--eval_windows", "4",
        "--prompt", "for", "--max_new_tokens", "4", "--output_dir", "out",
    )  # fmt: skip
    assert ended.status == 0, ended.err
    for part in (
        "parameters",
        "size on disk",
        "peak memory",
        "perplexity",
        "test.txt: 4 windows of 64 tokens",
        "prompt",
    ):
        assert part in ended.out, part
    for stage in ("load", "discover", "perplexity before", "score", "apply", "perplexity after", "save"):
        assert f"│ {stage} " in ended.out, stage
    assert ended.err == ""


def test_json_of_prune_is_the_report_and_nothing_else(call, place) -> None:
    ended = call(
        *PRUNE, "--ratio", "0.2", "--eval_text", "test.txt", "--eval_length", "64", "--eval_windows", "4", "--json",
        "--output_dir", "out",
    )  # fmt: skip
    report = json.loads(ended.out)
    assert (report["format"], report["version"]) == ("pyprune-report", 1)
    assert report["perplexity"]["before"]["tokens"] == report["perplexity"]["after"]["tokens"] == 4 * 63
    assert report["scores"]["calibration"]["samples"] == 4
    assert report["weights_bytes"]["after"] == (place / "out" / "model.safetensors").stat().st_size
    assert [s["name"] for s in report["stages"]][-1] == "save"
    assert all(s["seconds"] >= 0 and s["peak_memory"] > 2**20 for s in report["stages"])
    saved = json.loads((place / "out" / "pyprune_report.json").read_text())
    assert saved["perplexity"] == report["perplexity"] and saved["recipe"] == report["recipe"]


def test_eval_of_the_pruned_folder_gives_the_reports_figure(call, place) -> None:
    protocol = ("--eval_text", "test.txt", "--eval_length", "64", "--eval_windows", "4", "--json")
    report = json.loads(call(*PRUNE, "--ratio", "0.2", *protocol, "--output_dir", "out").out)
    for folder, when in (("model", "before"), ("out", "after")):
        result = json.loads(call("eval", folder, *protocol).out)
        assert result["perplexity"] == report["perplexity"][when]
        assert result["parameters"] == report["parameters"]["with_embeddings"][when]


def test_eval_prints_figure_and_protocol(call, place) -> None:
    ended = call(
        "eval", "model", "--eval_text", "test.txt", "--eval_length", "64", "--eval_windows", "2", "--prompt", "if"
    )
    assert ended.status == 0
    assert "2 windows of 64 tokens" in ended.out and "continuation" in ended.out


def test_scores_from_a_file_give_the_same_model_as_scoring(call, place) -> None:
    options = ("--calibration", "train.txt", "--samples", "4", "--length", "64")
    ended = call("score", "model", *options, "--output_file", "s.safetensors", "--json")
    data = json.loads(ended.out)
    assert data["criterion"] == "param_first"
    assert {len(rows[0]) for name, rows in data["scores"].items() if name.endswith(":ffn")} == {192}
    assert call("prune", "model", "--scores_file", "s.safetensors", "--ratio", "0.3", "--output_dir", "one").status == 0
    assert call(*PRUNE, "--ratio", "0.3", "--method", "plain", "--output_dir", "two").status == 0
    assert (place / "one" / "model.safetensors").read_bytes() == (place / "two" / "model.safetensors").read_bytes()


def test_what_is_left_of_each_role_is_printed(call, place) -> None:
    prune = ("prune", "model", "--criterion", "l2")
    ended = call(*prune, "--widths", "ffn=160", "--output_dir", "one")
    assert "units kept: ffn 160 (criterion l2" in ended.out
    ended = call(*prune, "--ratio", "0.3", "--allocation", "global", "--roles", "ffn", "--output_dir", "two")
    widths = json.loads((place / "two/pyprune_report.json").read_text())["plan"]["widths"]["ffn"].values()
    assert f"units kept: ffn {min(widths)} to {max(widths)} (criterion l2, allocation global)" in ended.out


def test_scores_from_a_file_keep_the_name_of_their_criterion(call, place) -> None:
    ended = call("score", "model", "--criterion", "l2", "--output_file", "s.safetensors")
    assert ended.status == 0 and ended.out.endswith("saved in s.safetensors\n")
    prune = ("prune", "model", "--scores_file", "s.safetensors", "--ratio", "0.3")
    ended = call(*prune, "--criterion", "wanda", "--output_dir", "out")
    assert ended.status == 2 and not (place / "out").exists()
    assert "--criterion 'wanda': is another criterion than that of the scores in s.safetensors, l2." in ended.err
    for folder, more in (("one", ()), ("two", ("--criterion", "l2"))):
        assert call(*prune, *more, "--output_dir", folder).status == 0
        assert json.loads((place / folder / "pyprune_report.json").read_text())["recipe"]["criterion"] == "l2"


def test_score_prints_a_row_for_each_group(call, place) -> None:
    ended = call("score", "model", "--criterion", "l2", "--roles", "ffn", "--layers", "1-2")
    assert ended.status == 0
    assert "model.layers.1.mlp:ffn" in ended.out and "model.layers.2.mlp:ffn" in ended.out
    assert "layers.0" not in ended.out and "kv_heads" not in ended.out


def test_inspect_shows_groups_without_reading_weights(call, place) -> None:
    (place / "model" / "model.safetensors").unlink()
    shown = call("inspect", "model")
    assert shown.status == 0
    assert "320,544 parameters" in shown.out and "model.layers.{0-3}.mlp" in shown.out
    data = json.loads(call("inspect", "model", "--json").out)
    assert data["model_class"] == "LlamaForCausalLM"
    ffn = next(g for g in data["groups"] if g["role"] == "ffn")
    assert (ffn["units"], ffn["parameters_per_unit"], ffn["exact"]) == (192, 288, True)
    assert data["parameter_counts"]["with_embeddings"] == 320_544


def test_per_layer_widths_are_saved_and_read_back(call, place) -> None:
    protocol = ("--eval_text", "test.txt", "--eval_length", "64", "--eval_windows", "4", "--json")
    ended = call(*PRUNE, "--ratio", "0.3", "--method", "plain", "--layers", "1-2", *protocol, "--output_dir", "out")
    report = json.loads(ended.out)
    assert len(set(report["plan"]["widths"]["ffn"].values())) > 1
    found = AutoModelForCausalLM.from_pretrained(place / "out", trust_remote_code=True)
    assert found.num_parameters() == report["parameters"]["with_embeddings"]["after"]
    assert json.loads(call("eval", "out", *protocol).out)["perplexity"] == report["perplexity"]["after"]


def test_pruning_a_pruned_model_again(call, place) -> None:
    assert call("prune", "model", "--criterion", "l2", "--ratio", "0.2", "--output_dir", "one").status == 0
    ended = call("prune", "one", "--criterion", "l2", "--ratio", "0.2", "--output_dir", "two", "--json")
    counts = json.loads(ended.out)["parameters"]["with_embeddings"]
    assert counts["after"] == AutoModelForCausalLM.from_pretrained(place / "two").num_parameters()
    assert counts["after"] < 0.66 * 320_544


def test_overwrite_replaces_the_folder_and_only_then(call, place) -> None:
    (place / "out").mkdir()
    for name in ("config.json", "old"):
        (place / "out" / name).write_text("{}")
    ended = call("prune", "model", "--criterion", "l2", "--ratio", "0.2", "--output_dir", "out", "--overwrite")
    assert ended.status == 0, ended.err
    assert not (place / "out" / "old").exists() and (place / "out" / "config.json").exists()


def test_quiet_prints_the_result_only(call, place) -> None:
    ended = call("prune", "model", "--criterion", "l2", "--ratio", "0.2", "--quiet")
    assert (ended.status, ended.err) == (0, "")
    assert "parameters" in ended.out


@pytest.mark.parametrize(
    ("more", "said"),
    [((), "note: no output_dir: nothing will be saved\n"), (("-q",), ""), (("--output_dir", "out"), "")],
)
def test_that_nothing_will_be_saved_is_said_before_the_work(call, place, more, said: str) -> None:
    ended = call("prune", "model", "--ratio", "0.2", "--criterion", "l2", *more)
    assert (ended.status, ended.err) == (0, said)


def test_python_returns_the_model_and_says_nothing_of_saving(place, capfd) -> None:
    pyprune.prune(place / "model", ratio=0.2, criterion="l2")
    assert "output_dir" not in capfd.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("generations", "1"), ("prompts", "train.txt")])
def test_answers_that_nobody_would_see_are_refused_before_work(
    call, place, monkeypatch, option: str, value: str
) -> None:
    line = ("--ratio", "0.2", "--criterion", "l2", f"--{option}", value)
    with monkeypatch.context() as m:
        m.setattr("pyprune.pipeline.run", lambda *a, **k: pytest.fail("it has begun"))
        refusal = refused(call, place, "prune", "model", *line)
    assert f"--{option} " in refusal
    assert refusal.endswith(": is for the report, which lies in output_dir. Give output_dir too, or leave it out.\n")


def test_json_shows_answers_without_a_folder(call, place) -> None:
    ended = call("prune", "model", "--ratio", "0.2", "--criterion", "l2", "--generations", "1", "--json")
    assert len(json.loads(ended.out)["samples"]) == 1


def test_env_reports_in_text_and_json(call) -> None:
    assert "torch" in call("env").out
    facts = json.loads(call("env", "--json").out)
    assert {"python", "torch", "kernels"} <= facts.keys()


def test_version(call) -> None:
    from pyprune import __version__

    assert call("--version").out.strip() == f"pyprune {__version__}"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_models_are_pruned_in_their_own_type(call, place, dtype: str) -> None:
    ended = call(*PRUNE, "--ratio", "0.3", "--dtype", dtype, "--output_dir", "out")
    assert ended.status == 0, ended.err
    model = AutoModelForCausalLM.from_pretrained(place / "out", dtype="auto", trust_remote_code=True)
    assert str(model.dtype) == f"torch.{dtype}"
    assert all(p.isfinite().all() for p in model.parameters())


def test_whole_layers_go_from_the_command_line_and_the_report_names_them(call, place) -> None:
    ended = call(*PRUNE, "--remove_layers", "0.25", "--layer_criterion", "perplexity", "--output_dir", "out")
    assert ended.status == 0, ended.err
    report = json.loads((place / "out" / "pyprune_report.json").read_text())
    (gone,) = report["depth"]["removed_layers"]
    assert f"layers removed: {gone} (1, by perplexity)" in ended.out
    assert AutoModelForCausalLM.from_pretrained(place / "out").config.num_hidden_layers == 3
